"""Data sets of tensorflow_datasets (tfds): prepared once with TensorFlow, read without it."""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import logging
import math
import os
import sys

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tqdm import tqdm

from ddpm_jax.config import Data
from ddpm_jax.data.decode import check_channels, decode
from ddpm_jax.data.sources import Source
from ddpm_jax.errors import DataLost, UserError

log = logging.getLogger(__name__)


def load_tfds(name: str, data: Data, test: bool = False) -> Source:
    """The split `train` of the set `name`, NAME[/CONFIG]; with `test` its `test`, or else `validation`.

    What is not prepared in data.dir is prepared first, which takes TensorFlow. A set of at most
    data.cache_mb is decoded once, kept beside the prepared files, and has labels where they are one
    integer each; a larger one is decoded as it is read and has none. The fingerprint covers the set's
    name, config and version, the split, its size, `data.image_shape`, and the pixels of 64 images with
    their labels. Raises UserError for a set that is unknown, cannot be prepared or has no images.
    """
    check_channels(data.image_shape)
    builder = _builder(name, data)
    if not builder.data_path.exists():
        _prepare(builder, name, data)
    split = _split(builder, name, test)
    read = _Reader(
        f"tfds:{name}", str(builder.data_path), split, data.image_shape, _has_labels(builder, name)
    )
    count = builder.info.splits[split].num_examples
    fingerprint = _fingerprint(builder, split, count, read)
    names = [str(i) for i in range(count)]
    if count * math.prod(data.image_shape) > data.cache_mb * 2**20:
        return Source(names, read, None, fingerprint, streamed=True, beside=builder.data_path)
    images, labels = _decoded(builder.data_path, read, count, fingerprint)
    return Source(names, images.__getitem__, labels, fingerprint, beside=builder.data_path)


def _builder(name: str, data: Data):
    try:
        return tfds.builder(name, data_dir=data.dir and os.path.expanduser(data.dir))
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        raise UserError(f"data: tfds has no set {name!r}{_near(name, known)}") from None
    except (
        Exception
    ) as error:  # An unknown config is a ValueError, an unknown version an AssertionError.
        set_name, _, config = name.partition("/")
        known = tfds.builder_cls(set_name.partition(":")[0]).builder_configs
        if config and config.partition(":")[0] not in known:
            raise UserError(
                f"data: tfds:{set_name} has no config {config!r}{_near(config, known)}"
            ) from error
        raise UserError(f"data: tfds:{name} cannot be used: {_one_line(error)}") from error


def _near(word: str, known) -> str:
    near = difflib.get_close_matches(word, known, n=5)
    return (
        f"; near it are {', '.join(near)}"
        if near
        else f"; there are {', '.join(sorted(known)[:40])}"
    )


def _prepare(builder, name: str, data: Data) -> None:
    """Downloads (or takes from data.manual_dir) and writes array_record files, which are read at random."""
    try:
        import tensorflow
    except ImportError as error:
        raise UserError(
            f"data: tfds:{name} is not prepared in {builder.data_path}; to do that, once, "
            "pip install 'ddpm-jax[tfds-prepare]', which is TensorFlow"
        ) from error
    # The CPU is enough here, and TensorFlow would take all of a GPU's memory from JAX.
    tensorflow.config.set_visible_devices([], "GPU")
    log.info("data: preparing tfds:%s in %s, once", name, builder.data_path)
    # A folder for each set: two that share one get each other's files.
    full_name = builder.info.full_name
    downloads = (
        builder.data_path.parents[full_name.count("/")] / "downloads" / full_name.replace("/", "_")
    )
    manual = data.manual_dir and os.path.expanduser(data.manual_dir)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare(
                download_dir=downloads,
                download_config=tfds.download.DownloadConfig(manual_dir=manual),
                file_format="array_record",
            )
    except Exception as error:  # Of the set's own code.
        by_hand = " ".join((builder.MANUAL_DOWNLOAD_INSTRUCTIONS or "").split())
        files = f", which you download: {by_hand:.120}" if by_hand else ""
        remedy = (
            f"; --data.manual-dir names a folder with its original files{files}"
            if by_hand or not manual
            else ""
        )
        raise UserError(
            f"data: tfds:{name} cannot be prepared: {_one_line(error)}{remedy}"
        ) from error


def _split(builder, name: str, test: bool) -> str:
    wanted, there = ("test", "validation") if test else ("train",), builder.info.splits
    for split in wanted:
        if split in there and there[split].num_examples:
            return split
    raise UserError(
        f"data: tfds:{name} has no split {' or '.join(wanted)}, only {', '.join(there) or 'none'}"
    )


