"""Image files to pixels: decoded, turned, put over white, resized, cropped."""

import functools
import io

import numpy as np
from PIL import Image, ImageOps

from ddpm_jax.errors import UserError

MODES = {1: "L", 3: "RGB"}


def decode(
    file: bytes, image_shape: tuple[int, int, int], name: str, ending: str | None = None
) -> np.ndarray:
    """The image uint8 [H,W,C]: turned as its EXIF says, over white where transparent, resized to
    cover `image_shape`, and cropped in the centre. `ending` (".png") tells the likely format, by default that
    of `name`. Raises UserError if it is smaller than that or too large to be safe; whatever Pillow raises if
    it does not decode."""
    height, width, channels = image_shape
    try:
        image = Image.open(io.BytesIO(file), formats=_formats(ending or name))
    except Image.DecompressionBombError as error:
        raise UserError(
            f"data: {name} is too large to decode safely: {error}; remove it"
        ) from error
    with image:
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise UserError(
                f"data: {name} claims {image.width}x{image.height} pixels, too many to be safe; remove it"
            )
        image = _to_8_bit(ImageOps.exif_transpose(image), MODES[channels])
    if image.width < width or image.height < height:
        raise UserError(
            f"data: {name} is {image.width}x{image.height} pixels, data.image_shape {width}x{height}; "
            "remove it or lower data.image_shape"
        )
    image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(image, np.uint8).reshape(image_shape)


def check_channels(image_shape: tuple[int, int, int]) -> None:
    """Raises UserError for a number of channels that image files are not decoded to."""
    if image_shape[2] not in MODES:
        raise UserError(
            f"data.image_shape: an image file gives 1 (grey) or 3 (RGB) channels, not {image_shape[2]}"
        )


def image_files(names) -> list[str]:
    """Those of `names` (paths with /) that are image files by their ending and are not hidden, sorted."""
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
        # Pillow's own conversion clips 16-bit greys at 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no fixed range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


@functools.cache
def _endings() -> dict[str, str]:
    """{".png": "PNG", ...}: what can be opened. Pillow hands PostScript to an interpreter: left out."""
    formats = Image.registered_extensions()
    return {
        ending: name for ending, name in formats.items() if name in Image.OPEN and name != "EPS"
    }


@functools.cache
def _formats_after(first: str | None) -> tuple[str, ...]:
    return tuple(sorted(set(_endings().values()), key=lambda name: (name != first, name)))


def _formats(name: str) -> tuple[str, ...]:
    """All formats, the one of the name's ending first: trying them takes longer than decoding a small image."""
    return _formats_after(_endings().get("." + name.rpartition(".")[2].lower()))
