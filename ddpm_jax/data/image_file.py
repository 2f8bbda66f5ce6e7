"""An image file's pixels and hash, and the fingerprint of many."""

import hashlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from ddpm_jax.data.decode import DECODING, WithLimits, decode_file
from ddpm_jax.data.faults import CannotRead, cannot_read, is_of_machine
from ddpm_jax.data.names import name_bytes, shown


class Digest(NamedTuple):
    """What the fingerprint takes of an image: its file, and the decoding if that has changed."""

    file: str
    anew: bool

    def __str__(self) -> str:
        return f"{self.file}-decoding-{DECODING}" if self.anew else self.file


class Image(NamedTuple):
    """A decoded image file."""

    pixels: np.ndarray
    """[H,W,C]"""
    digest: Digest


class Decoder(WithLimits):
    """Maps a name to its image. It can be sent to other processes.

    Raises CannotRead if the file cannot be read, Unfit, or Pillow's own errors.
    """

    def __init__(
        self, read: Callable[[str], bytes], image_shape: tuple[int, int, int], dtype: np.dtype
    ):
        self.read = read
        self.image_shape = image_shape
        self.dtype = dtype

    def __call__(self, name: str) -> Image:
        """The image in the file `name`."""
        file = self.read(name)
        try:
            pixels, anew, _ = decode_file(file, self.image_shape, name, self.dtype)
        except Exception as error:  # Pillow raises many kinds, without a common base class.
            if is_of_machine(error):
                raise cannot_read(shown(name), error) from error
            raise
        return Image(pixels, Digest(hashlib.blake2b(file, digest_size=16).hexdigest(), anew))


def try_decode(decoder: Decoder, name: str) -> Image | Exception:
    """The image, or the error for one that does not decode or does not fit. Raises CannotRead."""
    try:
        return decoder(name)
    except CannotRead:
        raise
    except Exception as error:  # Pillow raises many kinds of errors, without a common base class.
        return error


def fingerprint(
    digests: Mapping[str, str], image_shape: tuple[int, int, int], dtype: np.dtype
) -> str:
    """That of the images {name: str(its Digest)}."""
    # That of uint8 is as it ever was.
    lines = [f"{image_shape}{'' if dtype == np.uint8 else f' {dtype}'}".encode()]
    lines += [f"{digest} ".encode() + name_bytes(name) for name, digest in digests.items()]
    return hashlib.blake2b(b"\n".join(lines), digest_size=16).hexdigest()
