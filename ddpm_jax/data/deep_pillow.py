"""The pixels of an image file at their full depth, from Pillow, which keeps 8 bits of colours."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from ddpm_jax.data.faults import Undecodable
from ddpm_jax.data.pixels import SCALES, is_deep, is_inverted, rawmode_of
from ddpm_jax.data.raw import Raw

Reopen = Callable[[], Image.Image]

LOWER = {
    "RGB;16B": "RGB;16L",
    "RGB;16L": "RGB;16B",
    "RGB;16N": "RGB;16B",
    "RGBA;16B": "RGBA;16L",
    "RGBA;16L": "RGBA;16B",
    "RGBA;16N": "RGBA;16B",
}
"""How colours of 16 bits lie in a file; and in which order their lower bytes are the upper ones.
N is the machine's own order: that of libtiff, low bytes first on all machines that jax knows."""

LOW_FIRST = ("I;16L", "I;16N", "I;16")

SIZ = b"\xff\x4f\xff\x51"
"""How a JPEG2000 stream begins."""
DEPTH_AT = 42
"""Bytes from there to the depth of its first channel, less 1."""


def pillow_raw(file: bytes, reopen: Reopen) -> Raw:
    """The image that `reopen` opens, of which `file` are the bytes, turned as its EXIF data say.

    Levels of 1, 2 and 4 bits are scaled to 8, and those of PPM from their own maximum to 8 or 16.
    Colours that are not red, green and blue are converted in 8 bits. Raises Undecodable for colours
    of which Pillow loses the lower bits.
    """
    with reopen() as opened:
        kind = opened.format or ""
        rawmode = rawmode_of(opened)
        inverted = is_inverted(opened)
        tile = (getattr(opened, "tile", None) or [None])[0]
        lost = _loses_depth(file, kind, opened.mode, tile)
        image = ImageOps.exif_transpose(opened)
    if lost:
        raise Undecodable(f"Pillow reads 8 bits of its deeper {kind}; convert it to PNG or TIFF")
    key = image.info.get("transparency") if kind == "PNG" else None
    if is_deep(image, kind):
        white = 4095 if rawmode == "I;12" else 65_535
        levels = np.asarray(image).astype(np.uint16)
        alpha = None if key is None else (levels != key).astype(np.float64)
        return Raw((white - levels if inverted else levels)[..., None], white, alpha)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return Raw(np.asarray(image)[..., None], None)
    if rawmode == "LA;16B":  # Pillow reads it as RGBA.
        both = np.frombuffer(_reread(reopen, "RGBA").tobytes(), ">u2")
        both = both.reshape(image.height, image.width, 2)
        return Raw(both[..., :1], 65_535, both[..., 1] / 65_535)
    if rawmode in LOWER:
        return _deep_colours(image, _reread(reopen, LOWER[rawmode]), key)
    if kind == "PPM" and tile is not None and _maximum(tile) > 255:
        return Raw(_deep_ppm(file, tile), 65_535)
    return _shallow(image, key, rawmode)


def keeps_depth(reopen: Reopen) -> bool:
    """Whether `pillow_raw` loses nothing of this TIFF of more than 8 bits."""
    with reopen() as opened:
        rawmode = rawmode_of(opened)
        return rawmode in LOWER or opened.mode.startswith("I;16") or rawmode == "F;32F"


def _loses_depth(file: bytes, kind: str, mode: str, tile) -> bool:
    if kind == "SGI" and tile is not None:
        args = tile[3]
        return tile[0] == "SGI16" or (isinstance(args, tuple) and args[-1] == 2)
    if kind == "JPEG2000" and not mode.startswith("I"):
        at = file.find(SIZ) + DEPTH_AT
        return at < len(file) and (file[at] & 0x7F) >= 8
    return False


def _deep_colours(image: Image.Image, lower: np.ndarray, key) -> Raw:
    upper = np.asarray(image).astype(np.uint16)
    levels = upper << 8 | lower
    if levels.shape[2] == 4:
        return Raw(levels[..., :3], 65_535, levels[..., 3] / 65_535)
    alpha = None if key is None else (levels != np.asarray(key)).any(-1).astype(np.float64)
    return Raw(levels, 65_535, alpha)


def _reread(reopen: Reopen, rawmode: str) -> np.ndarray:
    """The bytes in another order, uint8 [H,W,C]."""
    with reopen() as opened:
        opened.tile = [_in_order(tile, rawmode) for tile in opened.tile]  # type: ignore[attr-defined]
        return np.asarray(ImageOps.exif_transpose(opened))


def _in_order(tile, rawmode: str) -> tuple:
    args = tile[3]
    args = (rawmode, *args[1:]) if isinstance(args, tuple) else rawmode
    # Newer versions of Pillow give the parts names.
    return tile._replace(args=args) if hasattr(tile, "_replace") else (*tile[:3], args)


def _maximum(tile) -> int:
    """The maximum of a PPM's colours; 255 where the file's bytes need no scaling."""
    args = tile[3]
    return args[1] if isinstance(args, tuple) and isinstance(args[1], int) else 255


def _deep_ppm(file: bytes, tile) -> np.ndarray:
    """Colours [H,W,3], which Pillow scales at full depth where they are greys in wide rows."""
    decoder, (_, _, width, height), start, args = tile
    magic = "P2" if decoder == "ppm_plain" else "P5"
    head = f"{magic} {3 * width} {height} {args[1]}\n".encode()
    with Image.open(io.BytesIO(head + file[start:]), formats=["PPM"]) as greys:
        return np.asarray(greys).astype(np.uint16).reshape(height, width, 3)


def _shallow(image: Image.Image, key, rawmode: str) -> Raw:
    """Of an image of at most 8 bits."""
    is_grey = image.mode in ("1", "L", "LA", "La")
    if key is not None and rawmode in SCALES:
        levels = np.asarray(image)
        seen = levels != key * SCALES[rawmode]
        return Raw(levels[..., None], 255, seen.astype(np.float64))
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        pixels = np.asarray(image.convert("RGBA"))
        return Raw(pixels[..., : 1 if is_grey else 3], 255, pixels[..., 3] / 255)
    if is_grey:
        return Raw(np.asarray(image.convert("L"))[..., None], 255)
    return Raw(np.asarray(image.convert("RGB")), 255)
