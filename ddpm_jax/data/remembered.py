"""Keeps what was decoded and hashed of a folder in the user's cache, for the next start.

An image is taken from there only where its file has the size, times and inode that it had, and
where settings and decoder are the same. Nothing is lost with these files: delete them at any time.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, features

from ddpm_jax.data.faults import reason_of
from ddpm_jax.data.image_file import Digest, fingerprint
from ddpm_jax.data.names import name_bytes
from ddpm_jax.data.npz import BadArray, Npz
from ddpm_jax.devices.runtime import user_cache

log = logging.getLogger(__name__)

SETTLED = 2 * 10**9
"""Nanoseconds for which a file must have been left alone. A second change within the same tick of
its file system's clock would not show, and FAT's ticks are of two seconds."""

SLOW = 1.0
"""Seconds of decoding that are worth remembering."""

FEW = 0.01
"""The share of the images that is rather decoded at every start than all of them written again."""

BLOCK = 2**22
"""Bytes that are read at a time."""

PACKAGES = (
    "numpy",
    "tifffile",
    "imagecodecs",
    "pillow-heif",
    "pillow-avif-plugin",
    "pillow-jxl-plugin",
)
"""Those that decode, beside Pillow."""


class Memory:
    """What is remembered of the images below `path`, as they are decoded with these settings."""

    def __init__(
        self,
        path: str,
        image_shape: tuple[int, int, int],
        dtype: np.dtype,
        with_pixels: bool,
        most: int,
    ):
        """`most` bytes may lie in the cache for all folders together."""
        self.image_shape = image_shape
        self.dtype = dtype
        self.with_pixels = with_pixels
        self.most = most
        about = {
            "path": os.path.realpath(os.path.expanduser(path)),
            "image_shape": image_shape,
            "dtype": dtype.str,
            "with_pixels": with_pixels,
            "decoder": _decoder(),
            "limits": [Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES],
        }
        self._about = np.frombuffer(json.dumps(about).encode(), np.uint8)
        name = hashlib.blake2b(self._about.tobytes(), digest_size=16).hexdigest()
        self._file = folder() / f"{name}.npz"

    def recall(self) -> "Remembered | None":
        """What an earlier start has kept; None if there is nothing that can be used."""
        try:
            opened = Npz(self._file)
        except OSError:  # Most often it is not there.
            return None
        except BadArray as error:
            self._say_not_used(error)
            return None
        try:
            found = Remembered(opened, self, self._about)
        except (BadArray, OSError) as error:
            opened.close()
            self._say_not_used(error)
            return None
        with contextlib.suppress(OSError):  # What was used last goes last; see _make_room.
            os.utime(self._file)
        return found

    def _say_not_used(self, error: Exception) -> None:
        log.info("data: %s is not used (%s); all images are decoded", self._file, reason_of(error))

    def keep(
        self,
        digests: Mapping[str, Digest],
        stamps: np.ndarray,
        pixels: np.ndarray,
        looked: int,
    ) -> None:
        """Writes what is to be remembered, or warns that this is not possible.

        `stamps` [N, 4] are those of the files of `digests` at the time `looked`, in ns.
        """
        settled = stamps[:, 1:3].max(axis=1) < looked - SETTLED
        if not settled.any():
            return
        stamps = np.where(settled[:, None], stamps, -1)
        arrays = {
            "about": self._about,
            "fingerprint": np.array(self.fingerprint(digests)),
            "names": np.frombuffer(b"\0".join(map(name_bytes, digests)), np.uint8),
            "stamps": stamps,
            "hashes": np.frombuffer(
                bytes.fromhex("".join(each.file for each in digests.values())), np.uint8
            ),
            "anew": np.array([each.anew for each in digests.values()]),
            "pixels": pixels,
        }
        size = sum(each.nbytes for each in arrays.values()) + 2**16  # And the headers.
        if size > self.most:
            log.info(
                "data: %d MiB of decoded images are not kept for the next start; "
                "data.disk_cache_mb is %d",
                size >> 20,
                self.most >> 20,
            )
            return
        try:
            with _alone() as is_alone:
                if is_alone:
                    _make_room(self._file, self.most - size)
                    _write(self._file, arrays, size)
        except OSError as error:
            log.warning(
                "data: decoded images cannot be kept in %s (%s), so they are decoded at every "
                "start; set XDG_CACHE_HOME to a folder with room, or data.disk_cache_mb to 0",
                folder(),
                reason_of(error),
            )

    def fingerprint(self, digests: Mapping[str, Digest]) -> str:
        """That of all images."""
        own = {name: str(digest) for name, digest in digests.items()}
        return fingerprint(own, self.image_shape, self.dtype)


class Remembered:
    """The images of an earlier start; a context manager.

    Raises BadArray for a file that is damaged or of other settings.
    """

    def __init__(self, opened: Npz, memory: Memory, about: np.ndarray):
        self._opened = opened
        if not np.array_equal(opened.read("about"), about):
            raise BadArray("it is of other settings")
        names = opened.read("names").tobytes().split(b"\0")
        self.names = [name.decode("utf-8", "surrogateescape") for name in names]
        """[N]"""
        self.stamps = self._read("stamps", np.int64)
        """int64 [N, 4]: see Files.stamps. -1 where a file was too new to tell a change."""
        hashes = self._read("hashes", np.uint8).tobytes().hex()
        anew = self._read("anew", np.bool_).tolist()
        self.digests = [
            Digest(hashes[32 * i : 32 * (i + 1)], of_it) for i, of_it in enumerate(anew)
        ]
        """[N]"""
        header = opened.header("pixels")
        count = len(names) if memory.with_pixels else 0
        if header != ((count, *memory.image_shape), memory.dtype):
            raise BadArray("its pixels are of another shape")
        whole = memory.fingerprint(dict(zip(self.names, self.digests, strict=True)))
        if str(opened.read("fingerprint")) != whole:
            raise BadArray("its fingerprint is another")

    def _read(self, name: str, dtype: type) -> np.ndarray:
        array = self._opened.read(name)
        count = len(self.names)
        shape = {"stamps": (count, 4), "hashes": (16 * count,), "anew": (count,)}[name]
        if array.shape != shape or array.dtype != dtype:
            raise BadArray(f"{name} must be {np.dtype(dtype)} {list(shape)}")
        return array

    def __enter__(self) -> "Remembered":
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def rows(self, names: Sequence[str], stamps: np.ndarray) -> np.ndarray:
        """int64 [M]: which of these images each of `names` is, -1 where its file is another."""
        places = {name: i for i, name in enumerate(self.names)}
        rows = np.array([places.get(name, -1) for name in names], np.int64)
        same = (self.stamps[rows] == stamps).all(axis=1) & (stamps[:, 0] >= 0)
        return np.where(same, rows, -1)

    def fill(self, pixels: np.ndarray, places: np.ndarray) -> None:
        """Puts image i at pixels[places[i]], or nowhere where that is -1.

        Raises BadArray, or OSError, where the file is damaged; `pixels` may then hold anything.
        """
        start = 0
        for block in self._opened.blocks("pixels", BLOCK):
            to = places[start : start + len(block)]
            pixels[to[to >= 0]] = block[to >= 0]
            start += len(block)


def folder() -> Path:
    """Where it lies."""
    return user_cache() / "images"


@functools.cache
def _decoder() -> str:
    """A hash of all that decides which pixels a file gives: this room's own code is part of it."""
    codecs = [*features.get_supported_codecs(), *features.get_supported_modules()]
    versions = {"Pillow": Image.__version__}
    versions |= {name: str(features.version(name)) for name in codecs}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    digest = hashlib.blake2b(json.dumps(versions, sort_keys=True).encode(), digest_size=16)
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _alone() -> Iterator[bool]:
    """Whether no other process writes there now; holds it off. Raises OSError."""
    folder().mkdir(parents=True, exist_ok=True, mode=0o700)  # The images may be nobody else's.
    if folder().stat().st_uid != os.getuid():
        raise PermissionError(errno.EPERM, "it belongs to another user")
    descriptor = os.open(folder() / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        yield _takes(descriptor)
    finally:
        os.close(descriptor)


def _takes(descriptor: int) -> bool:
    try:
        # The system gives it up however this process ends.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _make_room(own: Path, most: int) -> None:
    """Deletes what writers left that were killed, `own` as it was, and the oldest beyond `most`.

    Files that go away meanwhile have been deleted by somebody.
    """
    for left in folder().glob(".*.tmp"):
        left.unlink(missing_ok=True)
    own.unlink(missing_ok=True)
    known = {file: file.stat() for file in folder().glob("*.npz")}
    total = sum(about.st_size for about in known.values())
    for file, about in sorted(known.items(), key=lambda each: each[1].st_mtime_ns):
        if total <= most:
            return
        file.unlink(missing_ok=True)
        total -= about.st_size


def _write(file: Path, arrays: Mapping[str, np.ndarray], size: int) -> None:
    """Writes the file as a whole or not at all; half of the disk's free room stays free."""
    if size > shutil.disk_usage(file.parent).free // 2:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    temporary = file.parent / f".{file.stem}.{socket.gethostname()}-{os.getpid()}.tmp"
    try:
        with open(temporary, "wb", opener=_private) as opened:
            np.savez(opened, **arrays)  # type: ignore[arg-type] # an array for allow_pickle?
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _private(name: str, flags: int) -> int:
    return os.open(name, flags, 0o600)
