"""Checks arrays of images and labels, and names what would make them right."""

import logging

import numpy as np
from numpy.typing import ArrayLike

from ddpm_jax.errors import UserError

log = logging.getLogger(__name__)

# The order of the axes elsewhere, and how NumPy makes [N, H, W, C] of it.
ORDERS = {
    "[N, C, H, W]": (0, 2, 3, 1),
    "[H, W, C, N]": (3, 0, 1, 2),
    "[C, H, W, N]": (3, 1, 2, 0),
}

MOST_CHANNELS = 4
"""Those of colours and transparency."""

LABELS = np.iinfo(np.int32)


def check_images(
    shape: tuple[int, ...], dtype: np.dtype, image_shape: tuple[int, int, int]
) -> None:
    """Raises UserError unless an array of `shape` and `dtype` holds images of `image_shape`."""
    if len(shape) == 3 and shape == tuple(image_shape) != (*shape[1:], 1):
        raise UserError(f"data: images are one image {list(shape)}; give x[None], [N, H, W, C]")
    if dtype != np.uint8 or len(shape) not in (3, 4):
        raise UserError(
            f"data: images must be uint8 [N, H, W, C], got {dtype} {list(shape)}; "
            f"{_conversion(shape, dtype)}"
        )
    of_one = (*shape[1:], 1)[:3]
    _check_order(shape, image_shape)
    if not shape[0]:
        raise UserError("data: no images found; at least one is needed")
    if of_one != tuple(image_shape):
        named = " ".join(map(str, of_one))
        raise UserError(
            f"data: the images are {named}, but data.image_shape is {image_shape}; "
            f"pass --data.image-shape {named}"
        )


def _conversion(shape: tuple[int, ...], dtype: np.dtype) -> str:
    """How to make uint8 [N, H, W, C] of such an array."""
    if len(shape) not in (3, 4):
        return "reshape them"
    if dtype.kind == "f":
        return (
            "convert them with (x * 255).round().astype('uint8') if they are in [0, 1], "
            "with ddpm_jax.to_uint8(x) if in [-1, 1]"
        )
    if dtype.kind == "b":
        return "convert them with x.astype('uint8') * 255"
    if dtype == np.uint16:
        return "convert them with (x >> 8).astype('uint8') if they go up to 65535"
    return "convert them with x.astype('uint8') if they are in [0, 255]"


def _check_order(shape: tuple[int, ...], image_shape: tuple[int, int, int]) -> None:
    """Raises UserError for images with the axes in the order of another library."""
    if len(shape) != 4:
        return
    fits = shape[1:] == tuple(image_shape)
    for order, axes in ORDERS.items():
        turned = tuple(shape[axis] for axis in axes)
        is_likely = turned[1:] == tuple(image_shape) or _are_images(shape, turned)
        if (not fits and is_likely) or _is_order(order, turned):
            remedy = f"give x.transpose{axes}, [N, H, W, C]"
            if turned[1:] != tuple(image_shape):
                remedy += f", and pass --data.image-shape {' '.join(map(str, turned[1:]))}"
            raise UserError(f"data: images are {order} {list(shape)}; {remedy}")


def _are_images(shape: tuple[int, ...], turned: tuple[int, ...]) -> bool:
    """Whether an array that has more channels than four would be of images as `turned`."""
    _, height, width, channels = turned
    return shape[3] > MOST_CHANNELS >= channels and min(height, width) > MOST_CHANNELS


def _is_order(order: str, turned: tuple[int, ...]) -> bool:
    """Whether only `order` makes images of the array; `turned` is its shape as [N, H, W, C].

    As [N, H, W, C] they would be one or three pixels high and have more channels than four.
    """
    _, height, width, channels = turned
    return order == "[N, C, H, W]" and channels in (1, 3) and min(height, width) > MOST_CHANNELS


def warn_of_levels(images: np.ndarray) -> None:
    """Warns of images that were scaled to [0, 1] before they became uint8, which is black."""
    if images.max() == 1:
        log.warning(
            "data: no image has a level above 1 of 255, so all look black; if they were in "
            "[0, 1], give (x * 255).round().astype('uint8')"
        )


def check_labels(labels: ArrayLike, images: int) -> np.ndarray:
    """`labels` as int32 [images]. Raises UserError unless they are so many integers that fit."""
    try:
        found = np.asarray(labels)
    except ValueError as error:  # Lists of several lengths.
        raise UserError(f"data: labels must be {images} integers ({error}); fix them") from error
    if found.shape != (images,) or found.dtype.kind not in "iu":
        raise UserError(
            f"data: labels must be {images} integers, one per image, "
            f"got {found.dtype} {list(found.shape)}; fix labels or leave it out"
        )
    wide = np.flatnonzero((found > LABELS.max) | (found < LABELS.min))
    if len(wide):
        raise UserError(
            f"data: label {found[wide[0]]} of image {wide[0]} does not fit 32 bits; number the "
            "classes from 0, for example with np.unique(labels, return_inverse=True)[1]"
        )
    return found.astype(np.int32)
