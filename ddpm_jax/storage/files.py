"""Files that are written completely or not at all, on this machine or in a bucket."""

import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from ddpm_jax.config import flatten
from ddpm_jax.data.faults import IS_POINTER, LFS_POINTER
from ddpm_jax.data.npz import Npz
from ddpm_jax.devices.processes import agreed, is_first
from ddpm_jax.errors import UserError, shown

log = logging.getLogger(__name__)

MOST_JSON = 2**24
"""Bytes of a JSON file. A run's have some thousand, the index of a large model a million."""

DEEPEST_JSON = 50
"""Levels of lists and objects in a JSON file. A run's have five."""

LOCAL_MOUNTS = ("/gs/", "/s3/", "/az/", "/hf/")


def path_of(path: epath.PathLike) -> epath.Path:
    """`path` with ~ expanded. Raises UserError if its kind of filesystem is unknown."""
    name = os.fspath(path)
    if "\0" in name:
        raise UserError(f"{name!r}: a path cannot contain a null byte; choose another")
    if name.startswith(LOCAL_MOUNTS):  # epath would take them for gs://, s3:// and so on.
        path = f"/{name}"
    try:
        return epath.Path(path).expanduser()
    except KeyError:
        raise UserError(
            f"{path}: unknown kind of filesystem; use a local path or one on gs:// or s3://"
        ) from None


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[None]:
    """Turns an OSError, of a full or read-only disk for example, into a UserError naming `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); "
            "fix that or choose another path"
        ) from error


def write_file(path: epath.PathLike, content: bytes) -> None:
    """Writes `content` to `path` so that no half-written file is ever seen under that name.

    Only the first of several processes writes. Raises UserError if it cannot be written.
    """
    if not is_first():
        return
    path = epath.Path(path)
    # Named by host and process: two programs may write the same file at once. One of them wins.
    # The name itself may be as long as a name can be.
    short = hashlib.blake2b(os.fsencode(path.name), digest_size=8).hexdigest()
    temporary = path.parent / f".{short}.{socket.gethostname()}-{os.getpid()}.tmp"
    with writing(path):
        if "://" in str(path):  # An object store shows an object only once it is complete.
            path.write_bytes(content)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def check_writable(path: epath.PathLike) -> None:
    """Raises UserError if a file cannot be written at `path`, before long work that ends there."""
    path = path_of(path)
    if "://" in str(path):
        return
    folder = next(each for each in path.absolute().parents if each.exists())
    if not folder.is_dir():
        raise UserError(f"{path}: cannot be written ({folder} is no folder); choose another path")
    if not os.access(folder, os.W_OK):
        raise UserError(
            f"{path}: cannot be written (no right to write into {folder}); "
            "fix that or choose another path"
        )


def claim(
    folder: epath.Path,
    name: str,
    label: dict,
    now: Callable[[dict], dict] = lambda there: there,
) -> None:
    """Marks `folder` as holding the results of `label`, which is written to its file `name`.

    If the folder has a label already, it must agree; entries that the old label lacks are ignored.
    `now` puts an old label into the form of today's.
    Raises UserError naming the entries that differ, or if the folder holds anything else.
    """
    file = folder / name
    here = flatten(json.loads(json.dumps(label)))
    if agreed(file.exists()):
        there = flatten(now(read_table(file)))
        differs = [key for key in here if key in there and there[key] != here[key]]
        if differs:
            made_with = ", ".join(f"{key} {there[key]!r}, not {here[key]!r}" for key in differs)
            raise UserError(
                f"out: {folder} holds results made with {made_with}; "
                "choose another folder or move this one away"
            )
    elif agreed(_is_taken(folder)):
        raise UserError(
            f"out: {folder} is not empty and was not written by this command; choose another folder"
        )
    write_file(file, json.dumps(label, indent=1).encode())


def _is_taken(path: epath.Path) -> bool:
    return path.exists() and (
        not path.is_dir() or any(not inside.name.startswith(".") for inside in path.iterdir())
    )


def append_line(path: epath.PathLike, line: bytes) -> None:
    """Appends all of `line` to the file, or nothing. Raises UserError if it cannot be written."""
    if "://" in str(path):  # Object stores cannot append.
        path = epath.Path(path)
        write_file(path, (path.read_bytes() if path.exists() else b"") + line)
        return
    with writing(path), open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            while line:
                line = line[file.write(line) :]
        except OSError:
            file.truncate(size)
            raise


@contextlib.contextmanager
def locked(folder: epath.PathLike) -> Iterator[None]:
    """Makes `folder` and holds its `.lock`. Raises UserError if another process does, naming it.

    The system releases the lock however the process ends, kill -9 included; the file stays. Paths
    with :// are not locked. Only the first of a program's processes holds the lock.
    """
    if not is_first():
        yield
        return
    folder = epath.Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = None
        if "://" not in str(folder):
            descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    if descriptor is None:
        yield
        return
    try:
        _take(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, folder) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
        raise UserError(
            f"{folder}: {holder} is training here; wait for it or stop it, "
            "or choose another --workdir"
        ) from None
    except OSError as error:  # Some network filesystems have no locks.
        log.warning(
            "%s: cannot be locked (%s); make sure that no other process trains in it",
            folder,
            error.strerror,
        )
        return
    with writing(folder):
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def npz(arrays: dict[str, np.ndarray]) -> bytes:
    """A compressed npz file of `arrays`."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type] # an array for allow_pickle?
    return file.getvalue()


def read_npz(path: epath.Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file.

    Raises UserError naming the file if it is not an npz file or holds anything but plain arrays.
    """
    try:
        return parse_npz(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read as npz ({error}); delete it to compute it again"
        ) from error


def parse_npz(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of an npz file. Raises ValueError, one line, for anything but plain arrays."""
    refuse_pointer(content)
    with Npz(io.BytesIO(content)) as arrays:
        return {name: arrays.read(name) for name in arrays.names}


def read_table(file: epath.Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError naming the file if it holds anything else."""
    value = read_json(file)
    if not isinstance(value, dict):
        raise UserError(f"{file}: is not a JSON object but {shown(value)}; fix or restore it")
    return value


def read_json(file: epath.Path) -> Any:
    """The content of a JSON file. Raises UserError naming the file if it cannot be read."""
    try:
        with file.open("rb") as opened:
            return parse_json(opened.read(MOST_JSON + 1))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); fix or restore it") from error


def parse_json(content: bytes) -> Any:
    """The value that JSON holds; every reader of JSON uses this.

    Raises ValueError with a reason in one line for anything else, for a git-lfs pointer, and for
    values that are nested deeper than DEEPEST_JSON.
    """
    refuse_pointer(content)
    if len(content) > MOST_JSON:
        raise ValueError(f"it is too long, over {MOST_JSON // 2**20} MiB")
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    level, depth = [value] if isinstance(value, dict | list) else [], 0
    while level:
        depth += 1
        if depth > DEEPEST_JSON:
            raise ValueError("its values are nested too deeply")
        tables = [each.values() if isinstance(each, dict) else each for each in level]
        level = [item for table in tables for item in table if isinstance(item, dict | list)]
    return value


def refuse_pointer(content: bytes) -> None:
    """Raises ValueError if `content` is what git-lfs leaves in place of a file."""
    if content.startswith(LFS_POINTER):
        raise ValueError(IS_POINTER)
