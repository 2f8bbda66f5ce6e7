"""Writes one image in the data's own numbers as a file, and checks files written before.

The same image gives the same bytes.
"""

import struct
import zlib

import numpy as np

from ddpm_jax.data.array_files import is_npy_of, npy
from ddpm_jax.data.images import is_png_of, png
from ddpm_jax.errors import UserError

KINDS = (".png", ".tif", ".npy")
"""The endings of files that an image is written into."""

PNG_START = b"\x89PNG\r\n\x1a\n"
COLOURS = {1: 0, 3: 2}
"""How PNG calls images of so many channels."""
LEVELS = 9
"""How hard zlib tries."""


def check_kind(kind: str, channels: int, dtype: np.dtype) -> None:
    """Raises UserError if images of `dtype` and so many channels cannot be written as `kind`."""
    if kind not in KINDS:
        raise UserError(f"an image is written as {', '.join(KINDS)}, not {kind!r}")
    if kind != ".png":
        return
    if channels not in COLOURS:
        raise UserError(f"a PNG has 1 or 3 channels, not {channels}; choose .tif or .npy")
    if np.dtype(dtype) not in (np.uint8, np.uint16):
        raise UserError(f"a PNG holds uint8 or uint16, not {dtype}; choose .tif or .npy")


def image_file_bytes(image: np.ndarray, kind: str) -> bytes:
    """The bytes of a file of the ending `kind` with one image [H,W,C].

    Raises UserError for an image that `check_kind` refuses.
    """
    check_kind(kind, image.shape[2], image.dtype)
    if kind == ".npy":
        return npy(image)
    if kind == ".tif":
        from ddpm_jax.data.tiff import tiff  # tifffile is needed there alone.

        return tiff(image)
    return png(image) if image.dtype == np.uint8 else deep_png(image)


def is_file_of(
    content: bytes, kind: str, image_shape: tuple[int, int, int], dtype: np.dtype
) -> bool:
    """Whether `content` is a whole file, as `image_file_bytes` makes it of such an image."""
    if kind == ".npy":
        return is_npy_of(content, image_shape, dtype)
    if kind == ".tif":
        from ddpm_jax.data.tiff import is_tiff_of

        return is_tiff_of(content, image_shape, dtype)
    if np.dtype(dtype) == np.uint8:
        return is_png_of(content, image_shape)
    return np.dtype(dtype) == np.uint16 and is_deep_png_of(content, image_shape)


def deep_png(image: np.ndarray) -> bytes:
    """A PNG file of one uint16 image [H,W,1 or 3], which Pillow writes of greys alone."""
    rows = image.astype(">u2").reshape(len(image), -1).view(np.uint8)
    # Each row is the difference from the one above, which PNG calls filter 2.
    rows = np.diff(rows, axis=0, prepend=np.zeros_like(rows[:1]))
    filtered = np.pad(rows, ((0, 0), (1, 0)), constant_values=2)
    body = zlib.compress(filtered.tobytes(), LEVELS)
    return b"".join(
        [
            PNG_START,
            _chunk(b"IHDR", _header(image.shape)),
            _chunk(b"IDAT", body),
            _chunk(b"IEND", b""),
        ]
    )


def _header(image_shape: tuple[int, ...]) -> bytes:
    height, width, channels = image_shape
    return struct.pack(">IIBBBBB", width, height, 16, COLOURS[channels], 0, 0, 0)


def _chunk(kind: bytes, body: bytes) -> bytes:
    check = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)


def is_deep_png_of(content: bytes, image_shape: tuple[int, int, int]) -> bool:
    """Whether `content` is a whole PNG file, as `deep_png` makes it of an image [H,W,C]."""
    if image_shape[2] not in COLOURS:
        return False
    start = PNG_START + _chunk(b"IHDR", _header(image_shape))
    end = _chunk(b"IEND", b"")
    body = content[len(start) + 8 : -len(end) - 4]
    if content != start + _chunk(b"IDAT", body) + end:
        return False
    height, width, channels = image_shape
    length = height * (1 + 2 * width * channels)
    unpacked = zlib.decompressobj()
    try:
        found = len(unpacked.decompress(body, length + 1))
    except zlib.error:
        return False
    return found == length and unpacked.eof and not unpacked.unused_data
