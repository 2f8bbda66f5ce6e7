"""Converts pixels between bytes and [-1, 1], and makes pictures of them."""

import io
import math
import warnings
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ddpm_jax.errors import UserError
from ddpm_jax.shapes import Float, Float32, Shaped, UInt8

PNG_END = b"IEND\xaeB`\x82"
"""The last bytes of every PNG file."""

AnyArray = TypeVar("AnyArray", jax.Array, np.ndarray)


def to_uint8(x: Float[AnyArray, "*shape"]) -> UInt8[AnyArray, "*shape"]:
    """Images [..., H, W, C] in [-1, 1] as uint8, rounded to the nearest level and clipped.

    Returns NumPy for NumPy, else a jax array. The paper's published figures were measured on
    unrounded floats, and those of others on truncated values. Raises UserError for NumPy images
    that are not finite: no bytes stand for them.
    """
    if isinstance(x, np.ndarray) and not np.isfinite(x).all():
        raise UserError("images: some values are not finite, so there is no picture of them")
    xp = jnp if isinstance(x, jax.Array) else np
    return xp.clip(xp.rint((x + 1) * 127.5), 0, 255).astype(xp.uint8)


def to_float(images: Shaped[AnyArray, "*shape"]) -> Float32[AnyArray, "*shape"]:
    """Images as a Source reads them, as float32 in the model's units.

    uint8 is x / 127.5 - 1 and uint16 x / 32767.5 - 1; floats are in these units already.
    """
    x = images.astype(jnp.float32)
    if images.dtype == jnp.uint8:
        return x / 127.5 - 1
    return x / 32_767.5 - 1 if images.dtype == jnp.uint16 else x


def as_read(x: Float[AnyArray, "*shape"], levels: int | None) -> Shaped[AnyArray, "*shape"]:
    """The opposite: images in the model's units as a Source reads them.

    Of 256 or 65,536 `levels`, or None for floats, which stay as they are.
    """
    if levels == 256:
        return to_uint8(x)
    if levels == 65_536:
        xp = jnp if isinstance(x, jax.Array) else np
        return xp.clip(xp.rint((x + 1) * 32_767.5), 0, 65_535).astype(xp.uint16)
    return x


def warn_of_range(x: jax.Array | np.ndarray, name: str = "x_0") -> None:
    """Warns of images that are never negative: they are in [0, 1] or so, not in [-1, 1].

    `name` is what the caller's argument is called.

    Nothing is known of the values inside jit, or of those that other hosts hold.
    """
    if isinstance(x, jax.core.Tracer) or not x.size or not getattr(x, "is_fully_addressable", True):
        return
    values = np.asarray(x)  # Inside jit, jax would trace the minimum even of an array.
    low = float(values.min())
    high = float(values.max())
    if 0 <= low < high:
        warnings.warn(
            f"{name} is in [{low:.3g}, {high:.3g}], and images are meant to be in [-1, 1]; use "
            "2 * x - 1 for images in [0, 1], x / 127.5 - 1 for levels up to 255",
            stacklevel=4,
        )


def grid(images: np.ndarray, columns: int | None = None, size: int = 48) -> np.ndarray:
    """One image [H',W',1 or 3] of the uint8 images [N,H,W,C], in rows of `columns`.

    The default makes the grid nearly square. Small images are enlarged by a whole factor to at
    least `size` pixels. If C is neither 1 nor 3, the channels of an image are shown side by side in
    grey.
    """
    if images.shape[-1] not in (1, 3):
        images = np.concatenate([images[..., c : c + 1] for c in range(images.shape[-1])], axis=2)
    n, height, width, channels = images.shape
    factor = max(1, math.ceil(size / min(height, width)))
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    gap = max(2, factor // 2)
    cells = np.full(
        (rows * columns, height * factor + gap, width * factor + gap, channels), 255, np.uint8
    )
    cells[:n, : height * factor, : width * factor] = images.repeat(factor, axis=1).repeat(
        factor, axis=2
    )
    cells = cells.reshape(rows, columns, *cells.shape[1:]).swapaxes(1, 2)
    picture = cells.reshape(rows * cells.shape[1], columns * cells.shape[3], channels)
    return np.pad(picture, ((gap, 0), (gap, 0), (0, 0)), constant_values=255)


def is_png_of(content: bytes, image_shape: tuple[int, int, int]) -> bool:
    """Whether `content` is a whole PNG file, as `png` makes it of an image [H,W,C]."""
    if not content.endswith(PNG_END):  # Pillow does not miss the end.
        return False
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.load()
            return (image.height, image.width, len(image.getbands())) == image_shape
    except MemoryError:
        raise
    except Exception:  # Pillow raises errors of many kinds.
        return False


def png(image: np.ndarray) -> bytes:
    """A PNG file of one uint8 image [H,W,1 or 3]."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
    return file.getvalue()
