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
    """tqdm(*args, **options), a bar on stderr if that is a terminal with a size.

    Elsewhere its count is a line in the log every `EVERY` seconds, unless `lines`
    is False; with `always` it is a bar there, too. The bar is removed when it is done, unless
    `leave`.
    """
    bar = shows_bar()
    if bar or (always and is_first()):
        return tqdm(*args, leave=leave, dynamic_ncols=bar, disable=False, **options)
    kind = _Lines if lines and is_first() else tqdm
    return kind(*args, disable=True, **options)


def shows_bar() -> bool:
    """Whether a bar can be seen on stderr, and this process shows it.

    Some containers, CI systems and `script` have a terminal of 0 columns or rows.
    """
    if not is_first():
        return False
    try:
        return 0 not in os.get_terminal_size(sys.stderr.fileno())
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
