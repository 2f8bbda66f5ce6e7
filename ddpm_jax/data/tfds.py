"""Data sets of tensorflow_datasets (tfds): prepared once with TensorFlow, then read without it."""

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
from ddpm_jax.data.decode import WithLimits, check_channels, decode
from ddpm_jax.data.faults import kind_and_words
from ddpm_jax.data.names import shown
from ddpm_jax.data.npz import BadArray, Npz
from ddpm_jax.data.sources import Source
from ddpm_jax.errors import DataLost, UserError, machine_remedy

log = logging.getLogger(__name__)


def load_tfds(name: str, data: Data, test: bool = False) -> Source:
    """The split `train` of the data set `name`, NAME[/CONFIG], or its test split if `test`.

    The test split is `test`, or `validation` if there is no `test`. A data set that is not yet in
    data.dir is prepared first, which needs TensorFlow. One of at most data.cache_mb is decoded once
    and its pixels saved beside the prepared files; it has labels if each is a single integer. A
    larger one is decoded as it is read and has no labels.

    The fingerprint covers the name, config and version of the data set, the split, its size,
    `data.image_shape`, and the pixels and labels of 64 images.

    Raises UserError for a data set that is unknown, cannot be prepared or has no images.
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
    return Source(
        names,
        images.__getitem__,
        labels,
        fingerprint,
        beside=builder.data_path,
        class_names=_class_names(builder, labels),
    )


def _builder(name: str, data: Data):
    try:
        return tfds.builder(name, data_dir=data.dir and os.path.expanduser(data.dir))
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        raise UserError(f"data: tfds has no data set {name!r}; {_near(name, known)}") from None
    # ValueError for an unknown config, AssertionError for a version; a data set's own code may
    # raise anything.
    except Exception as error:
        raise UserError(_refusal(name, data, error)) from error


def _refusal(name: str, data: Data, error: Exception) -> str:
    """Why tfds cannot give the data set `name`, which raised `error`."""
    set_name, _, config = name.partition("/")
    try:
        known = tfds.builder_cls(set_name.partition(":")[0]).builder_configs
    except tfds.core.DatasetNotFoundError:  # It was found as a prepared folder alone.
        place = shown(data.dir or "the folder of the tfds data sets")
        return (
            f"data: tfds:{name} cannot be read in {place} ({kind_and_words(error)}); restore its "
            "prepared folder, or delete that to prepare it again"
        )
    if config and config.partition(":")[0] not in known:
        return f"data: tfds:{set_name} has no config {config!r}; {_near(config, known)}"
    return f"data: tfds:{name} cannot be used ({kind_and_words(error)}); check its name and version"


def _near(word: str, known) -> str:
    similar = difflib.get_close_matches(word, known, n=5)
    if similar:
        return f"did you mean {', '.join(similar)}?"
    return f"choose one of {', '.join(sorted(known)[:40])}"


def _prepare(builder, name: str, data: Data) -> None:
    """Writes array_record files, which can be read in any order.

    The original files are downloaded or taken from data.manual_dir.
    """
    try:
        import tensorflow
    except ImportError as error:
        raise UserError(
            f"data: tfds:{name} is not prepared in {builder.data_path}; "
            "install TensorFlow to prepare it: pip install 'ddpm-jax[tfds-prepare]'"
        ) from error
    # TensorFlow would take all of the GPU's memory from JAX, and a CPU is enough here.
    tensorflow.config.set_visible_devices([], "GPU")
    log.info("data: preparing tfds:%s in %s; later runs reuse it", name, builder.data_path)
    # Each data set has a folder of its own, since those that share one get each other's files.
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
    except Exception as error:  # The data set's own code may raise anything.
        by_hand = " ".join((builder.MANUAL_DOWNLOAD_INSTRUCTIONS or "").split())
        remedy = "check the files in --data.manual-dir"
        if by_hand or not manual:
            remedy = "set --data.manual-dir to a folder with its original files"
        if by_hand:
            remedy += f", which you download yourself: {by_hand:.120}"
        raise UserError(
            f"data: tfds:{name} cannot be prepared ({kind_and_words(error)}); {remedy}"
        ) from error


def _split(builder, name: str, test: bool) -> str:
    wanted = ("test", "validation") if test else ("train",)
    there = builder.info.splits
    for split in wanted:
        if split in there and there[split].num_examples:
            return split
    raise UserError(
        f"data: tfds:{name} has no images in split {' or '.join(wanted)} "
        f"(its splits: {', '.join(there) or 'none'}); choose another data set"
    )


def _has_labels(builder, name: str) -> bool:
    """Whether each image has a single integer as label. Raises UserError if there are no images."""
    features = builder.info.features
    features = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    image = features.get("image")
    label = features.get("label")
    # Images of other types (float, for example) are not stored as grey values or colours.
    if not isinstance(image, tfds.features.Image) or image.np_dtype not in (np.uint8, np.uint16):
        raise UserError(
            f"data: tfds:{name} has no feature `image` with 8- or 16-bit pixels "
            f"(its features: {', '.join(features)}); choose another data set"
        )
    return label is not None and label.shape == () and np.issubdtype(label.np_dtype, np.integer)


def _class_names(builder, labels: np.ndarray | None) -> tuple[str, ...] | None:
    """The names that the data set gives its labels; None if it does not name each of them."""
    if labels is None:
        return None
    feature = builder.info.features["label"]
    if not isinstance(feature, tfds.features.ClassLabel) or not feature.num_classes:
        return None
    return tuple(feature.names) if labels.max() < feature.num_classes else None


@dataclasses.dataclass(frozen=True)
class _Reader(WithLimits):
    """Reads images of a prepared split. It can be sent to other processes."""

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
        except Exception as error:  # From the disk, tfds or Pillow, without a common base class.
            remedy = machine_remedy(error) or (
                "restore it, or delete that folder to prepare it again"
            )
            raise DataLost(
                f"data: {self.title} in {self.folder} can no longer be read "
                f"({kind_and_words(error)}); {remedy}, then run the same command"
            ) from error
        if not self.labelled:
            return images, None
        labels = np.array([record["label"] for record in records])
        wide = labels[labels != labels.astype(np.int32)]
        if len(wide):
            raise UserError(
                f"data: {self.title} has the label {wide[0]}, which does not fit 32 bits; "
                "choose another data set"
            )
        return images, labels.astype(np.int32)

    def _decode(self, record, index):
        file = record["image"]
        ending = ".png" if file.startswith(b"\x89PNG") else ".jpg"  # tfds writes one of the two.
        return decode(file, self.image_shape, f"image {index} of {self.title}", ending)


@functools.cache
def _open(folder: str, split: str):
    """The records of a prepared split: a sequence of dicts, with images still encoded."""
    builder = tfds.builder_from_directory(folder)
    try:
        return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
        raise UserError(
            f"data: {folder} was prepared as {builder.info.file_format.value}, which only "
            "TensorFlow can read; set --data.dir to another folder to prepare it as array_record"
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
    """(images, labels or None) of the whole split, decoded once and then kept in a file.

    A damaged file is written again. If it cannot be written, the images are decoded on every start.
    """
    file = folder / f"ddpm_jax-{read.split}-{'x'.join(map(str, read.image_shape))}.npz"
    expected: dict[str, tuple[tuple[int, ...], type]]
    expected = {"images": ((count, *read.image_shape), np.uint8)}
    if read.labelled:
        expected["labels"] = ((count,), np.int32)
    kept = _load(file, fingerprint, expected)
    if kept is not None:
        return kept["images"], kept.get("labels")
    arrays: dict[str, np.ndarray]
    arrays = {name: np.empty(shape, dtype) for name, (shape, dtype) in expected.items()}
    arrays["fingerprint"] = np.array(fingerprint)
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
            "data: %s will be decoded again on the next start: %s cannot be written (%s)",
            read.title,
            file,
            error,
        )
    return arrays["images"], arrays.get("labels")


def _save(file: epath.Path, arrays: dict[str, np.ndarray]) -> None:
    # Not with files.write_file, which would need a second copy in memory.
    temporary = file.parent / f".{file.name}.{os.getpid()}"
    try:
        with temporary.open("wb") as opened:
            np.savez(opened, **arrays)  # type: ignore[arg-type] # an array for allow_pickle?
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _load(
    file: epath.Path, fingerprint: str, expected: dict[str, tuple[tuple[int, ...], type]]
) -> dict[str, np.ndarray] | None:
    """The arrays of the kept file, None if it is of other images or not as `expected`."""
    if not file.exists():
        return None
    try:
        with file.open("rb") as opened, Npz(opened) as arrays:
            if str(arrays.read("fingerprint")) != fingerprint:
                return None
            for name, (shape, dtype) in expected.items():
                if arrays.header(name) != (shape, dtype):
                    raise BadArray(f"{name} must be {np.dtype(dtype)} {list(shape)}")
            return {name: arrays.read(name) for name in expected}
    except (BadArray, OSError) as error:
        log.warning(
            "data: %s is damaged and will be written again (%s)", file, kind_and_words(error)
        )
    return None
