"""Data sets of the datasets library on this machine: saved ones, and files of parquet."""

import contextlib
import functools
import hashlib
import sys
import typing
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from ddpm_jax.config import Data
from ddpm_jax.config.choices import DataDtype
from ddpm_jax.data.arrays import check_conditions, check_images, check_labels
from ddpm_jax.data.decode import DECODING, WithLimits, check_channels, decode_file, read_dtype
from ddpm_jax.data.faults import Unfit, kind_and_words, reason_of
from ddpm_jax.data.formats import is_tiff
from ddpm_jax.data.hf_place import Place, find
from ddpm_jax.data.names import shown, some
from ddpm_jax.data.sources import Source, end_of_digest, marks_of, start_of_digest
from ddpm_jax.errors import DataLost, UserError, machine_remedy

IMAGES = ("image", "images", "img", "pixel_values", "pixels")
"""The names of a column of images, where several columns could be."""
LABELS = ("label", "labels")
CONDITIONS = "conditions"

Map = typing.Callable[..., typing.Iterable]
"""The function map, or one that uses several threads."""

CASTS = {2: "Array2D", 3: "Array3D"}

PIECE = 2**23
"""Bytes of images that are read at a time at the start."""


def load_hf(path: str, data: Data, test: bool = False) -> Source:
    """The split `train` of a data set in the folder `path`, or with `test` its test split.

    Its images are a column of encoded files, which are decoded as those of folders, or of arrays
    [H,W,C] or [H,W]; its labels a column `label` or `labels` of integers, whose names are known if
    it is a ClassLabel; its conditions a column of that name. All of it is read once. Up to
    data.cache_mb are kept in memory, and otherwise read as they are needed. No code of the data set
    is run, and nothing is downloaded.

    Raises UserError for a data set that cannot be read or has no such columns.
    """
    place = find(path, test)
    _open.cache_clear()  # It may have been written anew.
    with _refusing(place):
        dataset = _open(place)
        if not len(dataset):
            raise UserError(f"data: {shown(place.title)} has no images; name another data set")
        column = _column(place, dataset, data)
        labels, class_names = _labels(place, dataset)
        conditions = _conditions(place, dataset)
    count = len(dataset)
    size = int(np.prod(data.image_shape)) * column.dtype.itemsize
    is_kept = count * size <= data.cache_mb * 2**20
    with _refusing(place):
        found = _read_all(column, count, size, is_kept)
    read = _Reader(column, found.marks) if found.images is None else found.images.__getitem__
    return Source(
        [str(i) for i in range(count)],
        read,
        labels,
        end_of_digest(found.digest, labels, conditions),
        streamed=not is_kept,
        beside=place.root.parent,
        marks=functools.partial(marks_of, found.marks[:, None], labels, conditions),
        class_names=class_names,
        dtype=column.dtype,
        conditions=conditions,
    )


@contextlib.contextmanager
def _refusing(place: Place) -> Iterator[None]:
    """Turns what goes wrong with a data set into UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Of the disk, datasets or Arrow, without a common base class.
        raise UserError(
            f"data: {shown(place.title)} cannot be read ({_reason(error)}); "
            f"{machine_remedy(error) or 'restore it or name another data set'}"
        ) from error


def _reason(error: Exception) -> str:
    cause = error.__cause__
    return kind_and_words(cause if isinstance(cause, Exception) else error)


@functools.lru_cache(maxsize=4)
def _open(place: Place) -> datasets.Dataset:
    """The rows, which stay on the disk."""
    if place.saved is not None:
        dataset = datasets.Dataset.load_from_disk(str(place.saved), keep_in_memory=False)
    else:
        # Parquet cannot be read row by row: the library writes the rows once more, into its cache.
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        files = [_escaped(file) for file in place.parquet]
        dataset = datasets.Dataset.from_parquet(files, keep_in_memory=False)
    return dataset.with_format("arrow")


def _escaped(path: str) -> str:
    """`path` as the library's patterns name it."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in path)


