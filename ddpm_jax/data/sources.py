"""Sources of images: the built-in digits, an npz file, an array, a folder or a tfds data set."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from ddpm_jax.errors import UserError


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

    def __len__(self) -> int:
        return len(self.names)


def from_array(
    images: np.ndarray, image_shape: tuple[int, int, int], labels: ArrayLike | None = None
) -> Source:
    """A Source of `images` uint8 [N,H,W,C], or [N,H,W] for one channel, with `labels` [N] or None.

    Raises UserError for another dtype or shape, or if there are no images.
    """
    images = np.asarray(images)
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4:
        raise UserError(
            f"data: images must be uint8 [N, H, W, C], got {images.dtype} {list(images.shape)}; "
            "convert them"
        )
    if not len(images):
        raise UserError("data: no images found; at least one is needed")
    if images.shape[1:] != tuple(image_shape):
        shape = " ".join(map(str, images.shape[1:]))
        raise UserError(
            f"data: the images are {shape}, but data.image_shape is {image_shape}; "
            f"pass --data.image-shape {shape}"
        )
    digest = hashlib.blake2b(f"{images.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(images))
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
            raise UserError(
                f"data: labels must be {len(images)} integers, one per image, "
                f"got {labels.dtype} {list(labels.shape)}; fix labels or leave it out"
            )
        labels = labels.astype(np.int32)
        digest.update(labels.tobytes())
    names = [str(i) for i in range(len(images))]
    return Source(names, images.__getitem__, labels, digest.hexdigest())


def load_npz(path: Path, image_shape: tuple[int, int, int]) -> Source:
    """The Source of an npz file: `images` as `from_array` takes them, and `labels` if present.

    Raises UserError if the file cannot be read or holds anything but plain arrays.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if "images" not in arrays.files:
                found = ", ".join(arrays.files) or "nothing"
                raise UserError(
                    f"data: {path} has no array named images, only {found}; "
                    "save the images under that name"
                )
            labels = arrays["labels"] if "labels" in arrays.files else None
            source = from_array(arrays["images"], image_shape, labels)
            return dataclasses.replace(source, beside=path.parent)
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"data: cannot read {path} ({error.strerror or error}); name another file"
        ) from error
    except Exception as error:  # A damaged zip or a pickle raises errors of many kinds.
        raise UserError(
            f"data: {path} is not an npz file of plain arrays; write it with numpy.savez"
        ) from error
