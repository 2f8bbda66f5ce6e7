"""Checks arrays of images and labels, and names what would make them right."""

import logging
import typing

import numpy as np
from numpy.typing import ArrayLike

from ddpm_jax.config.choices import DataDtype
from ddpm_jax.config.values import LEVELS, Values
from ddpm_jax.errors import UserError

log = logging.getLogger(__name__)

UINT8 = Values("uint8")

CONTINUOUS = "range LOW HIGH, quantiles LOW HIGH or standardise"
"""The values that take numbers of any kind."""

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
    shape: tuple[int, ...],
    dtype: np.dtype,
    image_shape: tuple[int, int, int],
    values: Values = UINT8,
) -> None:
    """Raises UserError unless an array of `shape` and `dtype` holds images of `image_shape`.

    `values` says which dtypes they may have, in either order of their bytes.
    """
    if len(shape) == 3 and shape == tuple(image_shape) != (*shape[1:], 1):
        raise UserError(f"data: images are one image {list(shape)}; give x[None], [N, H, W, C]")
    dtype = dtype.newbyteorder("=")
    if dtype.name not in dtypes_of(values) or len(shape) not in (3, 4):
        raise UserError(
            f"data: images must be {' or '.join(dtypes_of(values))} [N, H, W, C], got {dtype} "
            f"{list(shape)}; {_conversion(shape, dtype, values)}"
        )
    of_one = (*shape[1:], 1)[:3]
    _check_order(shape, image_shape, values)
    if not shape[0]:
        raise UserError("data: no images found; at least one is needed")
    if of_one != tuple(image_shape):
        named = " ".join(map(str, of_one))
        raise UserError(
            f"data: the images are {named}, but data.image_shape is {image_shape}; "
            f"pass --data.image-shape {named}"
        )


def check_kind(dtype: np.dtype, values: Values, place: str) -> None:
    """Raises UserError, which names `place`, unless images of `dtype` may be of such values."""
    if dtype.name not in dtypes_of(values):
        raise UserError(
            f"data: the images of {place} are {dtype}, but data.values is {values.kind}; pass "
            f"--data.values {_values_for(dtype)}"
        )


def dtypes_of(values: Values) -> tuple[str, ...]:
    """The names of the dtypes that images of such values may have."""
    return (values.kind,) if values.levels else typing.get_args(DataDtype)


def native(array: np.ndarray) -> np.ndarray:
    """`array` with the bytes of its numbers in this machine's order."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _conversion(shape: tuple[int, ...], dtype: np.dtype, values: Values) -> str:
    """How to make images of an array that is not taken as it is."""
    if len(shape) not in (3, 4):
        return "reshape them"
    if dtype.kind == "c":
        return "give the real and imaginary parts as channels"
    if dtype.kind not in "buif":
        return "give an array of numbers"
    if not values.levels:
        return "convert them with x.astype('float32')"
    conversion = f"convert them with {_to_levels(dtype, values)}"
    if dtype.name in typing.get_args(DataDtype):
        return f"{conversion}, or keep them with --data.values {_values_for(dtype)}"
    return f"{conversion}, or with x.astype('float32') for --data.values {CONTINUOUS}"


def _to_levels(dtype: np.dtype, values: Values) -> str:
    """How numbers of this dtype become levels."""
    most = (values.levels or 0) - 1
    kind = values.kind
    if dtype.kind == "f" and kind == "uint8":
        return (
            "(x * 255).round().astype('uint8') if they are in [0, 1], "
            "with ddpm_jax.to_uint8(x) if in [-1, 1]"
        )
    if dtype.kind == "f":
        return f"(x * {most}).round().astype('{kind}') if they are in [0, 1]"
    if dtype.kind == "b":
        return f"x.astype('{kind}') * {most}"
    if dtype == np.uint16:
        return "(x >> 8).astype('uint8') if they go up to 65535"
    if dtype == np.uint8:
        return "x.astype('uint16') * 257"
    return f"x.astype('{kind}') if they are in [0, {most}]"


def _values_for(dtype: np.dtype) -> str:
    """The choices of data.values that suit numbers of this dtype."""
    if dtype.kind == "b":
        return "range 0 1"
    return dtype.name if dtype.name in LEVELS else CONTINUOUS


def _check_order(shape: tuple[int, ...], image_shape: tuple[int, int, int], values: Values) -> None:
    """Raises UserError for images with the axes in the order of another library."""
    fits = shape[1:] == tuple(image_shape)
    # Pictures are hardly ever one or three pixels high; measurements may be, with many channels.
    if len(shape) != 4 or (fits and values.kind != "uint8"):
        return
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


def warn_of_levels(highest: int, values: Values) -> None:
    """Warns of images whose `highest` level is so low that all look black.

    They were scaled to [0, 1] before they became uint8, or are of a camera of 12 bits.
    """
    if values.kind == "uint8" and highest == 1:
        log.warning(
            "data: no image has a level above 1 of 255, so all look black; if they were in "
            "[0, 1], give (x * 255).round().astype('uint8')"
        )
    if values.kind == "uint16" and 0 < highest < 4096:
        log.warning(
            "data: no image has a level above %d of 65535, so all look black; if white is lower, "
            "pass --data.values range 0 %d",
            highest,
            max(255, 2 ** highest.bit_length() - 1),
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


def check_conditions(conditions: ArrayLike, images: int) -> np.ndarray:
    """`conditions` as float32 [images, D]. Raises UserError unless they are finite numbers."""
    try:
        found = np.asarray(conditions)
    except ValueError as error:  # Lists of several lengths.
        raise UserError(
            f"data: conditions must be {images} vectors of one length ({error}); fix them"
        ) from error
    if found.dtype.kind not in "buif" or found.ndim != 2 or len(found) != images or not found.size:
        remedy = "fix conditions or leave them out"
        if found.shape == (images,):
            remedy = "give conditions[:, None]"
        raise UserError(
            f"data: conditions must be numbers [{images}, D], a vector per image, got "
            f"{found.dtype} {list(found.shape)}; {remedy}"
        )
    with np.errstate(over="ignore"):
        vectors = found.astype(np.float32)
    lost = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(lost):
        raise UserError(
            f"data: conditions of image {lost[0]}, and of {len(lost) - 1} more, are NaN, infinite "
            "or too large for float32; fix them"
        )
    return vectors