def _has_labels(builder, name: str) -> bool:
    """Whether every image has a label that is one integer. Raises UserError if there are no images."""
    features = builder.info.features
    features = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    image, label = features.get("image"), features.get("label")
    # Images of other types are stored as files of something else than grey values or colours.
    if not isinstance(image, tfds.features.Image) or image.np_dtype not in (np.uint8, np.uint16):
        raise UserError(
            f"data: tfds:{name} has no feature `image` of bytes, only {', '.join(features)}"
        )
    return label is not None and label.shape == () and np.issubdtype(label.np_dtype, np.integer)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads images of a prepared split, from any process that it is sent to."""

    title: str
    folder: str
    split: str
    image_shape: tuple[int, int, int]
    labelled: bool

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        return self.read(indices)[0]

    def read(self, indices) -> tuple[np.ndarray, np.ndarray | None]:
        """(images uint8 [B,H,W,C], labels int32 [B] or None). Raises DataLost."""
        try:
            records = _open(self.folder, self.split).__getitems__([int(i) for i in indices])
            images = np.stack([self._decode(*each) for each in zip(records, indices, strict=True)])
        except UserError:
            raise
        except Exception as error:
            raise DataLost(
                f"data: {self.title} in {self.folder} cannot be read now: {_one_line(error)}; "
                "put it back, or delete that folder to prepare it again, and run the same command again"
            ) from error
        return images, np.array(
            [record["label"] for record in records], np.int32
        ) if self.labelled else None

    def _decode(self, record, index):
        file = record["image"]
        ending = ".png" if file.startswith(b"\x89PNG") else ".jpg"  # What tfds writes.
        return decode(file, self.image_shape, f"image {index} of {self.title}", ending)


@functools.cache
def _open(folder: str, split: str):
    """The records of a prepared split, a sequence of dicts, the images in them still encoded."""
    builder = tfds.builder_from_directory(folder)
    try:
        return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
        raise UserError(
            f"data: {folder} was prepared as {builder.info.file_format.value}, which TensorFlow alone reads; "
            "name another folder with --data.dir, where it is prepared as array_record"
        ) from error


def _fingerprint(builder, split: str, count: int, read: _Reader) -> str:
    images, labels = read.read(np.unique(np.linspace(0, count - 1, 64).astype(int)))
    digest = hashlib.blake2b(
        f"{builder.info.full_name} {split} {count} {images.shape}".encode(), digest_size=16
    )
    digest.update(images)
    digest.update(b"" if labels is None else labels)
    return digest.hexdigest()


def _decoded(folder: epath.Path, read: _Reader, count: int, fingerprint: str):
    """(images, labels or None) of the whole split: from the file that an earlier start left, or decoded and left there.

    A file that is damaged is made anew, and one that cannot be written is done without.
    """
    file = folder / f"ddpm_jax-{read.split}-{'x'.join(map(str, read.image_shape))}.npz"
    kept = _load(file, fingerprint)
    if kept is not None:
        return kept["images"], kept.get("labels")
    arrays = {
        "fingerprint": np.array(fingerprint),
        "images": np.empty((count, *read.image_shape), np.uint8),
    }
    if read.labelled:
        arrays["labels"] = np.empty(count, np.int32)
    for start in tqdm(
        range(0, count, 1024), desc=f"decoding {read.title}", disable=None, delay=2, leave=False
    ):
        some = np.arange(start, min(start + 1024, count))
        images, labels = read.read(some)
        arrays["images"][some] = images
        if read.labelled:
            arrays["labels"][some] = labels
    try:
        _save(file, arrays)
    except OSError as error:
        log.info(
            "data: %s is decoded at every start: it cannot be kept in %s (%s)",
            read.title,
            file,
            error,
        )
    return arrays["images"], arrays.get("labels")


def _save(file: epath.Path, arrays: dict[str, np.ndarray]) -> None:
    # Not files.write_file: that would hold all of it a second time.
    temporary = file.parent / f".{file.name}.{os.getpid()}"
    try:
        with temporary.open("wb") as opened:
            np.savez(opened, **arrays)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _load(file: epath.Path, fingerprint: str) -> dict[str, np.ndarray] | None:
    if not file.exists():
        return None
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            if str(arrays["fingerprint"]) == fingerprint:
                return {name: arrays[name] for name in arrays.files}
    except Exception as error:
        log.warning("data: %s is damaged and made anew (%s)", file, _one_line(error))
    return None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
