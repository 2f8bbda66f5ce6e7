"""Sources of images: what all of them have, and those of arrays and npz files."""

import dataclasses
import functools
import hashlib
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ddpm_jax.config.values import Values
from ddpm_jax.data.arrays import (
    UINT8,
    check_conditions,
    check_images,
    check_labels,
    dtypes_of,
    native,
    warn_of_levels,
)
from ddpm_jax.data.faults import reason_of
from ddpm_jax.data.names import shown, some
from ddpm_jax.data.npz import BadArray, Npz
from ddpm_jax.errors import UserError, machine_remedy


class Blocks(NamedTuple):
    """How images lie in a file that is read in blocks of several."""

    images: int
    """How many make a block."""
    mixed: int
    """Of how many blocks an epoch mixes the images at a time."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A fixed list of images that does not change during a run."""

    names: list[str]
    """[N] the name of each image: its path in a folder, otherwise its index."""
    read: Callable[[np.ndarray], np.ndarray]
    """Maps indices [B] to their images [B,H,W,C] in the data's own numbers. Raises DataLost if an
    image can no longer be read."""
    labels: np.ndarray | None
    """int32 [N], or None if there are none."""
    fingerprint: str
    """A hash of all images and labels (for a tfds set, see load_tfds). It does not depend on where
    they are stored."""
    streamed: bool = False
    """Whether images are decoded when they are read. Otherwise all of them are in memory."""
    beside: Path | None = None
    """The folder that holds the image files, where results computed from them may be kept; None if
    there are no files."""
    marks: Callable[[], np.ndarray] | None = None
    """Gives 32 bits of a hash of each image, uint32 [N]; None if they are not known one by one."""
    former: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Fingerprints that older versions gave to the same files, and what has changed since."""
    units: str = ""
    """A hash of how images became the model's units; empty where they are as they were stored."""
    class_names: tuple[str, ...] | None = None
    """The name of label 0, 1, ...; None if that is not known."""
    dtype: np.dtype = np.dtype("uint8")  # noqa: RUF009 # A dtype does not change.
    """The type of the numbers that `read` gives."""
    conditions: np.ndarray | None = None
    """float32 [N,D], a vector that belongs to each image; None if there are none."""
    blocks: Blocks | None = None
    """How an epoch has to read the images, also where they are in memory; None for in any order."""

    remembered: bool = False
    """Whether some images were decoded and hashed by an earlier start."""

    def __len__(self) -> int:
        return len(self.names)


def from_array(
    images: np.ndarray,
    image_shape: tuple[int, int, int],
    labels: ArrayLike | None = None,
    *,
    values: Values = UINT8,
    conditions: ArrayLike | None = None,
) -> Source:
    """A Source of `images` [N,H,W,C], or [N,H,W] for one channel, with `labels` [N] or None.

    `values` says which dtypes they may have: uint8, uint16, or any for values without levels.
    `conditions` [N,D] are vectors that belong to the images.

    Raises UserError for another dtype or shape, or if there are no images.
    """
    try:
        images = np.asarray(images)
    except ValueError as error:  # A list of images of several sizes.
        raise UserError(
            f"data: images must be {dtypes_of(values)[0]} [N, H, W, C], all of one size ({error}); "
            "resize them"
        ) from error
    check_images(images.shape, images.dtype, image_shape, values)
    images = native(images).reshape(len(images), *image_shape)
    if values.levels:
        warn_of_levels(int(images.max()), values)
    if labels is not None:
        labels = check_labels(labels, len(images))
    if conditions is not None:
        conditions = check_conditions(conditions, len(images))
    digest = start_of_digest(images.shape, images.dtype)
    digest.update(np.ascontiguousarray(images))
    return Source(
        [str(i) for i in range(len(images))],
        images.__getitem__,
        labels,
        end_of_digest(digest, labels, conditions),
        marks=functools.partial(marks_of, images, labels, conditions),
        dtype=images.dtype,
        conditions=conditions,
    )


def start_of_digest(shape: tuple[int, ...], dtype: np.dtype) -> hashlib.blake2b:
    """What becomes the fingerprint of an array, before the bytes of its images."""
    kind = "" if dtype == np.uint8 else f" {dtype.name}"  # Older versions took uint8 alone.
    return hashlib.blake2b(f"{shape}{kind}".encode(), digest_size=16)


def end_of_digest(
    digest: hashlib.blake2b, labels: np.ndarray | None, conditions: np.ndarray | None
) -> str:
    """The fingerprint: `digest` has the images, and gets what stands beside them."""
    if labels is not None:
        digest.update(labels.tobytes())
    if conditions is not None:
        digest.update(f"conditions {conditions.shape}".encode())
        digest.update(conditions.tobytes())
    return digest.hexdigest()


def marks_of(
    images: np.ndarray,
    labels: np.ndarray | None,
    conditions: np.ndarray | None,
) -> np.ndarray:
    """32 bits of a hash of each image and of what stands beside it, uint32 [N]."""
    starts = np.zeros(len(images), np.int32) if labels is None else labels
    if conditions is not None:
        starts = marks_of(conditions, labels, None)
    marks = (
        zlib.crc32(np.ascontiguousarray(image), int(start) % 2**32)
        for image, start in zip(images, starts, strict=True)
    )
    return np.fromiter(marks, np.uint32, len(images))


def load_npz(path: Path, image_shape: tuple[int, int, int], values: Values = UINT8) -> Source:
    """The Source of an npz file: `images`, and `labels` and `conditions` if present.

    They are as `from_array` takes them. Sizes are checked before memory is taken. Raises UserError
    if the file cannot be read or holds anything but plain arrays.
    """
    try:
        with Npz(path) as arrays:
            if "images" not in arrays.names:
                found = some([shown(name) for name in arrays.names]) or "nothing"
                raise UserError(
                    f"data: {shown(path)} has no array named images, only {found}; "
                    "save the images under that name"
                )
            header = arrays.header("images")
            check_images(header.shape, header.dtype, image_shape, values)
            beside = {
                name: arrays.read(name) for name in ("labels", "conditions") if name in arrays.names
            }
            source = from_array(arrays.read("images"), image_shape, values=values, **beside)
            return dataclasses.replace(source, beside=path.parent)
    except BadArray as error:
        raise UserError(
            f"data: {shown(path)} is not an npz file of plain arrays ({error}); "
            "write it with numpy.savez"
        ) from error
    except (OSError, MemoryError) as error:
        raise UserError(
            f"data: cannot read {shown(path)} ({reason_of(error)}); "
            f"{machine_remedy(error) or 'name another file'}"
        ) from error
