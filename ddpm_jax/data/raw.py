"""Turns the numbers of an image file, at their full depth, into those that a config asks for."""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ddpm_jax.data.faults import Unfit

LUMA = (19_595, 38_470, 7_471)
"""Rec. 601's weights of red, green and blue, in units of 1 / 65536: those of Pillow."""

DEEPEST = 65_535

EXACT = 2**53
"""Whole numbers up to it are exact in float64."""


class Raw(NamedTuple):
    """The numbers of an image as its file has them."""

    values: np.ndarray
    """[H,W,C] of any real dtype."""
    white: int | None
    """The level of white, where black is 0; None for numbers without a fixed range."""
    alpha: np.ndarray | None = None
    """float64 [H,W], 1 where opaque; None if no pixel is transparent."""
    picture: bool = True
    """Whether one channel is grey and three are red, green and blue, so that one can be made of the
    other."""


def finished(raw: Raw, image_shape: tuple[int, int, int], dtype: np.dtype) -> np.ndarray:
    """The image as `dtype` [H,W,C] of `image_shape`.

    uint16 has white at 65535 and transparent pixels on white; uint8 and float32 are the file's own
    numbers. Another size is resized to cover and cropped in the centre. Raises Unfit for numbers
    that `dtype` does not hold, and for other channels.
    """
    values = _opaque(raw, dtype)
    if dtype == np.uint16:
        values = _deep(values, raw)
    elif dtype == np.uint8:
        _check_shallow(raw)
    else:
        _check_exact(values)
    values = _rounded(_with_channels(values, image_shape, raw.picture), dtype)
    if values.shape[:2] == image_shape[:2]:
        return values
    return _fitted(values, image_shape)


def _opaque(raw: Raw, dtype: np.dtype) -> np.ndarray:
    if raw.alpha is None or (raw.alpha >= 1).all():
        return raw.values
    if dtype != np.uint16 or raw.white is None:
        raise Unfit("is transparent in places, which no number stands for", "fill these places")
    alpha = raw.alpha[..., None]
    return raw.values * alpha + raw.white * (1 - alpha)


def _deep(values: np.ndarray, raw: Raw) -> np.ndarray:
    """Levels from 0 to 65535, rounded later where they are floats."""
    if raw.white is None:
        raise Unfit(
            f"holds {raw.values.dtype} numbers, which have no fixed range",
            "choose other --data.values, for example standardise",
        )
    if raw.white == DEEPEST:
        return values
    bits = raw.white.bit_length()
    if values.dtype.kind == "f" or bits < 8:
        return values * (DEEPEST / raw.white)
    levels = values.astype(np.uint32)
    return levels << (16 - bits) | levels >> (2 * bits - 16)


def _check_shallow(raw: Raw) -> None:
    if raw.values.dtype != np.uint8:
        other = "uint16" if raw.values.dtype == np.uint16 else "standardise"
        raise Unfit(
            f"holds {raw.values.dtype} numbers, not the uint8 of data.values",
            f"choose --data.values {other}",
        )


def _check_exact(values: np.ndarray) -> None:
    """Raises Unfit for numbers that float32 cannot hold."""
    if not values.size or values.dtype.kind == "b" or values.dtype.itemsize < 3:
        return
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):
            lost = np.isfinite(values) & ~np.isfinite(values.astype(np.float32))
        if lost.any():
            raise Unfit(f"has numbers like {values[lost][0]:g}, too large for float32", "scale it")
        return
    low, high = int(values.min()), int(values.max())
    if low < -EXACT or high > EXACT or (np.float32(values).astype(np.float64) != values).any():
        raise Unfit(
            f"has whole numbers from {low} to {high}, not all of which float32 can hold",
            "save it as float32",
        )


def _with_channels(
    values: np.ndarray, image_shape: tuple[int, int, int], picture: bool
) -> np.ndarray:
    own = values.shape[2]
    height, width, channels = image_shape
    if own == channels:
        return values
    if picture and (own, channels) == (1, 3):
        return values.repeat(3, axis=2)
    if picture and (own, channels) == (3, 1):
        return values.astype(np.float64) @ np.array(LUMA)[:, None] / 65_536
    words = "1 channel" if own == 1 else f"{own} channels"
    raise Unfit(
        f"has {words}, not the {channels} of data.image_shape",
        f"pass --data.image-shape {height} {width} {own}",
    )


def _rounded(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype != np.float32 and values.dtype.kind == "f":
        values = np.clip(np.rint(values), 0, np.iinfo(dtype).max)
    return np.ascontiguousarray(values, dtype)


def _fitted(values: np.ndarray, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Resized to cover and cropped in the centre.

    Bicubic resizing overshoots at edges: no float leaves the range that its channel has.
    """
    height, width, _ = image_shape
    if not np.isfinite(values).all():
        raise Unfit(
            f"has NaNs or infinities, which resizing its {values.shape[1]}x{values.shape[0]} "
            f"pixels to {width}x{height} would spread",
            "crop or resize it yourself",
        )
    channels = [_fitted_channel(values[..., c], (width, height)) for c in range(image_shape[2])]
    return np.stack(channels, axis=2)


def _fitted_channel(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """One channel [H,W], resized."""
    wide = np.ascontiguousarray(values, np.uint8 if values.dtype == np.uint8 else np.float32)
    resized = np.asarray(ImageOps.fit(Image.fromarray(wide), size, Image.Resampling.BICUBIC))
    if values.dtype == np.float32:
        return np.clip(resized, values.min(), values.max())
    return _rounded(resized, values.dtype)
