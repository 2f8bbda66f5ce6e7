"""The state of the process that no reader may change, and what one may not leave behind."""

import contextlib
import gc
import logging
import os
import re
import signal
import sys
import threading
import warnings

import numpy as np
from PIL import Image, ImageFile

LOGGERS = (None, "absl", "asyncio", "PIL", "jax", "orbax", "ddpm_jax")

# It writes past Python, which only another stderr for the whole process could stop.
LIBTIFF = re.compile(rb"[\w.]+: ")

# After a load that failed, its other reads end in an event loop that is no longer there. Nothing
# but a hook of the process can keep Python from saying so.
OF_ORBAX = re.compile(
    "^(Event loop is closed|Encountered error while reading array index"
    "|coroutine '.*(_background_load|_read_array_index_and_device_put)' was never awaited)"
)


def hooks():
    """Everything of the process that a reader must leave as it is, by name."""
    return {
        "sys.excepthook": sys.excepthook,
        "sys.displayhook": sys.displayhook,
        "sys.unraisablehook": sys.unraisablehook,
        "threading.excepthook": threading.excepthook,
        "warnings.showwarning": warnings.showwarning,
        "warnings.filters": list(warnings.filters),
        "loggers": [_of_logger(logging.getLogger(name)) for name in LOGGERS],
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "np.geterr": np.geterr(),
        "Image.MAX_IMAGE_PIXELS": Image.MAX_IMAGE_PIXELS,
        "ImageFile.LOAD_TRUNCATED_IMAGES": ImageFile.LOAD_TRUNCATED_IMAGES,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "recursion limit": sys.getrecursionlimit(),
    }


def _of_logger(logger):
    state = (logger.level, logger.disabled, logger.propagate)
    return *state, list(logger.handlers), list(logger.filters)


def changed(before, after):
    """The names of the hooks that differ."""
    return [name for name in before if before[name] != after[name]]


class Watch(logging.Handler):
    """Collects warnings, errors of threads and foreign log lines; and what goes to stderr."""

    def __init__(self, stderr):
        """`stderr` is a file that the process's stderr goes to."""
        super().__init__(logging.WARNING)
        self.stderr = stderr
        self.length = 0
        self.seen = []
        logging.getLogger().handlers[:] = [self]
        warnings.simplefilter("always")
        warnings.showwarning = self._warning
        sys.unraisablehook = self._unraisable
        threading.excepthook = self._of_thread

    def emit(self, record):
        """The package's own lines are for the user, and Pillow's; but memory is never short."""
        line = record.getMessage()
        if not record.name.startswith(("ddpm_jax", "PIL")):
            self.seen.append(f"a log line of {record.name}: {line:.300}")
        elif "MemoryError" in line:
            self.seen.append(f"memory ran out: {line:.300}")

    def _warning(self, message, category, filename, lineno, file=None, line=None):
        if not OF_ORBAX.search(str(message)):
            self.seen.append(f"a warning, {category.__name__}: {message} ({filename}:{lineno})")

    def _unraisable(self, unraisable):
        if not OF_ORBAX.search(str(unraisable.exc_value)):
            self.seen.append(
                f"an unraisable error: {unraisable.exc_value!r} in {unraisable.object!r}"
            )

    def _of_thread(self, args):
        self.seen.append(f"an error of a thread: {args.exc_value!r}")

    def take(self):
        """What was seen since the last call."""
        seen, self.seen = self.seen, []
        written = os.pread(self.stderr.fileno(), 2**20, self.length)
        self.length += len(written)
        lines = [line for line in written.splitlines() if not LIBTIFF.match(line)]
        if lines:
            seen.append(f"written to stderr: {lines}"[:300])
        return seen


def open_files():
    """How many files and sockets the process has open."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def at_most(seconds):
    """Raises TimeoutError once the process has computed for `seconds`: a reader that hangs."""

    def stop(*_):
        raise TimeoutError(f"not done after computing for {seconds} seconds")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
