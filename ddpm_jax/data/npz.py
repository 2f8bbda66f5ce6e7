"""Reads npz files: nothing is unpickled, and no memory is taken before the sizes are checked."""

import contextlib
import io
import math
import os
import stat
import zipfile
from collections.abc import Iterator
from typing import IO, NamedTuple

import numpy as np

from ddpm_jax.data.faults import IS_POINTER, LFS_POINTER, is_of_machine, reason_of
from ddpm_jax.data.names import shown

MAX_HEADER = 1000
"""Bytes of an array's header: plain arrays have about 100, and a long one could nest deeply."""

MAX_RATIO = 1032
"""Deflate makes at most this many bytes of one."""

PREFIX = b"\x93NUMPY"


class BadArray(ValueError):
    """A file is not an npz file of plain arrays; the message is the reason, on one line."""


class Header(NamedTuple):
    """The header of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


class Npz:
    """The arrays of an npz file; a context manager. Raises BadArray, or OSError of the disk."""

    def __init__(self, file: str | os.PathLike | IO[bytes]):
        _check_kind(file)
        with explaining():
            self._zip = zipfile.ZipFile(file)
        self._members = {
            info.filename.removesuffix(".npy"): info
            for info in self._zip.infolist()
            if info.filename.endswith(".npy")
        }
        self.names = list(self._members)

    def __enter__(self) -> "Npz":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._zip.close()

    def header(self, name: str) -> Header:
        """The shape and dtype of the array `name`, which the file is long enough to hold."""
        if name not in self._members:
            raise BadArray(f"it has no array {name}")
        info = self._members[name]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise BadArray(f"{shown(name)}: it is not compressed as numpy.savez does")
        with explaining(name), self._zip.open(info) as member:
            start, header, _ = read_header(member)
            ratio = 1 if info.compress_type == zipfile.ZIP_STORED else MAX_RATIO
            most = min(info.file_size, ratio * info.compress_size)
            if start + header.size > most or info.compress_size > self._length():
                raise BadArray(f"the file is too short for {header.dtype} {list(header.shape)}")
            if start + header.size < info.file_size:  # NumPy writes nothing behind an array.
                raise BadArray(f"the file is too long for {header.dtype} {list(header.shape)}")
            check_memory(header)
        return header

    def read(self, name: str) -> np.ndarray:
        """The array `name`."""
        self.header(name)
        with explaining(name), self._zip.open(self._members[name]) as member:
            return np.lib.format.read_array(member, allow_pickle=False)

    def blocks(self, name: str, size: int) -> Iterator[np.ndarray]:
        """Blocks of rows of the array `name`, of about `size` bytes, in order.

        Whether the bytes are those that were written is known after the last block alone.
        """
        self.header(name)
        with explaining(name), self._zip.open(self._members[name]) as member:
            _, header, is_fortran = read_header(member)
            if is_fortran or not header.shape:
                raise BadArray("it does not lie row by row")
            count, *shape = header.shape
            row = math.prod(shape) * header.dtype.itemsize
            most = max(1, size // max(1, row))
            for start in range(0, count, most):
                content = member.read(min(most, count - start) * row)
                yield np.frombuffer(content, header.dtype).reshape(-1, *shape)
            member.read(1)  # At the end zipfile compares its checksum.

    def _length(self) -> int:
        file = self._zip.fp
        assert file is not None
        return file.seek(0, io.SEEK_END)


@contextlib.contextmanager
def explaining(name: str | None = None) -> Iterator[None]:
    """Turns what NumPy and zipfile raise for a damaged file, many kinds, into BadArray."""
    try:
        yield
    except Exception as error:
        if is_of_machine(error):
            raise
        reason = str(error) if isinstance(error, BadArray) else reason_of(error)
        raise BadArray(f"{shown(name)}: {reason}" if name else reason) from error


def _check_kind(file) -> None:
    """Raises BadArray for a single array, a git-lfs pointer, a folder or a pipe."""
    if hasattr(file, "read"):
        start = file.read(len(LFS_POINTER))
        file.seek(0)
    elif not stat.S_ISREG(os.stat(file).st_mode):  # Opening a pipe may never end.
        raise BadArray("it is not a regular file")
    else:
        with open(file, "rb") as opened:
            start = opened.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        raise BadArray(IS_POINTER)
    if start.startswith(PREFIX):
        raise BadArray("it holds a single array (npy), not arrays with names")


def read_header(member: IO[bytes]) -> tuple[int, Header, bool]:
    """(bytes before the array's own, its header, whether its axes are in Fortran's order).

    Raises BadArray for what is not the beginning of a plain array.
    """
    start = member.read(8)
    if start[:6] != PREFIX or start[6:] not in (b"\1\0", b"\2\0"):
        raise BadArray("it does not begin as a plain array does")
    width = 2 if start[6] == 1 else 4
    length = member.read(width)
    size = int.from_bytes(length, "little")
    if len(length) < width or size > MAX_HEADER:
        raise BadArray("its header is cut short or too long")
    text = io.BytesIO(length + member.read(size))
    read = np.lib.format.read_array_header_1_0
    if width == 4:
        read = np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(text)
    if dtype.hasobject:
        raise BadArray("it holds Python objects, which are not read")
    if min(shape, default=0) < 0:
        raise BadArray(f"its shape is {list(shape)}")
    return len(start) + width + size, Header(shape, dtype), is_fortran


def check_memory(header: Header) -> None:
    """Raises BadArray for an array that is larger than this machine's memory."""
    if header.size > _memory():
        raise BadArray(f"{header.size / 2**30:,.0f} GiB are more than this machine has")


def _memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
