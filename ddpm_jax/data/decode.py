"""Turns image files into pixels: decodes, rotates, fills transparency, resizes and crops them."""

import functools
import io
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from ddpm_jax.data.faults import IS_POINTER, LFS_POINTER, Undecodable
from ddpm_jax.data.formats import formats, opener
from ddpm_jax.data.pixels import to_8_bit
from ddpm_jax.data.quiet import quiet_pillow
from ddpm_jax.errors import UserError

MODES = {1: "L", 3: "RGB"}

DECODING = 2
"""The version of decoding. The fingerprint of data has it where it made other pixels of an image
than version 1, which ignored that a 16-bit grey may be inverted, transparent or of 12 bits."""


class Unfit(UserError):
    """An image is too small or too large; the message continues a sentence after its name."""


class Decoded(NamedTuple):
    """The pixels of an image file."""

    pixels: np.ndarray
    """uint8 [H,W,C]."""
    anew: bool
    """Whether version 1 of decoding made other pixels of it."""
    size: tuple[int, int]
    """The image's own (height, width)."""


def decode(
    file: bytes, image_shape: tuple[int, int, int], name: str, ending: str | None = None
) -> np.ndarray:
    """The image in `file` as uint8 [H,W,C].

    It is rotated as its EXIF data say, put on white where transparent, resized to cover
    `image_shape`, and cropped in the centre. `ending` (".png") gives the likely format; the default
    is the ending of `name`.

    Raises UserError if the image is smaller than `image_shape` or too large to decode safely, and
    Pillow's own errors if it cannot be decoded.
    """
    try:
        return decode_file(file, image_shape, ending or name).pixels
    except Unfit as error:
        raise UserError(f"data: {name} {error}; remove it or lower data.image_shape") from error


def decode_file(file: bytes, image_shape: tuple[int, int, int], ending: str) -> Decoded:
    """As `decode`, but raises Unfit for an image that is too small or too large."""
    height, width, channels = image_shape
    reopen = functools.partial(_open, file, ending)
    with quiet_pillow():
        image, anew = to_8_bit(reopen, MODES[channels])
    if image.width < width or image.height < height:
        raise Unfit(
            f"is {image.width}x{image.height} pixels, smaller than data.image_shape "
            f"{width}x{height}"
        )
    size = (image.height, image.width)
    image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return Decoded(np.asarray(image, np.uint8).reshape(image_shape), anew, size)


def check_channels(image_shape: tuple[int, int, int]) -> None:
    """Raises UserError if image files cannot be decoded to this number of channels."""
    if image_shape[2] not in MODES:
        raise UserError(
            "data.image_shape: for image files the channels must be 1 (greyscale) or 3 (RGB), "
            f"got {image_shape[2]}"
        )


class WithLimits:
    """Takes Pillow's limits along where it is sent to another process, and sets them there.

    A user's `Image.MAX_IMAGE_PIXELS` or `ImageFile.LOAD_TRUNCATED_IMAGES` is meant for all images.
    """

    def __getstate__(self) -> tuple[dict[str, Any], int | None, bool]:
        return vars(self), Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES

    def __setstate__(self, state: tuple[dict[str, Any], int | None, bool]) -> None:
        own, Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = state
        vars(self).update(own)


def _open(file: bytes, ending: str) -> Image.Image:
    try:
        opened = Image.open(io.BytesIO(file), formats=formats(ending))
    except Image.DecompressionBombError as error:
        raise Unfit(f"is too large to decode safely: {error}") from error
    except UnidentifiedImageError as error:
        if file.startswith(LFS_POINTER):
            raise Undecodable(IS_POINTER) from error
        package = opener(file)
        if package is None:
            raise
        raise Undecodable(f"pip install {package} may open it") from error
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and opened.width * opened.height > most:
        opened.close()
        raise Unfit(f"has {opened.width}x{opened.height} pixels, too many to decode safely")
    return opened
