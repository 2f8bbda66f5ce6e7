"""Progress: a bar on a terminal, lines in the log elsewhere; only by the first of processes."""

import logging
import os
import sys
import time
from typing import Any

from tqdm import tqdm

from ddpm_jax.devices.processes import is_first

log = logging.getLogger(__name__)

EVERY = 30
"""Seconds between two lines."""


def progress_bar(
    *args: Any, lines: bool = True, always: bool = False, leave: bool = False, **options: Any
) -> tqdm:
    """tqdm(*args, **options), a bar on stderr if that is a terminal whose width is known.

    Elsewhere its count is a line in the log every `EVERY` seconds, unless `lines`
    is False; with `always` it is a bar there, too. The bar is removed when it is done, unless
    `leave`.
    """
    if not is_first():
        return tqdm(*args, disable=True, **options)
    if always or has_width():
        return tqdm(*args, leave=leave, dynamic_ncols=has_width(), disable=False, **options)
    return (_Lines if lines else tqdm)(*args, disable=True, **options)


def has_width() -> bool:
    """Whether stderr is a terminal with a width: `script` and some containers report 0 columns."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError, AttributeError):  # No terminal; closed; not a file at all.
        return False


class _Lines(tqdm):
    """A hidden bar that speaks through the log."""

    def __init__(self, *args, desc="", unit="it", **options):
        super().__init__(*args, **options)
        self.words = (desc, unit)
        self.done = 0
        self.said = time.monotonic()

    def __iter__(self):
        for each in self.iterable:
            yield each
            self.update()

    def update(self, n=1):
        self.done += n
        now = time.monotonic()
        if now < self.said + EVERY or self.done == self.total:
            return
        self.said = now
        desc, unit = self.words
        log.info("%s: %d of %d %ss", desc, self.done, self.total, unit)
