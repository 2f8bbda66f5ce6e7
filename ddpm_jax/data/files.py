"""Finds the image files of a folder or a zip, and reads them whole."""

import dataclasses
import errno
import functools
import logging
import os
import stat
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm_jax.data.faults import (
    IS_POINTER,
    LFS_POINTER,
    CannotRead,
    Unfit,
    cannot_read,
    reason_of,
)
from ddpm_jax.data.formats import array_files, image_files, unopened
from ddpm_jax.data.names import endings, shown, some
from ddpm_jax.errors import UserError, machine_remedy

log = logging.getLogger(__name__)

OF_A_RUN = {"config.json", "run.json", "metrics.jsonl"}
"""Files of a run directory; a folder that holds two of them is one."""

OF_SAMPLES = "samples.json"
"""A file of a folder that `ddpm-jax sample` has filled."""

UNPACKED = 2**26
MAX_RATIO = 100
"""A zip's member of more bytes than these that unpacks to so many times its size is no image."""

DICTIONARY = 2**26
"""Bytes that LZMA may declare for its dictionary: what its highest setting takes."""

LENGTHS = 26
"""Where a member's header says how long its name and its extra field are."""


@dataclasses.dataclass(frozen=True)
class Files:
    """The image files below a folder or in a zip."""

    names: list[str]
    """Their paths with /, sorted."""
    read: Callable[[str], bytes]
    """Maps a name to the file's bytes. It can be pickled. Raises CannotRead, or Unfit for a file
    that is too large for any image."""
    former: dict[str, str]
    """The names that older versions gave to the files, of those that differ."""
    stamp: Callable[[str], list[int]]
    """Maps a name to its file's size, times of the last change of content and of anything, in ns,
    and inode. What lies in a zip has those of the zip. Raises OSError."""

    def stamps(self, names: Sequence[str]) -> np.ndarray:
        """int64 [N, 4]: the `stamp` of each name, -1 for a file that cannot be looked at."""

        def of_some(start: int) -> list[list[int]]:
            return [self._stamp(name) for name in names[start : start + 512]]

        # In threads: a network's file system takes its time for each file.
        with ThreadPoolExecutor() as pool:
            groups = list(pool.map(of_some, range(0, len(names), 512)))
        return np.array([row for group in groups for row in group], np.int64).reshape(-1, 4)

    def _stamp(self, name: str) -> list[int]:
        try:
            return self.stamp(name)
        except OSError:
            return [-1] * 4


def open_files(path: str, arrays: bool = False) -> Files:
    """The image files below `path`, a folder or a .zip.

    With `arrays` .npy and .npz files are images, too. Otherwise they are only where no other file
    is one: beside images they hold features, labels and the like.

    Folders that hold a run are left out, and images that only another package could open; one line
    says so. Raises UserError if there are none, or `path` cannot be read or is a run itself.
    """
    root = Path(path).expanduser()
    try:
        found = _members(root)
    except (OSError, MemoryError) as error:
        where = shown(getattr(error, "filename", None) or root)
        raise UserError(
            f"data: cannot read {where} ({reason_of(error)}); "
            f"{machine_remedy(error) or 'fix that or name another folder'}"
        ) from error
    names = _without_runs(root, list(found.names))
    images = image_files(names)
    if arrays or not images:
        images = sorted([*images, *array_files(names)])
    others = unopened(names)
    if not images:
        inside = others or endings(names) or "no files"
        raise UserError(
            f"data: no images found in {shown(root)} (it holds {inside}); "
            "name a folder or a zip with image files"
        )
    if others:
        log.warning("data: left out %s", others)
    return dataclasses.replace(found, names=images)


def reader_of(root: Path) -> Callable[[str], bytes]:
    """`Files.read` of a folder or a zip, without looking at what it holds."""
    return functools.partial(_read_file, root) if root.is_dir() else _Zip(root)


def _file_stamp(root: str, name: str) -> list[int]:
    return _stamp_of(os.stat(f"{root}/{name}"))


def _stamp_of(about: os.stat_result) -> list[int]:
    # An inode has 64 bits without a sign.
    inode = about.st_ino - 2**64 if about.st_ino >= 2**63 else about.st_ino
    return [about.st_size, about.st_mtime_ns, about.st_ctime_ns, inode]


def _members(root: Path) -> Files:
    if root.is_dir():
        stamp = functools.partial(_file_stamp, str(root))
        return Files(list(_walk(root)), reader_of(root), {}, stamp)
    if not root.exists():
        raise UserError(
            f"data: {shown(root)} does not exist; name a folder or a zip with --data.source "
            "folder:PATH (--data in commands other than train)"
        )
    if not root.is_file():  # Opening a pipe may never end.
        raise UserError(f"data: {shown(root)} is neither a folder nor a zip; name one of these")
    return _zip_members(root)


