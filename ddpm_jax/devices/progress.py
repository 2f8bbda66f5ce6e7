"""The progress bar. It is shown only on a terminal, and only by the first of several processes."""

import os
import sys
from typing import Any

from tqdm import tqdm

from ddpm_jax.devices.processes import is_first


def progress_bar(*args: Any, leave: bool = False, **options: Any) -> tqdm:
    """tqdm(*args, **options). The bar is removed when it is done, unless `leave`."""
    return tqdm(*args, leave=leave, dynamic_ncols=True, disable=not shows_bar(), **options)


def shows_bar() -> bool:
    """Whether a bar can be seen; lines in the log take its place where it cannot.

    Some containers, CI systems and `script` have a terminal of 0 columns or rows.
    """
    if not is_first() or not sys.stderr.isatty():
        return False
    try:
        return 0 not in os.get_terminal_size(sys.stderr.fileno())
    except (OSError, ValueError):  # It is no terminal of the system's.
        return True
