"""The one progress bar: on a terminal alone, and of several processes for the first alone."""

from tqdm import tqdm

from ddpm_jax.devices.processes import is_first


def progress_bar(*args, leave: bool = False, **options) -> tqdm:
    """tqdm(*args, **options), which goes when it is done unless `leave`."""
    return tqdm(
        *args, leave=leave, dynamic_ncols=True, disable=None if is_first() else True, **options
    )
