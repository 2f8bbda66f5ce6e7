"""Images of one npy file, which may be larger than the memory."""

import contextlib
import functools
import os
import stat
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ddpm_jax.config import Data
from ddpm_jax.data.arrays import check_conditions, check_images, check_labels, warn_of_levels
from ddpm_jax.data.faults import IS_POINTER, LFS_POINTER, reason_of
from ddpm_jax.data.names import shown
from ddpm_jax.data.npz import BadArray, Header, check_memory, explaining, read_header
from ddpm_jax.data.sources import Blocks, Source, end_of_digest, marks_of, start_of_digest
from ddpm_jax.errors import DataLost, UserError, machine_remedy

# These decide the order of an epoch, so they are the same on every machine.
BLOCK = 2**20
"""Bytes of a block at most, if not of one image: reading so many at a time is fast anywhere."""
MIXED = 2**25
"""Bytes of the blocks whose images are mixed at a time."""

KEPT = 2 * MIXED
"""Bytes of blocks that are kept: a batch may begin in one mixture and end in the next."""

PIECE = 2**23
"""Bytes that are read at a time at the start."""


class BadOrder(BadArray):
    """An array's axes are in Fortran's order."""


class Layout(NamedTuple):
    """Where the numbers of an array lie in its file."""

    path: Path
    start: int
    """Bytes before the first."""
    header: Header
    stamp: tuple[int, int, int]
    """Another one if the file was written since."""


def load_npy(path: Path, data: Data) -> Source:
    """The Source of an npy file [N,H,W,C], or [N,H,W] for one channel.

    Its labels [N] and conditions [N,D] may be in files beside it: of NAME.npy in NAME.labels.npy
    and NAME.conditions.npy. All of the file is read once for the fingerprint, which is that of the
    same arrays in an npz file. Up to data.cache_mb are kept in memory; from larger ones images are
    read when they are needed.

    Raises UserError if a file cannot be read, is damaged or does not hold such an array.
    """
    with _refusing(path):
        layout = _layout(path.absolute())
        header = layout.header
        check_images(header.shape, header.dtype, data.image_shape, data.value_kind)
    images = header._replace(shape=(header.shape[0], *data.image_shape))
    layout = layout._replace(header=images)
    labels = _beside(path, "labels", check_labels, images.shape[0])
    conditions = _beside(path, "conditions", check_conditions, images.shape[0])
    is_kept = images.size <= data.cache_mb * 2**20
    with _refusing(path):
        found = _read_all(layout, labels, conditions, is_kept)
    if data.value_kind.levels:
        warn_of_levels(found.highest, data.value_kind)
    blocks = blocks_of(images)
    reader = BlockReader(layout, blocks.images)
    return Source(
        [str(i) for i in range(images.shape[0])],
        reader if found.images is None else found.images.__getitem__,
        labels,
        found.fingerprint,
        streamed=not is_kept,
        beside=path.parent,
        marks=functools.partial(np.copy, found.marks),
        dtype=_native(images),
        conditions=conditions,
        blocks=blocks,
    )


