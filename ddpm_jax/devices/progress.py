"""The progress bar. It is shown only on a terminal, and only by the first of several processes."""

from typing import Any

from tqdm import tqdm

from ddpm_jax.devices.processes import is_first


def progress_bar(
    *args: Any, leave: bool = False, disable: bool | None = None, **options: Any
) -> tqdm:
    """tqdm(*args, **options). The bar is removed when it is done, unless `leave`."""
    disable = disable if is_first() else True
    return tqdm(*args, leave=leave, dynamic_ncols=True, disable=disable, **options)
