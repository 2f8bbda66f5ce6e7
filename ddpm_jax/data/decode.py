"""Turns image files into pixels: decodes, rotates, fills transparency, resizes and crops them."""

import contextlib
import functools
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from ddpm_jax.config.values import Values
from ddpm_jax.data.array_files import ENDINGS, array_raw, is_array
from ddpm_jax.data.deep_pillow import keeps_depth, pillow_raw
from ddpm_jax.data.faults import IS_POINTER, LFS_POINTER, Undecodable, Unfit
from ddpm_jax.data.fits import fits_raw, is_fits
from ddpm_jax.data.formats import formats, is_tiff, opener
from ddpm_jax.data.pixels import to_8_bit
from ddpm_jax.data.quiet import quiet_pillow
from ddpm_jax.data.raw import Raw, finished
from ddpm_jax.errors import UserError

MODES = {1: "L", 3: "RGB"}

ANY_CHANNELS = (".tif", ".tiff", ".fit", ".fits", *ENDINGS)
"""The endings of files that may have other numbers of channels."""

DECODING = 2
"""The version of decoding. The fingerprint of data has it where it made other pixels of an image
than version 1, which ignored that a 16-bit grey may be inverted, transparent or of 12 bits."""


class Decoded(NamedTuple):
    """The pixels of an image file."""

    pixels: np.ndarray
    """[H,W,C] of the type that was asked for."""
    anew: bool
    """Whether version 1 of decoding made other pixels of it."""
    size: tuple[int, int]
    """The image's own (height, width)."""


def decode(
    file: bytes,
    image_shape: tuple[int, int, int],
    name: str,
    ending: str | None = None,
    dtype: np.dtype | type[np.generic] = np.uint8,
) -> np.ndarray:
    """The image in `file` as `dtype` [H,W,C], see `decode_file`.

    It is rotated as its EXIF data say, put on white where transparent, resized to cover
    `image_shape`, and cropped in the centre. `ending` (".png") gives the likely format; the default
    is the ending of `name`.

    Raises UserError if the image is smaller than `image_shape`, too large to decode safely or does
    not fit for another reason, and Pillow's own errors if it cannot be decoded.
    """
    try:
        return decode_file(file, image_shape, ending or name, dtype).pixels
    except Unfit as error:
        raise UserError(f"data: {name} {error}; remove it or {error.remedy}") from error


def read_dtype(values: Values) -> np.dtype:
    """The type that image files are read in where data.values are these: uint8, uint16, float32."""
    return np.dtype(values.kind if values.levels else np.float32)


def decode_file(
    file: bytes,
    image_shape: tuple[int, int, int],
    ending: str,
    dtype: np.dtype | type[np.generic] = np.uint8,
) -> Decoded:
    """As `decode`, but as `dtype`, and raises Unfit for an image that does not fit.

    uint16 has white at 65535, however deep the file is. float32 are the file's own numbers: levels
    up to 255 or 65535 of pictures, and any numbers of TIFF, FITS and arrays. A TIFF may have any
    number of channels, in one page or a page for each. A .npy or .npz file holds one array [H,W] or
    [H,W,C]; an .npz of several names it `image`.
    """
    dtype = np.dtype(dtype)
    reopen = functools.partial(_open, file, ending)
    if dtype == np.uint8 and image_shape[2] in MODES and not is_array(ending):
        return _shallow(reopen, image_shape)
    with quiet_pillow():
        raw = _raw(file, image_shape[2], ending, reopen)
    height, width = raw.values.shape[:2]
    _check_size(height, width, image_shape)
    return Decoded(finished(raw, image_shape, dtype), False, (height, width))


def _shallow(reopen: Callable[[], Image.Image], image_shape: tuple[int, int, int]) -> Decoded:
    height, width, channels = image_shape
    with quiet_pillow():
        image, anew = to_8_bit(reopen, MODES[channels])
    _check_size(image.height, image.width, image_shape)
    size = (image.height, image.width)
    image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return Decoded(np.asarray(image, np.uint8).reshape(image_shape), anew, size)


def _raw(file: bytes, channels: int, ending: str, reopen: Callable[[], Image.Image]) -> Raw:
    if is_array(ending):
        return array_raw(file, ending)
    if is_fits(file):
        return fits_raw(file)
    if not is_tiff(file):
        return pillow_raw(file, reopen)
    from ddpm_jax.data.tiff import NeedsCodec, tiff_raw  # 8-bit images do without tifffile.

    try:
        return tiff_raw(file, channels) or pillow_raw(file, reopen)
    except NeedsCodec as error:  # Pillow knows compressions that tifffile alone does not.
        with contextlib.suppress(Undecodable, UnidentifiedImageError):
            if channels in MODES and keeps_depth(reopen):
                return pillow_raw(file, reopen)
        raise error


def _check_size(height: int, width: int, image_shape: tuple[int, int, int]) -> None:
    if width < image_shape[1] or height < image_shape[0]:
        raise Unfit(
            f"is {width}x{height} pixels, smaller than data.image_shape "
            f"{image_shape[1]}x{image_shape[0]}"
        )


def check_channels(image_shape: tuple[int, int, int], names: Sequence[str] = ()) -> None:
    """Raises UserError if no image file, of those with `names`, can have this many channels.

    TIFF, FITS and arrays may have any number.
    """
    if image_shape[2] in MODES or any(name.lower().endswith(ANY_CHANNELS) for name in names):
        return
    words = "; TIFF, FITS, .npy and .npz files may have others" if names else ""
    raise UserError(
        "data.image_shape: for image files the channels must be 1 (greyscale) or 3 (RGB), "
        f"got {image_shape[2]}{words}"
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
