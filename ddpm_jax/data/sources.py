"""Sources of images: the built-in digits, an npz file, an array, a folder or a tfds data set."""

import dataclasses
import functools
import hashlib
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from ddpm_jax.data.arrays import check_images, check_labels, warn_of_levels
from ddpm_jax.data.faults import reason_of
from ddpm_jax.data.names import shown, some
from ddpm_jax.data.npz import BadArray, Npz
from ddpm_jax.errors import UserError, machine_remedy


@dataclasses.dataclass(frozen=True)
class Source:
    """A fixed list of images that does not change during a run."""

    names: list[str]
    """[N] the name of each image: its path in a folder, otherwise its index."""
    read: Callable[[np.ndarray], np.ndarray]
    """Maps indices [B] to their images, uint8 [B,H,W,C]. Raises DataLost if an image can no longer
    be read."""
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

    def __len__(self) -> int:
        return len(self.names)


def from_array(
    images: np.ndarray, image_shape: tuple[int, int, int], labels: ArrayLike | None = None
) -> Source:
    """A Source of `images` uint8 [N,H,W,C], or [N,H,W] for one channel, with `labels` [N] or None.

    Raises UserError for another dtype or shape, or if there are no images.
    """
    try:
        images = np.asarray(images)
    except ValueError as error:  # A list of images of several sizes.
        raise UserError(
            f"data: images must be uint8 [N, H, W, C], all of one size ({error}); resize them"
        ) from error
    check_images(images.shape, images.dtype, image_shape)
    images = images.reshape(len(images), *image_shape)
    warn_of_levels(images)
    digest = hashlib.blake2b(f"{images.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(images))
    if labels is not None:
        labels = check_labels(labels, len(images))
        digest.update(labels.tobytes())
    names = [str(i) for i in range(len(images))]
    marks = functools.partial(_marks, images, labels)
    return Source(names, images.__getitem__, labels, digest.hexdigest(), marks=marks)


def _marks(images: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    starts = np.zeros(len(images), np.int32) if labels is None else labels
    marks = (
        zlib.crc32(np.ascontiguousarray(image), int(start) % 2**32)
        for image, start in zip(images, starts, strict=True)
    )
    return np.fromiter(marks, np.uint32, len(images))


def load_npz(path: Path, image_shape: tuple[int, int, int]) -> Source:
    """The Source of an npz file: `images` as `from_array` takes them, and `labels` if present.

    Sizes are checked before memory is taken. Raises UserError if the file cannot be read or holds
    anything but plain arrays.
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
            check_images(header.shape, header.dtype, image_shape)
            labels = arrays.read("labels") if "labels" in arrays.names else None
            source = from_array(arrays.read("images"), image_shape, labels)
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
