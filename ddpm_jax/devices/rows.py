"""Many images in batches of few sizes: every size is a program to compile."""

from collections.abc import Iterator

import numpy as np


def full_batches(
    n: int, size: int, *, shrink: bool = False, multiple: int = 1
) -> Iterator[tuple[np.ndarray, int]]:
    """Walks through the places 0, ..., n - 1 in full batches: yields (rows int64 [B], count).

    The first `count` of the rows count; those that fill up the last batch are its last place
    again. B is `size`. With `shrink` the last batch is only as large as the power of two that
    holds what is left. B is rounded up to a `multiple`, the number of devices for example.
    Raises ValueError for a size below 1.
    """
    if size < 1:
        raise ValueError(f"batch_size: must be at least 1, got {size}")
    start = 0
    while start < n:
        left = n - start
        B = min(size, 1 << (left - 1).bit_length()) if shrink else size
        B = -(-B // multiple) * multiple
        yield np.minimum(np.arange(start, start + B), n - 1), min(B, left)
        start += B