class _Column(WithLimits):
    """The column of images. It can be sent to other processes."""

    def __init__(self, place: Place, name: str, data: Data, dtype: np.dtype, is_encoded: bool):
        self.place = place
        self.name = name
        self.image_shape = data.image_shape
        self.dtype = dtype
        self.is_encoded = is_encoded

    def contents(self, indices: np.ndarray) -> list[bytes] | np.ndarray:
        """The encoded files of rows [B], or their numbers [B,H,W,C]."""
        column = _rows(_open(self.place), self.name, indices)
        if self.is_encoded:
            return [self._file(*each) for each in zip(column.to_pylist(), indices, strict=True)]
        numbers = _numbers(column, self.image_shape, f"the images in column {shown(self.name)}")
        return numbers.reshape(len(indices), *self.image_shape)

    def pixels(
        self, contents: list[bytes] | np.ndarray, indices: np.ndarray, decode_all: Map = map
    ) -> np.ndarray:
        """The images [B,H,W,C] of what `contents` gives. Raises UserError naming one's row."""
        if isinstance(contents, np.ndarray):
            return contents
        return np.stack(list(decode_all(self._decode, contents, indices)))

    def _file(self, row, index) -> bytes:
        """The bytes of an encoded file, which a row holds itself or as a path on this machine."""
        if isinstance(row, bytes):
            return row
        row = row or {}
        file, path = row.get("bytes"), row.get("path")
        if file is not None:
            return file
        if not path or "://" in path:
            raise UserError(f"data: {self._of(index)} is not there; remove the row")
        return Path(path).read_bytes()

    def _decode(self, file: bytes, index) -> np.ndarray:
        ending = ".png" if file.startswith(b"\x89PNG") else ".jpg"
        try:
            return decode_file(file, self.image_shape, ending, self.dtype).pixels
        except Unfit as error:
            raise UserError(
                f"data: {self._of(index)} {error}; remove it or {error.remedy}"
            ) from error
        except (OSError, MemoryError) as error:
            if machine_remedy(error):
                raise
            raise UserError(self._undecodable(index, error)) from error
        except Exception as error:  # Pillow raises many kinds, without a common base class.
            raise UserError(self._undecodable(index, error)) from error

    def _undecodable(self, index, error: Exception) -> str:
        return f"data: {self._of(index)} cannot be decoded ({reason_of(error)}); remove the row"

    def _of(self, index) -> str:
        return f"image {index} of {shown(self.place.title)}"


def _rows(dataset: datasets.Dataset, name: str, indices) -> pa.Array:
    """A column of some rows, whose inner lengths are checked, since they come from a file."""
    table = dataset.select_columns([name])[indices if isinstance(indices, slice) else [*indices]]
    column = table.column(0).combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # Arrow does not join those of some types.
        column = pa.concat_arrays([_stored(chunk) for chunk in column.chunks])
    column = _stored(column)
    column.validate(full=True)
    return column


def _stored(column: pa.Array) -> pa.Array:
    return column.storage if isinstance(column, pa.ExtensionArray) else column


