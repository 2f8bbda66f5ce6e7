"""Times contestants in strictly alternating rounds; leaves out turns that others disturbed."""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

BLOCK_S = 0.4
"""Minimum seconds of one contestant's turn; short calls are repeated."""

FOREIGN = 0.05
"""Largest part of the machine's time that other processes may take in a turn that counts."""


class Timing(NamedTuple):
    """Seconds per call."""

    median: float
    spread: float
    """Half the distance between the quartiles, as a fraction of the median."""
    rounds: int
    """Number of undisturbed turns."""


def alternate(contestants: dict[str, Callable[[], None]], rounds: int) -> dict[str, Timing]:
    """The time of each call over `rounds` rounds in which all take turns.

    A call must return when its work is done. A turn in which other processes took more than FOREIGN
    of the machine is repeated, at most `rounds` times in all. If undisturbed turns are still
    missing then, disturbed ones take their place.
    """
    repeats = {}
    for name, call in contestants.items():
        call()  # Compiles.
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(BLOCK_S / (time.perf_counter() - start)))
    seconds = {name: [] for name in contestants}
    disturbed = {name: [] for name in contestants}
    for _ in range(2 * rounds):
        for name, call in contestants.items():
            if len(seconds[name]) == rounds:
                continue
            time.sleep(0.02)  # Threads of the previous contestant may still spin, waiting for work.
            taken, foreign = timed(call, repeats[name])
            kept = seconds if foreign < FOREIGN else disturbed
            kept[name].append(taken)
    return {
        name: _timing((seconds[name] + disturbed[name])[:rounds], len(seconds[name]))
        for name in contestants
    }


def timed(call: Callable[[], None], repeats: int = 1) -> tuple[float, float]:
    """(seconds a call, the part of the machine's time that other processes took meanwhile)."""
    before = _foreign_seconds()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    taken = time.perf_counter() - start
    return taken / repeats, (_foreign_seconds() - before) / (taken * os.cpu_count())


def _timing(seconds: list[float], counted: int) -> Timing:
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (median,) * 3
    return Timing(median, (high - low) / 2 / median, counted)


def _foreign_seconds() -> float:
    """Processor seconds used by other processes so far, over all cores; 0 if there is no /proc."""
    file = Path("/proc/stat")
    if not file.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, file.read_text().split()[1:9])
    own = os.times()
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - own.user - own.system - own.children_user - own.children_system
