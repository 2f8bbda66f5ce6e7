"""Images that are arrays: one in a .npy or .npz file of its own."""

import io
import math

import numpy as np
from PIL import Image

from ddpm_jax.data.faults import IS_POINTER, LFS_POINTER, Undecodable, Unfit
from ddpm_jax.data.names import ending, shown, some
from ddpm_jax.data.npz import BadArray, Npz, explaining, read_header
from ddpm_jax.data.raw import Raw

NAME = "image"
"""The array of an .npz file that is the image, where it holds several."""

WHITES = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65_535}

ENDINGS = (".npy", ".npz")


def is_array(name: str) -> bool:
    """Whether a file's name says that it holds an array."""
    return ending(name) in ENDINGS or name.lower() in ENDINGS


def array_raw(file: bytes, name: str) -> Raw:
    """The array [H,W] or [H,W,C] of a file. Raises Undecodable if it holds nothing of the kind."""
    if file.startswith(LFS_POINTER):
        raise Undecodable(IS_POINTER)
    try:
        values = _of_npz(file) if name.lower().endswith(".npz") else _of_npy(file)
    except BadArray as error:
        raise Undecodable(str(error)) from error
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    values = values[..., None] if values.ndim == 2 else values
    return Raw(values, WHITES.get(values.dtype), picture=False)


def _of_npy(file: bytes) -> np.ndarray:
    with explaining():
        start, header, _ = read_header(io.BytesIO(file))
        if start + header.size != len(file):
            raise BadArray(f"its length is not that of {header.dtype} {list(header.shape)}")
    _check(header.shape, header.dtype)
    return np.lib.format.read_array(io.BytesIO(file), allow_pickle=False)


def _of_npz(file: bytes) -> np.ndarray:
    with Npz(io.BytesIO(file)) as arrays:
        name = arrays.names[0] if len(arrays.names) == 1 else NAME
        if name not in arrays.names:
            held = some([shown(each) for each in arrays.names]) or "nothing"
            raise BadArray(f"it holds {held}; name the array of the image {NAME}")
        header = arrays.header(name)
        _check(header.shape, header.dtype)
        return arrays.read(name)


def _check(shape: tuple[int, ...], dtype: np.dtype) -> None:
    if dtype.kind not in "buif" or dtype.itemsize > 8 or len(shape) not in (2, 3) or 0 in shape:
        raise BadArray(f"it is {dtype} {list(shape)}, not numbers [H, W] or [H, W, C]")
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and math.prod(shape) * dtype.itemsize > 8 * most:
        raise Unfit(f"is an array {list(shape)}, too large to read safely")


def npy(image: np.ndarray) -> bytes:
    """A .npy file of one image [H,W,C]."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(image), allow_pickle=False)
    return file.getvalue()


def is_npy_of(content: bytes, image_shape: tuple[int, int, int], dtype: np.dtype) -> bool:
    """Whether `content` is a whole .npy file of an image [H,W,C] of `dtype`."""
    try:
        with explaining():
            start, header, _ = read_header(io.BytesIO(content))
    except BadArray:
        return False
    wanted = (tuple(image_shape), np.dtype(dtype))
    return header == wanted and start + header.size == len(content)
