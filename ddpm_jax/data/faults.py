"""Tells a fault of the machine, or of reading, from a file that is damaged."""

import errno
from typing import TypeGuard

from PIL import UnidentifiedImageError

from ddpm_jax.data.names import shown
from ddpm_jax.errors import UserError, machine_remedy

OF_THE_FILE = {
    errno.EACCES: "allow it to be read, or remove it",
    errno.ENOENT: "restore it, or remove what points to it",
}


LFS_POINTER = b"version https://git-lfs"
"""How a file begins that git-lfs leaves in place of another."""

IS_POINTER = "it is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder"


class CannotRead(UserError):
    """A file could not be read, or the machine could not decode it: nothing is known of it."""

    def __init__(self, name: str, reason: str, remedy: str):
        super().__init__(f"data: {name} cannot be read ({reason}); {remedy}")
        self.name = name
        self.reason = reason
        self.remedy = remedy

    def __reduce__(self) -> tuple:
        # Processes that read images send it to the one that trains.
        return CannotRead, (self.name, self.reason, self.remedy)


class Unfit(UserError):
    """An image does not fit, most often for its size.

    The message continues a sentence after the image's name. `remedy` may stand between "remove it"
    and other remedies.
    """

    def __init__(self, message: str, remedy: str = "lower data.image_shape"):
        super().__init__(message)
        self.remedy = remedy

    def __reduce__(self) -> tuple:
        return Unfit, (str(self), self.remedy)


class Undecodable(ValueError):
    """A file holds no image that can be used; the message is the reason, to be shown."""


def reason_of(error: BaseException) -> str:
    """The reason of `error`, on one short line that can be printed."""
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, Undecodable):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return kind_and_words(error)


def kind_and_words(error: BaseException) -> str:
    """For example "ValueError: no such thing", on one short line that can be printed."""
    words = shown(" ".join(str(error).split()))
    return f"{type(error).__name__}: {words:.300}".removesuffix(": ")


def is_of_machine(error: BaseException) -> TypeGuard[OSError | MemoryError]:
    """Whether `error`, met while a file that was read whole is decoded, is not the file's fault.

    Pillow raises OSError for damaged images, too, but without the number of an error.
    """
    if isinstance(error, OSError):
        return error.errno is not None
    return isinstance(error, MemoryError)


def cannot_read(name: str, error: OSError | MemoryError) -> CannotRead:
    """The exception to raise instead of `error`, met while the file `name` was read."""
    number = getattr(error, "errno", None) or 0
    remedy = machine_remedy(error) or OF_THE_FILE.get(number) or "fix that, or remove the file"
    return CannotRead(name, reason_of(error), remedy)