def blocks_of(images: Header) -> Blocks:
    """How images of this shape and type are read."""
    size = images.size // images.shape[0]
    count = max(1, BLOCK // size)
    return Blocks(count, max(1, MIXED // (count * size)))


@contextlib.contextmanager
def _refusing(path: Path):
    """Turns what goes wrong with a file into UserError."""
    try:
        yield
    except BadOrder as error:
        raise UserError(f"data: {shown(path)}: {error}") from error
    except BadArray as error:
        raise UserError(
            f"data: {shown(path)} is not an npy file of a plain array ({error}); "
            "write it with numpy.save"
        ) from error
    except (OSError, MemoryError) as error:
        raise UserError(
            f"data: cannot read {shown(path)} ({reason_of(error)}); "
            f"{machine_remedy(error) or 'name another file'}"
        ) from error


def _layout(path: Path) -> Layout:
    """Looks at the file's beginning and length alone. Raises BadArray, or OSError of the disk."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # Opening a pipe may never end.
        raise BadArray("it is not a regular file")
    with open(path, "rb") as file, explaining():
        begins = file.read(len(LFS_POINTER))
        if begins == LFS_POINTER:
            raise BadArray(IS_POINTER)
        if begins.startswith(b"PK"):
            raise BadArray("it holds arrays with names; name it npz:PATH")
        file.seek(0)
        start, header, is_fortran = read_header(file)
        length = os.fstat(file.fileno()).st_size
        if start + header.size != length:
            what = "short" if start + header.size > length else "long"
            raise BadArray(f"the file is too {what} for {header.dtype} {list(header.shape)}")
        if is_fortran:
            raise BadOrder(
                "its axes are in Fortran's order, so the numbers of an image lie apart; write it "
                "again with numpy.save(file, numpy.ascontiguousarray(x))"
            )
        return Layout(path, start, header, _stamp(file))


def _stamp(file) -> tuple[int, int, int]:
    about = os.fstat(file.fileno())
    return about.st_size, about.st_mtime_ns, about.st_ino


def _native(header: Header) -> np.dtype:
    return header.dtype.newbyteorder("=")


def _beside(path: Path, name: str, check, images: int) -> np.ndarray | None:
    """The checked array in the file of this name beside `path`; None if it is missing."""
    file = path.with_name(f"{path.name.removesuffix('.npy')}.{name}.npy")
    if not file.exists():
        return None
    with _refusing(file):
        layout = _layout(file)
        check_memory(layout.header)
        if layout.header.dtype.kind not in "buif":
            raise BadArray(f"it holds {layout.header.dtype}, not numbers")
        array = np.empty(layout.header.shape, _native(layout.header))
        with open(file, "rb") as opened:
            _fill(opened, layout, layout.start, array)
    try:
        return check(array, images)
    except UserError as error:
        raise UserError(f"data: {shown(file)}: {str(error).removeprefix('data: ')}") from error


class _All(NamedTuple):
    """What the whole file says."""

    fingerprint: str
    marks: np.ndarray
    highest: int
    """The highest level; 0 for numbers that are none."""
    images: np.ndarray | None


def _read_all(
    layout: Layout,
    labels: np.ndarray | None,
    conditions: np.ndarray | None,
    is_kept: bool,
) -> _All:
    """Reads the file once, piece by piece; keeps its images if `is_kept`."""
    header = layout.header
    count, *image_shape = header.shape
    most = max(1, PIECE // (header.size // count))
    images = np.empty((count if is_kept else min(most, count), *image_shape), _native(header))
    digest = start_of_digest(header.shape, _native(header))
    marks = np.empty(count, np.uint32)
    highest = 0
    progress = tqdm(total=count, desc="reading images", unit="", disable=None, delay=2, leave=False)
    with progress, open(layout.path, "rb") as file:
        for first in range(0, count, most):
            some = slice(first, min(first + most, count))
            piece = images[some] if is_kept else images[: some.stop - first]
            _fill(file, layout, layout.start + first * piece[0].nbytes, piece)
            digest.update(piece)
            if piece.dtype.kind == "u":
                highest = max(highest, int(piece.max()))
            beside = [None if each is None else each[some] for each in (labels, conditions)]
            marks[some] = marks_of(piece, *beside)
            progress.update(len(piece))
        if _stamp(file) != layout.stamp:
            raise BadArray("it was written to while it was read")
    fingerprint = end_of_digest(digest, labels, conditions)
    return _All(fingerprint, marks, highest, images if is_kept else None)


def _fill(file, layout: Layout, start: int, array: np.ndarray) -> None:
    """Fills `array` with the file's numbers from byte `start`. Raises BadArray if it ends before.

    It is read and not mapped: pages of a mapped file count as this program's memory for as long as
    the machine has room for them.
    """
    file.seek(start)
    if file.readinto(array.reshape(-1).view(np.uint8)) < array.nbytes:
        raise BadArray("it is shorter than it was")
    if not layout.header.dtype.isnative:
        array.byteswap(inplace=True)


class BlockReader:
    """Reads images of an npy file by their index, as long as the file is that of the start.

    It reads whole blocks and keeps those of the last `KEPT` bytes, for any number of threads
    together. It can be sent to other processes, which keep blocks of their own.
    """

    def __init__(self, layout: Layout, images: int):
        """`images` make a block."""
        self.layout = layout
        self.images = images
        self._forget()

    @property
    def _most(self) -> int:
        header = self.layout.header
        return max(1, KEPT * header.shape[0] // (self.images * header.size))

    def _forget(self) -> None:
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"layout": self.layout, "images": self.images}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """The images `indices` [B]. Raises DataLost."""
        header = self.layout.header
        images = np.empty((len(indices), *header.shape[1:]), _native(header))
        block = np.asarray(indices) // self.images
        order = np.argsort(block, kind="stable")  # Each block is needed once, in the file's order.
        parts = np.split(order, np.flatnonzero(np.diff(block[order])) + 1) if len(order) else []
        with self._lock:
            for rows in parts:
                number = int(block[rows[0]])
                images[rows] = self._block(number)[indices[rows] - number * self.images]
        return images

    def _block(self, number: int) -> np.ndarray:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        block = self._read(number)
        if self.images > 1:  # A single image is not read again before the next epoch.
            self._kept[number] = block
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return block

    def _read(self, number: int) -> np.ndarray:
        header = self.layout.header
        first = number * self.images
        shape = (min(self.images, header.shape[0] - first), *header.shape[1:])
        try:
            block = np.empty(shape, _native(header))
            with open(self.layout.path, "rb") as file:
                if _stamp(file) != self.layout.stamp:
                    raise BadArray("it was written to since the start")
                _fill(file, self.layout, self.layout.start + first * block[0].nbytes, block)
            return block
        except (BadArray, OSError, MemoryError) as error:
            reason = str(error) if isinstance(error, BadArray) else reason_of(error)
            raise DataLost(
                f"data: {shown(self.layout.path)} can no longer be read ({reason}); "
                f"{machine_remedy(error) or 'restore it'}, then run the same command again"
            ) from error
