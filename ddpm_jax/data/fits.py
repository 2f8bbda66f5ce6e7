"""The numbers of a FITS file, of which Pillow leaves out the scale."""

import math
from typing import Any

import numpy as np

from ddpm_jax.data.faults import Undecodable
from ddpm_jax.data.raw import Raw

BLOCK = 2880
CARD = 80
MOST_CARDS = 36_000
# By BITPIX, the high byte first.
TYPES = {8: "u1", 16: ">i2", 32: ">i4", 64: ">i8", -32: ">f4", -64: ">f8"}


def is_fits(file: bytes) -> bool:
    """Whether `file` begins as a FITS file does."""
    return file.startswith(b"SIMPLE  =")


def fits_raw(file: bytes) -> Raw:
    """The image of a FITS file's first part: BZERO + BSCALE * what is stored, NaN where BLANK.

    A third axis is that of the channels. The last row stored is the upper one. Raises Undecodable
    if the first part holds no image.
    """
    cards, start = _header(file)
    kind = TYPES.get(cards.get("BITPIX", 0))
    axes = cards.get("NAXIS")
    axes = axes if axes in (2, 3, 4, 5) else 0
    sizes: list[Any] = [cards.get(f"NAXIS{i + 1}") for i in range(axes)]
    while len(sizes) > 2 and sizes[-1] == 1:
        del sizes[-1]
    whole = all(isinstance(size, int) and size > 0 for size in sizes)
    if kind is None or not whole or len(sizes) not in (2, 3):
        raise Undecodable("its first part holds no image")
    count = math.prod(sizes)
    if start + count * np.dtype(kind).itemsize > len(file):
        raise Undecodable("parts of its pixels are missing")
    stored = np.frombuffer(file, kind, count, start).reshape(sizes[::-1])
    stored = stored.astype(stored.dtype.newbyteorder("="))
    stored = stored[..., None] if stored.ndim == 2 else np.moveaxis(stored, 0, 2)
    values = _scaled(stored[::-1], cards)
    white = 255 if values.dtype == np.uint8 else None
    return Raw(values, white, picture=values.shape[2] == 1)


def _header(file: bytes) -> tuple[dict[str, Any], int]:
    """(what the cards say, where the pixels begin)."""
    cards: dict[str, Any] = {}
    for i in range(min(len(file) // CARD, MOST_CARDS)):
        card = file[i * CARD : (i + 1) * CARD].decode("latin-1")
        name = card[:8].strip()
        if name == "END":
            return cards, -(-(i + 1) * CARD // BLOCK) * BLOCK
        if card[8:10] == "= ":
            cards[name] = _number(card[10:].partition("/")[0].strip())
    raise Undecodable("its header has no end")


def _number(word: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(word.replace("D", "E"))
        except ValueError:
            continue
    return None


def _scaled(stored: np.ndarray, cards: dict[str, Any]) -> np.ndarray:
    zero, scale = cards.get("BZERO") or 0, cards.get("BSCALE") or 1
    if stored.dtype.kind == "f":
        return stored if (zero, scale) == (0, 1) else stored * scale + zero
    blank = cards.get("BLANK")
    if scale != 1 or zero != int(zero):
        values = stored * float(scale) + zero
    elif zero:
        values = stored.astype(np.int64) + int(zero)  # For example unsigned 16 bits.
    else:
        values = stored
    if blank is None or not (stored == blank).any():
        return values
    return np.where(stored == blank, np.nan, values.astype(np.float64))
