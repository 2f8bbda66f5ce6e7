"""Exact quantiles of more numbers than fit in memory."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ddpm_jax.errors import UserError
from ddpm_jax.shapes import Float32, Float64

HALF = 2**16
"""How many upper, and lower, halves a float32 has."""


def quantiles_of(
    pieces: Callable[[], Iterable[Float32[np.ndarray, "m c"]]], levels: Sequence[float]
) -> list[Float64[np.ndarray, " c"]]:
    """The quantiles at each of `levels` (from 0 to 1) of every column, over the finite numbers.

    They are those of numpy.quantile: between two order statistics they are interpolated. `pieces`
    is called twice and gives the numbers in pieces. A float32 with its bits turned into an unsigned
    integer sorts as the integer does: the first time the upper 16 bits are counted, the second time
    the lower ones of those upper halves that hold a wanted number. Raises UserError if a column has
    no finite number.
    """
    upper: list[np.ndarray] = []
    for piece in pieces():
        halves = [_counts(_keys(column) >> 16) for column in piece.T]
        upper = [a + b for a, b in zip(upper, halves, strict=True)] if upper else halves
    wanted = [_ranks(of_column, levels) for of_column in upper]
    lower: list[dict[int, np.ndarray]] = [
        {half: np.zeros(HALF, np.int64) for half, _ in of_column.values()} for of_column in wanted
    ]
    for piece in pieces():
        for column, of_column in zip(piece.T, lower, strict=True):
            keys = _keys(column)
            for half, counts in of_column.items():
                counts += _counts(keys[keys >> 16 == half] & (HALF - 1))
    columns = [_values(*both, levels) for both in zip(wanted, upper, lower, strict=True)]
    return [np.array(of_level) for of_level in zip(*columns, strict=True)]


def _keys(column: np.ndarray) -> np.ndarray:
    """Unsigned integers in the order of the finite ones of float32 numbers."""
    finite = column[np.isfinite(column)] + np.float32(0)  # -0 becomes 0.
    bits = finite.view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _floats(keys: np.ndarray) -> np.ndarray:
    """The numbers of `_keys`."""
    keys = keys.astype(np.uint32)
    bits = np.where(keys >> 31, keys & np.uint32(2**31 - 1), ~keys)
    return bits.view(np.float32)


def _counts(halves: np.ndarray) -> np.ndarray:
    return np.bincount(halves, minlength=HALF)


def _places(levels: Sequence[float], count: int) -> list[int]:
    """The ranks, from 0, on both sides of each quantile."""
    ranks = [level * (count - 1) for level in levels]
    return [int(rank) for each in ranks for rank in (np.floor(each), np.ceil(each))]


def _ranks(upper: np.ndarray, levels: Sequence[float]) -> dict[int, tuple[int, int]]:
    """{rank: (its upper half, its rank among those of that half)}."""
    total = int(upper.sum())
    if not total:
        raise UserError("data: a channel has no finite number; leave it out")
    ends = np.cumsum(upper)
    found = {}
    for rank in _places(levels, total):
        half = int(np.searchsorted(ends, rank, side="right"))
        found[rank] = (half, rank - int(ends[half] - upper[half]))
    return found


def _values(
    wanted: dict[int, tuple[int, int]],
    upper: np.ndarray,
    lower: dict[int, np.ndarray],
    levels: Sequence[float],
) -> list[float]:
    """The quantiles of one column."""
    total = int(upper.sum())
    at = {}
    for place, (half, inside) in wanted.items():
        low = int(np.searchsorted(np.cumsum(lower[half]), inside, side="right"))
        at[place] = float(_floats(np.array([half * HALF + low]))[0])
    quantiles = []
    for level in levels:
        rank = level * (total - 1)
        before = at[int(np.floor(rank))]
        after = at[int(np.ceil(rank))]
        quantiles.append(before + (rank - np.floor(rank)) * (after - before))
    return quantiles