def _is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _axes(kind: pa.DataType) -> tuple[int, pa.DataType]:
    """(how many lists are inside each other, what they hold)."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    axes = 0
    while _is_list(kind):
        axes += 1
        kind = kind.value_type
    return axes, kind


def _numbers(column: pa.Array, shape: tuple[int, ...], what: str) -> np.ndarray:
    """The numbers [B, ...] of a column of lists, of which all have `shape`."""
    axes, _ = _axes(column.type)
    for size in shape[:axes]:
        lengths = pc.list_value_length(column)
        if column.null_count or not pc.all(pc.equal(lengths, size)).as_py():
            raise UserError(f"data: {what} are not all {list(shape)}; remove the others")
        column = column.flatten()
    if column.null_count:
        raise UserError(f"data: {what} lack some numbers (null); remove those rows")
    return column.to_numpy(zero_copy_only=False)


def _shape_of_first(dataset: datasets.Dataset, name: str) -> tuple[int, ...]:
    column = _rows(dataset, name, [0])
    shape: list[int] = []
    while _is_list(column.type):
        shape.append(int(pc.list_value_length(column)[0].as_py() or 0))
        column = column.flatten()
    return tuple(shape)


def _column(place: Place, dataset: datasets.Dataset, data: Data) -> _Column:
    """The column of images. Raises UserError if none, or more than one, could be it."""
    kinds = {field.name: field.type for field in dataset.data.schema}
    found = [name for name in kinds if _is_image(dataset.features[name], kinds[name])]
    found = [name for name in found if name not in (*LABELS, CONDITIONS)]
    named = [name for name in IMAGES if name in found][:1]
    if len(found) != 1 and not named:
        there = some([shown(name) for name in found or kinds])
        raise UserError(
            f"data: {shown(place.title)} has {'several columns' if found else 'no column'} of "
            f"images (its columns: {there}); rename the column to image, of files or of arrays "
            "[H, W, C]"
        )
    name = (named or found)[0]
    axes, leaf = _axes(kinds[name])
    if not axes:
        column = _Column(place, name, data, read_dtype(data.value_kind), is_encoded=True)
        check_channels(data.image_shape, ["x.tif"] * is_tiff(column.contents(np.arange(1))[0]))
        return column
    dtype = np.dtype(leaf.to_pandas_dtype())
    shape = _shape_of_first(dataset, name)
    if dtype.name not in typing.get_args(DataDtype):  # As Python's own lists of numbers become.
        raise UserError(
            f"data: column {shown(name)} of {shown(place.title)} holds {dtype}; give it another "
            f"type, as dataset.cast_column({name!r}, datasets.{CASTS[axes]}({shape}, 'uint8'))"
        )
    check_images((len(dataset), *shape), dtype, data.image_shape, data.value_kind)
    return _Column(place, name, data, dtype, is_encoded=False)


def _is_image(feature, kind: pa.DataType) -> bool:
    """Whether a column may hold images."""
    if isinstance(feature, datasets.Image) or pa.types.is_binary(kind):
        return True
    if pa.types.is_struct(kind):  # Not Audio or Video, which look the same to Arrow.
        return isinstance(feature, dict) and "bytes" in feature
    axes, leaf = _axes(kind)
    is_number = pa.types.is_integer(leaf) or pa.types.is_floating(leaf) or pa.types.is_boolean(leaf)
    return axes in (2, 3) and is_number


def _labels(
    place: Place, dataset: datasets.Dataset
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """(labels, names of the classes), each None if there are none."""
    name = next((name for name in LABELS if name in dataset.features), None)
    if name is None:
        return None, None
    feature = dataset.features[name]
    column = _rows(dataset, name, slice(None))
    if not pa.types.is_integer(column.type) or column.null_count:
        what = "lacks some" if column.null_count else f"holds {column.type}"
        raise UserError(
            f"data: column {name} of {shown(place.title)} {what}, and labels are integers; use "
            f"dataset.class_encode_column({name!r}), or remove the column"
        )
    labels = check_labels(column.to_numpy(zero_copy_only=False), len(column))
    names = tuple(feature.names or ()) if isinstance(feature, datasets.ClassLabel) else ()
    return labels, names if labels.max() < len(names) else None


def _conditions(place: Place, dataset: datasets.Dataset) -> np.ndarray | None:
    if CONDITIONS not in dataset.features:
        return None
    shape = _shape_of_first(dataset, CONDITIONS)
    column = _rows(dataset, CONDITIONS, slice(None))
    numbers = _numbers(column, shape, f"the vectors in column {CONDITIONS}")
    return check_conditions(numbers.reshape(len(column), *shape), len(column))


class _All(NamedTuple):
    """What the whole data set says."""

    digest: hashlib.blake2b
    marks: np.ndarray
    images: np.ndarray | None


def _read_all(column: _Column, count: int, size: int, is_kept: bool) -> _All:
    """Reads every image once; keeps them if `is_kept`. `size` is that of an image in bytes."""
    shape = (count, *column.image_shape)
    images = np.empty(shape if is_kept else (0,), column.dtype)
    digest = start_of_digest(shape, column.dtype)
    if column.is_encoded:
        digest.update(f" files, decoding {DECODING}".encode())
    marks = np.empty(count, np.uint32)
    most = int(np.clip(PIECE // size, 16, 4096))
    progress = tqdm(total=count, desc="reading images", unit="", disable=None, delay=2, leave=False)
    with progress, ThreadPoolExecutor() as pool:
        for first in range(0, count, most):
            some_rows = np.arange(first, min(first + most, count))
            contents = column.contents(some_rows)
            pixels = column.pixels(contents, some_rows, pool.map)
            if is_kept:
                images[some_rows] = pixels
            for i, content in zip(some_rows, contents, strict=True):
                marks[i] = zlib.crc32(content)
                digest.update(_hashed(content) if column.is_encoded else content)
            progress.update(len(some_rows))
    return _All(digest, marks, images if is_kept else None)


def _hashed(file: bytes) -> bytes:
    return hashlib.blake2b(file, digest_size=16).digest()


class _Reader:
    """Reads images by their row, as long as they are those of the start."""

    def __init__(self, column: _Column, marks: np.ndarray):
        self.column = column
        self.marks = marks

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        if not len(indices):
            return np.empty((0, *self.column.image_shape), self.column.dtype)
        title = self.column.place.title
        try:
            contents = self.column.contents(indices)
            for i, content in zip(indices, contents, strict=True):
                if zlib.crc32(content) != self.marks[i]:
                    raise DataLost(
                        f"data: image {i} of {shown(title)} has changed since the start; restore "
                        "it, then run the same command again"
                    )
            return self.column.pixels(contents, indices)
        except DataLost:
            raise
        except Exception as error:  # Of the disk, datasets, Arrow or Pillow.
            raise DataLost(
                f"data: {shown(title)} can no longer be read ({_reason(error)}); "
                f"{machine_remedy(error) or 'restore it'}, then run the same command again"
            ) from error
