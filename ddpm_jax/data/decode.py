"""Turns image files into pixels: decodes, rotates, fills transparency, resizes and crops them."""

import functools
import io
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageOps

from ddpm_jax.errors import UserError

MODES = {1: "L", 3: "RGB"}


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
    height, width, channels = image_shape
    try:
        opened = Image.open(io.BytesIO(file), formats=_formats(ending or name))
    except Image.DecompressionBombError as error:
        raise UserError(
            f"data: {name} is too large to decode safely: {error}; remove it"
        ) from error
    with opened:
        most = Image.MAX_IMAGE_PIXELS
        if most is not None and opened.width * opened.height > most:
            raise UserError(
                f"data: {name} has {opened.width}x{opened.height} pixels, "
                "too many to decode safely; remove it"
            )
        image = _to_8_bit(ImageOps.exif_transpose(opened), MODES[channels])
    if image.width < width or image.height < height:
        raise UserError(
            f"data: {name} is {image.width}x{image.height} pixels, smaller than data.image_shape "
            f"{width}x{height}; remove it or lower data.image_shape"
        )
    image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(image, np.uint8).reshape(image_shape)


def check_channels(image_shape: tuple[int, int, int]) -> None:
    """Raises UserError if image files cannot be decoded to this number of channels."""
    if image_shape[2] not in MODES:
        raise UserError(
            "data.image_shape: for image files the channels must be 1 (greyscale) or 3 (RGB), "
            f"got {image_shape[2]}"
        )


def image_files(names: Iterable[str]) -> list[str]:
    """Those of `names` (paths with /) with an image file's ending, sorted; hidden ones left out."""
    endings = _endings()
    parts_of = {name: name.split("/") for name in names}
    return sorted(
        name
        for name, parts in parts_of.items()
        if not any(part.startswith((".", "__MACOSX")) for part in parts)
        and "." + parts[-1].rpartition(".")[2].lower() in endings
    )


def _to_8_bit(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow's own conversion would clip 16-bit greyscale at 255 instead of scaling it.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no fixed range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


@functools.cache
def _endings() -> dict[str, str]:
    """{".png": "PNG", ...}: the formats that are opened.

    EPS is left out, because Pillow runs an interpreter on PostScript.
    """
    formats = Image.registered_extensions()
    return {
        ending: name for ending, name in formats.items() if name in Image.OPEN and name != "EPS"
    }


@functools.cache
def _formats_after(first: str | None) -> tuple[str, ...]:
    return tuple(sorted(set(_endings().values()), key=lambda name: (name != first, name)))


def _formats(name: str) -> tuple[str, ...]:
    """All formats, with that of the name's ending first.

    Trying all of them can take longer than decoding a small image.
    """
    return _formats_after(_endings().get("." + name.rpartition(".")[2].lower()))
