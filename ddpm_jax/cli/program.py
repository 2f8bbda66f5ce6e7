"""The program `ddpm-jax`: runs a command, says what went wrong, and ends with an exit code."""

import logging
import os
import sys
import warnings

from ddpm_jax import __version__
from ddpm_jax.cli.commands import COMMANDS
from ddpm_jax.cli.faults import line_of
from ddpm_jax.cli.streams import (
    READER_LEFT,
    discard_unwritable,
    open_closed_streams,
    reader_has_left,
    say,
)
from ddpm_jax.cli.usage import usage
from ddpm_jax.errors import UserError, refuse_windows

INTERRUPTED = 130
"""The exit code of a program that Ctrl-C has ended, as shells know it."""


def main(args: list[str] | None = None) -> int:
    """Runs the command `args`, sys.argv's by default.

    Returns the exit code: 0, 2 for a user's error, 130 for Ctrl-C, 141 where the reader of the
    output has left.
    """
    is_program = args is None
    args = sys.argv[1:] if args is None else args
    open_closed_streams()
    _log_to_stderr()
    _hide_closed_loops()
    code = _code_of(args)
    discard_unwritable()
    if code == INTERRUPTED and is_program:
        # Jax may hold what it was compiling, and would crash when Python takes its objects apart.
        os._exit(code)
    if code:
        _leave(code)
    return code


def _code_of(args: list[str]) -> int:
    """Runs the command; prints one line for an error that is not a bug. Returns the exit code."""
    command = args[0] if args else ""
    try:
        _run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        resumes = command in ("calibrate", "evaluate", "likelihood")
        advice = "; run the same command to resume" if resumes else ""
        say(f"ddpm-jax: interrupted{advice}")
        return INTERRUPTED
    except Exception as error:
        return _code_of_error(error, command)
    return 0


def _code_of_error(error: Exception, command: str) -> int:
    """Says what `error` is; raises it again if it is a bug."""
    if isinstance(error, BrokenPipeError) and reader_has_left():
        return READER_LEFT
    line = line_of(error, command)
    if line is None:
        _leave(1)
        raise error
    say(f"ddpm-jax: {line}")
    return 2


def _leave(code: int) -> None:
    """Ends one of several processes at once: it would wait for the others, and they for it."""
    if "jax" in sys.modules:
        from ddpm_jax.devices.processes import leave_at_once

        leave_at_once(code)


def _run(args: list[str]) -> None:
    refuse_windows()
    command, *rest = args or ["--help"]
    if command in ("-h", "--help"):
        print(usage())
    elif command == "--version":
        print(f"ddpm-jax {__version__}")
    elif command in COMMANDS:
        _import_jax()
        COMMANDS[command](rest)
    else:
        raise UserError(f"{command!r} is not a command; choose one of {', '.join(COMMANDS)}")


def _import_jax() -> None:
    """Imports jax, which reads its settings from the environment and refuses some.

    Raises UserError naming the setting.
    """
    try:
        import jax  # noqa: F401
    except (ValueError, RuntimeError) as error:
        names = [name for name in os.environ if name.startswith("JAX_")]
        named = [name for name in names if name in str(error).upper()] or names
        raise UserError(
            f"jax cannot start ({error}); correct or unset {' and '.join(named) or 'its settings'}"
        ) from error


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("ddpm_jax")
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def _hide_closed_loops() -> None:
    """Keeps Python from printing that an event loop of Orbax's is closed, or a task not awaited.

    Its threads find that out after a load or save that failed, which is reported already.
    """
    warnings.filterwarnings("ignore", r"coroutine '.*' was never awaited", RuntimeWarning)
    if sys.unraisablehook is not sys.__unraisablehook__:
        return

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = hook
