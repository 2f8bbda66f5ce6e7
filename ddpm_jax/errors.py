"""Exceptions that the command line turns into one line and an exit code."""

import sys


class UserError(ValueError):
    """Something the user gave cannot be used; the message names it and the remedy, in one line."""


class DataLost(UserError):
    """An image that was there when the run started cannot be read any more."""


class NonFiniteLoss(UserError):
    """The loss or the gradient was infinite or not a number."""


def refuse_windows() -> None:
    """Raises UserError on Windows, which locks files and ends processes in other ways."""
    if sys.platform == "win32":
        raise UserError(
            "ddpm_jax does not run on Windows itself; install WSL (wsl --install) and run it there"
        )
