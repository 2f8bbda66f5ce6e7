"""Turns the pixels of an image, however deep or transparent, into 8-bit greys or colours."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ddpm_jax.data.faults import Undecodable

# Formats whose 16-bit greys run from 0, black, to 65535, white. Those of others have no fixed
# range: in FITS, for example, they are measurements.
FULL_RANGE = ("IM", "JPEG2000", "PNG", "PPM", "TIFF")
MIN_IS_WHITE = 0
PHOTOMETRIC = 262
# Pillow scales the levels of shallow greys to 8 bits, but not the level that is transparent.
SCALES = {"L;2": 85, "L;4": 17}


class Pixels(NamedTuple):
    """An image in 8 bits."""

    image: Image.Image
    anew: bool
    """Whether version 1 of decoding made other pixels of it, see DECODING in `decode.py`."""


def to_8_bit(reopen: Callable[[], Image.Image], mode: str) -> Pixels:
    """The image that `reopen` opens as `mode`, L or RGB, turned as its EXIF data say, on white.

    16-bit greys keep their upper byte, as Pillow's 16-bit colours do. Raises Undecodable for
    pixels that have no fixed range.
    """
    with reopen() as opened:
        kind = opened.format or ""
        rawmode = rawmode_of(opened)
        inverted = is_inverted(opened)
        image = ImageOps.exif_transpose(opened)
    key = image.info.get("transparency") if kind == "PNG" else None
    if is_deep(image, kind):
        levels = _levels(image, rawmode)
        grey = _upper_byte(~levels if inverted else levels, kind)
        hidden = levels == key
        anew = bool(np.any(hidden)) or inverted or rawmode == "I;12"
        return Pixels(_on_white(Image.fromarray(grey), hidden, mode), anew)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise Undecodable(
            f"pixels of mode {image.mode} in {kind} have no fixed range; choose other --data.values"
        )
    if key is not None and rawmode in SCALES:
        levels = np.asarray(image)
        hidden = levels == key * SCALES[rawmode]
        return Pixels(_on_white(image, hidden, mode), bool(np.any(hidden != (levels == key))))
    if key is not None and rawmode == "RGB;16B":
        upper = np.asarray(image).astype(np.uint16)
        hidden = (upper * 256 + _lower_bytes(reopen) == key).all(-1)
        anew = bool(np.any(hidden != (upper == key).all(-1)))
        return Pixels(_on_white(image, hidden, mode), anew)
    return Pixels(_flat(image).convert(mode), False)


def is_inverted(opened: Image.Image) -> bool:
    """Whether 0 is white, which Pillow leaves to others where levels are deep."""
    tags = getattr(opened, "tag_v2", {})
    return opened.format == "TIFF" and tags.get(PHOTOMETRIC) == MIN_IS_WHITE


def rawmode_of(opened: Image.Image) -> str:
    """How the pixels lie in the file; empty where there is no single such thing."""
    tile = getattr(opened, "tile", None)
    how = tile[0][3] if tile else ""
    how = how[0] if isinstance(how, tuple) and how else how
    return how if isinstance(how, str) else ""


def is_deep(image: Image.Image, kind: str) -> bool:
    """Whether it is a 16-bit grey; some formats' are of mode I, which has room for 32 bits."""
    if image.mode == "I":
        return kind in ("PNG", "PPM")
    return image.mode.startswith("I;16") and kind in FULL_RANGE


def _levels(image: Image.Image, rawmode: str) -> np.ndarray:
    levels = np.asarray(image).astype(np.uint16)
    return levels << 4 | levels >> 8 if rawmode == "I;12" else levels


def _upper_byte(levels: np.ndarray, kind: str) -> np.ndarray:
    # Pillow rounds the colours of PPM, and takes the upper byte of all others.
    if kind == "PPM":
        return ((levels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return (levels >> 8).astype(np.uint8)


def _lower_bytes(reopen: Callable[[], Image.Image]) -> np.ndarray:
    """The lower bytes of a PNG's 16-bit colours: those that are the upper ones in another order."""
    with reopen() as opened:
        opened.tile = [(*tile[:3], "RGB;16L") for tile in opened.tile]  # type: ignore[attr-defined]
        return np.asarray(ImageOps.exif_transpose(opened))


def _on_white(image: Image.Image, hidden: np.ndarray, mode: str) -> Image.Image:
    """`image` as `mode`, white where `hidden`."""
    image.info.pop("transparency", None)
    pixels = np.array(image.convert(mode))
    pixels[hidden] = 255
    return Image.fromarray(pixels)


def _flat(image: Image.Image) -> Image.Image:
    """`image` without transparency, put on white."""
    if not image.has_transparency_data:
        return image
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
