"""Pictures inside the page, as small as they have to be."""

import base64
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from ddpm_jax.errors import UserError

MOST_PIXELS = 16_383
"""Of a side of a WebP picture."""

QUALITIES = (None, 85, 60, 35)
"""Of WebP, tried in this order; None is without losses."""

SIDE = 48
"""Pixels that a small image is shown large, at least, as in a run's samples.png."""

LIKELY = 40
"""Pictures become smaller by this factor at most without losses: it is not tried for more."""


class Picture(NamedTuple):
    """A picture in the page."""

    uri: str
    """data:..., with all its bytes."""
    width: int
    """Pixels, as it is meant to be shown."""
    height: int


class Pictures(NamedTuple):
    """Pictures that share a number of bytes."""

    each: list[Picture]
    words: str
    """What had to be done to make them small enough; empty for nothing."""


def fit(images: Sequence[np.ndarray], most: int, scale: int = 1) -> Pictures:
    """The uint8 `images` [H,W,1 or 3] as pictures of at most `most` bytes in all.

    WebP without losses if it can be, else with losses, else at half the size, and so on. They are
    shown `scale` times as large as they are. The text that the bytes become in the page is longer
    by a third.
    """
    for half in range(12):
        smaller = [_shrunk(image, 2**half) for image in images]
        if max((max(image.shape) for image in smaller), default=0) > MOST_PIXELS:
            continue
        hopeless = sum(image.size for image in smaller) > LIKELY * most
        for quality in QUALITIES[1:] if hopeless else QUALITIES:
            files = [_webp(image, quality) for image in smaller]
            if sum(map(len, files)) <= most:
                each = [
                    Picture(_uri(file), image.shape[1] * scale, image.shape[0] * scale)
                    for file, image in zip(files, images, strict=True)
                ]
                return Pictures(each, _words(half, quality))
    raise UserError(f"pictures: {len(images)} do not fit into {most} bytes; show fewer")


def tiles(images: np.ndarray, columns: int) -> np.ndarray:
    """One picture [H',W',1 or 3] of uint8 images [N,H,W,C] at their own size, in so many columns.

    A white line of one pixel is around each. If C is neither 1 nor 3, the channels of an image
    stand side by side in grey.
    """
    if images.shape[-1] not in (1, 3):
        images = np.concatenate(np.split(images, images.shape[-1], axis=-1), axis=2)
    missing = -len(images) % columns
    edges = ((0, missing), (0, 1), (0, 1), (0, 0))
    cells = np.pad(images, edges, constant_values=255)
    cells[len(images) :] = 255
    lines = [np.concatenate(list(line), axis=1) for line in np.split(cells, len(cells) // columns)]
    return np.pad(np.concatenate(lines), ((1, 0), (1, 0), (0, 0)), constant_values=255)


def scale_of(image_shape: tuple[int, int, int]) -> int:
    """How many times as large as it is an image [H,W,C] is shown."""
    return max(1, math.ceil(SIDE / min(image_shape[:2])))


def read(file: epath.Path) -> np.ndarray:
    """The picture in a PNG file as uint8 [H,W,1 or 3]. Raises UserError if it cannot be read."""
    try:
        with Image.open(io.BytesIO(file.read_bytes()), formats=["PNG"]) as image:
            pixels = np.asarray(image if image.mode == "L" else image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises errors of many kinds.
        raise UserError(f"{file}: cannot be read ({error}); draw it again") from error
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _webp(image: np.ndarray, quality: int | None) -> bytes:
    file = io.BytesIO()
    whole = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    options = {"lossless": True} if quality is None else {"quality": quality}
    whole.save(file, "WEBP", **options)
    return file.getvalue()


def _shrunk(image: np.ndarray, by: int) -> np.ndarray:
    if by == 1:
        return image
    whole = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    pixels = np.asarray(whole.reduce(by))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _uri(content: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(content).decode()}"


def _words(half: int, quality: int | None) -> str:
    size = f"at 1/{2**half} of their size" if half else ""
    loss = "compressed with losses" if quality else ""
    words = ", ".join(filter(None, [size, loss]))
    return f"Shown {words}, to keep this page small." if words else ""
