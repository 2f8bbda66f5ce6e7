"""A long loop on the device, run as segments: it can be watched, and Ctrl-C ends it soon.

A compiled loop says nothing until it ends, and Python cannot interrupt it. So a chain's steps run
as segments of about half a second, all by one program that takes its bounds as arguments. The
bits do not depend on where the cuts are.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from tqdm import tqdm

from ddpm_jax.devices.processes import agreed
from ddpm_jax.devices.progress import progress_bar

SECONDS = 0.5
"""About how long one segment takes; a single step may take longer."""

Progress: TypeAlias = bool | tqdm
"""True for a bar of the steps, False for none, or the caller's tqdm, which is updated."""


def segments(steps: int) -> Iterator[tuple[int, int]]:
    """Cuts `steps` into (first, last), each to be run before the next is asked for.

    The first is one step: it may have to be compiled. The later ones are as long as the speed so
    far makes them last `SECONDS`. All processes get the same cuts, those of process 0.
    """
    first = 0
    length = 1
    while first < steps:
        last = min(first + length, steps)
        begin = time.perf_counter()
        yield first, last
        seconds = time.perf_counter() - begin
        if last < steps:
            length = int(agreed(next_length(last - first, seconds)))
        first = last


def next_length(length: int, seconds: float) -> int:
    """The steps of the next segment, where `length` steps took `seconds`; at most 8 times more."""
    if seconds * 8 <= SECONDS:
        return 8 * length
    return max(1, int(length * SECONDS / seconds))


@contextlib.contextmanager
def moving(progress: Progress, total: int, desc: str) -> Iterator[Callable[[int], Any]]:
    """A function that moves `progress` on by a number of steps."""
    if not isinstance(progress, bool):
        yield progress.update
    elif progress:
        with progress_bar(total=total, desc=desc, unit="step", always=True) as bar:
            yield bar.update
    else:
        yield lambda steps: None