def _walk(root: Path) -> Iterator[str]:
    """Names of all files below `root`. Follows links to folders, but lists each folder once."""
    seen = set()
    waiting = [(os.fspath(root), "")]
    while waiting:
        folder, name = waiting.pop()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        with os.scandir(folder) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
        folders = [entry for entry in inside if _is_folder(entry)]
        waiting += [
            (entry.path, f"{name}{entry.name}/")
            for entry in reversed(folders)
            if not entry.name.startswith(".")
        ]
        yield from (f"{name}{entry.name}" for entry in set(inside) - set(folders))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # A link to itself, which holds no images.
            return False
        raise


def _without_runs(root: Path, names: list[str]) -> list[str]:
    """Those of `names` that are not in the folder of a run, or of samples within the data.

    Pictures that a model made are learned from only where their folder is asked for by name.
    """
    marks: defaultdict[str, set[str]] = defaultdict(set)
    for name in names:
        folder, _, last = name.rpartition("/")
        if last in OF_A_RUN:
            marks[folder].add(last)
        elif last == OF_SAMPLES and folder:
            marks[folder] |= OF_A_RUN
    runs = sorted(folder for folder, marked in marks.items() if len(marked) > 1)
    if "" in runs:
        raise UserError(
            f"data: {shown(root)} is a run; name a folder of images, "
            "or the run's folder samples to learn from its samples"
        )
    if not runs:
        return names
    log.warning(
        "data: left out %d folders that hold runs or samples: %s",
        len(runs),
        some([shown(r) for r in runs]),
    )
    inside = tuple(f"{run}/" for run in runs)
    return [name for name in names if not name.startswith(inside)]


def _check_size(size: int) -> None:
    # An image that is safe to decode has at most 8 bytes per pixel; a bomb has more.
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and size > 8 * most:
        raise Unfit("is too large to read and decode safely")


def _read_file(root: Path, name: str) -> bytes:
    file = root / name
    try:
        about = file.stat()
        if not stat.S_ISREG(about.st_mode):  # Reading a pipe may never end.
            raise CannotRead(shown(file), "it is not a regular file", "remove it")
        _check_size(about.st_size)
        return file.read_bytes()
    except (OSError, MemoryError) as error:
        raise cannot_read(shown(file), error) from error


def _zip_members(path: Path) -> Files:
    zip_stamp = _stamp_of(path.stat())  # Before it is opened: it may be replaced in between.
    archive = _Zip(path)
    raw = {name: info.filename for name, info in archive.members.items()}
    former = {name: was for name, was in raw.items() if name != was}
    return Files(list(raw), archive, former, lambda _: zip_stamp)


class _Zip:
    """Maps the name of a zip's member to its bytes. Each process opens the zip for itself."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return _Zip, (self.path,)

    def __call__(self, name: str) -> bytes:
        try:
            info = self.members[name]
            # zipfile takes memory for as many bytes as a member says it has.
            if info.header_offset + info.compress_size > self.path.stat().st_size:
                raise zipfile.BadZipFile("it is longer than the zip")
            _check_size(info.file_size)
            if info.file_size > max(UNPACKED, MAX_RATIO * info.compress_size):
                raise Unfit(f"unpacks to {info.file_size:,} bytes, too many for an image")
            if info.compress_type == zipfile.ZIP_LZMA and self._dictionary(info) > DICTIONARY:
                raise zipfile.BadZipFile("its dictionary is too large")
            return self._file.read(info)
        except UserError:
            raise
        except (OSError, MemoryError) as error:
            raise cannot_read(f"{shown(name)} in {shown(self.path)}", error) from error
        except Exception as error:  # zipfile raises many kinds for damaged files.
            raise CannotRead(
                f"{shown(name)} in {shown(self.path)}",
                reason_of(error),
                "make the zip again, or unpack it and name the folder",
            ) from error

    def _dictionary(self, info: zipfile.ZipInfo) -> int:
        """Bytes of memory that a member declares it takes to unpack it with LZMA."""
        with self.path.open("rb") as file:
            file.seek(info.header_offset + LENGTHS)
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            file.seek(name + extra, os.SEEK_CUR)
            return int.from_bytes(file.read(9)[5:], "little")

    @functools.cached_property
    def _file(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.path)

    @functools.cached_property
    def members(self) -> dict[str, zipfile.ZipInfo]:
        """{name with /: the member}. Raises UserError if it is no zip that can be read."""
        try:
            infos = self._file.infolist()
        except (OSError, MemoryError):
            raise
        except Exception as error:  # zipfile raises many kinds for damaged files.
            with self.path.open("rb") as file:
                is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
            why = IS_POINTER if is_pointer else reason_of(error)
            raise UserError(
                f"data: {shown(self.path)} is neither a folder nor a zip that can be read "
                f"({why}); name one of these"
            ) from error
        members: dict[str, zipfile.ZipInfo] = {}
        for info in infos:
            # Programs on Windows wrote \ between folders, and others begin each name with ./
            members.setdefault(info.filename.replace("\\", "/").removeprefix("./"), info)
        locked = [name for name in image_files(members) if members[name].flag_bits & 1]
        if locked:
            raise UserError(
                f"data: {shown(self.path)} is encrypted ({len(locked)} images, the first is "
                f"{shown(locked[0])}); unpack it and name the folder"
            )
        return members
