"""Images that a user names to be edited: one file, or a folder or zip of them."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ddpm_jax.data.array_files import is_array
from ddpm_jax.data.decode import MODES, check_channels, decode_file
from ddpm_jax.data.faults import Unfit, cannot_read, is_of_machine, reason_of
from ddpm_jax.data.files import open_files
from ddpm_jax.data.formats import image_files
from ddpm_jax.data.names import shown
from ddpm_jax.errors import UserError

log = logging.getLogger(__name__)


class Given(NamedTuple):
    """Images of one size."""

    names: list[str]
    """Their files' names."""
    images: np.ndarray
    """[N,H,W,C] of the type that was asked for."""


def given_images(
    path: str,
    image_shape: tuple[int, int, int],
    option: str = "image",
    dtype: np.dtype | type[np.generic] = np.uint8,
) -> Given:
    """The image in the file `path`, or those of a folder or zip, as `dtype` of `image_shape`.

    They are decoded as a folder's are where `read_dtype` gives `dtype`: resized to cover the shape
    and cropped in the centre; one line says how many were of another size. Raises UserError, which
    begins with `option`, if there are none, or one cannot be read or decoded or does not fit.
    """
    arrays = dtype != np.uint8 or image_shape[2] not in MODES
    names, read = _files(path, option, arrays)
    check_channels(image_shape, names)
    images = np.empty((len(names), *image_shape), dtype)
    others = 0
    for i, name in enumerate(names):
        decoded = _decoded(name, read(name), image_shape, option, dtype)
        images[i] = decoded.pixels
        others += decoded.size != image_shape[:2]
    if others:
        height, width, _ = image_shape
        log.info(
            "%s: %d of %d were not %dx%d pixels; resized and cropped in the centre, as in training",
            option,
            others,
            len(names),
            width,
            height,
        )
    return Given(names, images)


def _files(path: str, option: str, arrays: bool) -> tuple[list[str], Callable[[str], bytes]]:
    """(the files' names, what reads one)."""
    file = Path(path).expanduser()
    if not file.exists():
        raise UserError(f"{option}: {shown(path)} does not exist; name an image, a folder or a zip")
    if file.is_file() and (image_files([file.name]) or is_array(file.name)):
        return [file.name], lambda name: _read(file)
    files = open_files(path, arrays)
    return files.names, files.read


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except (OSError, MemoryError) as error:
        raise cannot_read(shown(file), error) from error


def _decoded(name, file, image_shape, option, dtype):
    try:
        return decode_file(file, image_shape, name, dtype)
    except Unfit as error:
        words = str(error).replace("smaller than data.image_shape", "smaller than the")
        words += " that this takes" if words != str(error) else ""
        raise UserError(f"{option}: {shown(name)} {words}; choose another image") from error
    except Exception as error:  # Pillow raises many kinds of errors, without a common base class.
        if is_of_machine(error):
            raise cannot_read(shown(name), error) from error
        raise UserError(
            f"{option}: {shown(name)} cannot be decoded ({reason_of(error)}); choose another image"
        ) from error
