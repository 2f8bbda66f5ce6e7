"""Readers that do what none may, to try the harness itself: each fault is named as its reader."""

import json
import os
import sys
import threading
import time
import warnings
from types import SimpleNamespace

import numpy as np

from ddpm_jax.errors import UserError
from fuzz.reader import Reader
from fuzz.run import started

KEPT = []


def _right(folder, rng):
    raise UserError("x: damaged; restore it")


def _breaks(folder, rng):
    raise KeyError("x")


class _Raw(UserError):
    """Says what it is given, which UserError itself makes one short line of."""

    def __str__(self):
        return self.raw

    def __init__(self, raw):
        super().__init__("")
        self.raw = raw


def _says_two_lines(folder, rng):
    raise _Raw("x\ny")


def _says_too_much(folder, rng):
    raise _Raw("x" * 5000)


def _takes_memory(folder, rng):
    try:
        np.ones(2**40, np.uint8)
    except MemoryError as error:
        raise UserError("x: too large") from error


def _warns(folder, rng):
    warnings.warn("x", stacklevel=1)


def _writes(folder, rng):
    print("x", file=sys.stderr, flush=True)


def _breaks_in_a_thread(folder, rng):
    thread = threading.Thread(target=_breaks, args=(folder, rng))
    thread.start()
    thread.join()


def _changes_a_hook(folder, rng):
    sys.excepthook = _right


def _changes_files(folder, rng):
    (folder / "x").write_bytes(b"y")


def _leaves_files_open(folder, rng):
    KEPT.extend(os.open(folder / "x", os.O_RDONLY) for _ in range(20))


def _hangs(folder, rng):
    while True:
        time.perf_counter()


FAULTS = {
    "right": _right,
    "KeyError": _breaks,
    "not one printable line": _says_two_lines,
    "a message of": _says_too_much,
    "memory taken first": _takes_memory,
    "a warning": _warns,
    "written to stderr": _writes,
    "an error of a thread": _breaks_in_a_thread,
    "sys.excepthook was changed": _changes_a_hook,
    "the files were changed": _changes_files,
    "left": _leaves_files_open,
    "TimeoutError": _hangs,
}


def main():
    """Writes the figures of all of them as JSON to stdout."""
    readers = [
        Reader(name, 2, lambda rng: {"x": b"x"}, lambda rng, files: files, read)
        for name, read in FAULTS.items()
    ]
    options = SimpleNamespace(seed=0, times=1, case=None, seconds=1, now=None)
    with started(options) as runner:
        runner.limit_memory()
        figures = [runner.run(reader) for reader in readers]
    json.dump(figures, sys.stdout)


if __name__ == "__main__":
    main()
