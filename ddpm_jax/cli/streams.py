"""The standard streams of a command: closed ones, and readers that have left."""

import contextlib
import os
import select
import sys

READER_LEFT = 141
"""The exit code of a program that the signal SIGPIPE has ended, as shells know it."""


def open_closed_streams() -> None:
    """Opens standard input, output and error on /dev/null where they are closed (`>&-`).

    The next files that were opened would otherwise get their numbers, and what a library writes to
    standard output would end up in a checkpoint. Characters that standard output cannot encode are
    escaped.
    """
    _open_numbers()
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, closefd=False)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure:
        reconfigure(errors="backslashreplace")


def discard_unwritable() -> None:
    """Sends a stream to /dev/null if its last words cannot be written.

    Python would try to write them again when it exits, and return another exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            # A stream without a file descriptor raises ValueError.
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), stream.fileno())


def reader_has_left() -> bool:
    """Whether standard output is a pipe that nothing reads any more (`| head`)."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # It has no file descriptor.
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def say(line: str) -> None:
    """Prints a line to standard error, which may be a pipe that nothing reads any more."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _open_numbers() -> None:
    """Opens the file descriptors 0, 1 and 2 where they are closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # It gets the lowest number that is free, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
