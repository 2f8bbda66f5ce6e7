"""Where images come from: the embedded digits, an npz file, an array, a folder, or a data set of tfds."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ddpm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Source:
    """A list of images that is settled and will not change during a run."""

    names: list[str]
    """[N] what each image is called: its path in the folder, elsewhere its index."""
    read: Callable[[np.ndarray], np.ndarray]
    """Maps indices [B] to their images, uint8 [B,H,W,C]. Raises DataLost for one that cannot be read any more."""
    labels: np.ndarray | None
    """int32 [N], or None where there are none."""
    fingerprint: str
    """A hash of all images and labels (of a tfds set: see load_tfds), the same wherever the data lie."""
    streamed: bool = False
    """Whether images are decoded when they are read, instead of lying in memory."""
    beside: Path | None = None
    """The folder that the files lie in, where what is computed of them may be kept; None where there are none."""

    def __len__(self) -> int:
        return len(self.names)


def from_array(images: np.ndarray, image_shape: tuple[int, int, int], labels=None) -> Source:
    """A Source of `images` uint8 [N,H,W,C], or [N,H,W] for one channel, with `labels` [N] or None.

    Raises UserError for another dtype or shape, or no images.
    """
    images = np.asarray(images)
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4:
        raise UserError(
            f"data: uint8 images [N, H, W, C] are needed, got {images.dtype} {list(images.shape)}"
        )
    if not len(images):
        raise UserError("data: there is not one image")
    if images.shape[1:] != tuple(image_shape):
        shape = " ".join(map(str, images.shape[1:]))
        raise UserError(
            f"data: the images are {shape}, data.image_shape is {image_shape}; pass --data.image-shape {shape}"
        )
    digest = hashlib.blake2b(f"{images.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(images))
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
            raise UserError(
                f"data: labels must be {len(images)} integers, got {labels.dtype} {list(labels.shape)}"
            )
        labels = labels.astype(np.int32)
        digest.update(labels.tobytes())
    return Source(
        [str(i) for i in range(len(images))], images.__getitem__, labels, digest.hexdigest()
    )


def load_npz(path: Path, image_shape: tuple[int, int, int]) -> Source:
    """The Source of an npz file: `images` as `from_array` takes them, and `labels` if there are any.

    Raises UserError for a file that cannot be read or holds anything but plain arrays.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if "images" not in arrays.files:
                raise UserError(
                    f"data: {path} has no array `images`, only {', '.join(arrays.files) or 'nothing'}"
                )
            source = from_array(
                arrays["images"],
                image_shape,
                arrays["labels"] if "labels" in arrays.files else None,
            )
            return dataclasses.replace(source, beside=path.parent)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"data: cannot read {path}: {error.strerror or error}") from error
    except Exception as error:
        raise UserError(f"data: {path} is not an npz file of plain arrays") from error
