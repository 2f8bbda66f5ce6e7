"""Exceptions that the command line turns into one line and an exit code."""

import errno
import sys

LONGEST = 1500
"""Characters of a message; a longer one loses its middle."""

REMEDIES = {
    errno.EMFILE: "raise the limit with ulimit -n",
    errno.ENFILE: "close other programs, which hold too many files open",
    errno.ENOMEM: "free some memory",
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room on that disk",
}
"""What helps if the machine has run out of something."""


class UserError(ValueError):
    """Something the user gave cannot be used; the message names it and the remedy, in one line.

    Names, paths and values of files stand in it: what a screen cannot show of them is escaped.
    """

    def __str__(self) -> str:
        return one_line(super().__str__(), LONGEST)


def one_line(text: str, longest: int) -> str:
    """`text` as one line of characters that can be shown, at most about `longest`."""
    line = printable(text[: longest + 1] + text[longest + 1 :][-longest:])
    half = longest // 2
    return line if len(line) <= longest else f"{line[:half]} ... {line[-half:]}"


def printable(text: str) -> str:
    """`text` with escapes for the characters that a screen cannot show."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def shown(value: object) -> str:
    """`value` as Python writes it, cut to about 80 characters: for messages."""
    if isinstance(value, int) and abs(value) >= 2**64:  # Python refuses to write very long ones.
        return f"a whole number of {value.bit_length()} bits"
    return one_line(repr(value), 80)


def machine_remedy(error: BaseException) -> str | None:
    """What helps if the machine has run out of something; None if it is another error."""
    if isinstance(error, MemoryError):
        return REMEDIES[errno.ENOMEM]
    return REMEDIES.get(error.errno or 0) if isinstance(error, OSError) else None


class DataLost(UserError):
    """An image that was there when the run started cannot be read any more."""


class NonFiniteLoss(UserError):
    """The loss or the gradient was infinite or not a number."""


class NonFiniteSamples(UserError):
    """A chain left values that were infinite or not a number."""


def refuse_windows() -> None:
    """Raises UserError on Windows, which locks files and ends processes in other ways."""
    if sys.platform == "win32":
        raise UserError(
            "ddpm_jax does not run on Windows itself; install WSL (wsl --install) and run it there"
        )
