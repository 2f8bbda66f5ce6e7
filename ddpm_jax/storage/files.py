"""Files that are whole or not there, on this machine or in a bucket."""

import contextlib
import fcntl
import io
import json
import logging
import os
import socket

import numpy as np
from etils import epath

from ddpm_jax.config import flatten
from ddpm_jax.devices.processes import agreed, is_first
from ddpm_jax.errors import UserError

log = logging.getLogger(__name__)


def path_of(path: epath.PathLike) -> epath.Path:
    """`path` with ~ expanded. Raises UserError if it is on a kind of filesystem that is not known."""
    try:
        return epath.Path(path).expanduser()
    except KeyError:
        raise UserError(
            f"{path}: no such filesystem; choose a local path or one on gs:// or s3://"
        ) from None


@contextlib.contextmanager
def writing(path: epath.PathLike):
    """Turns what the system says of a full or read-only disk into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); mend that or choose another place"
        ) from error


def write_file(path: epath.PathLike, content: bytes) -> None:
    """Writes `content` to `path` so that no half-written file is ever seen under that name.

    Of several processes the first alone does so. Raises UserError if the disk does not take it.
    """
    if not is_first():
        return
    path = epath.Path(path)
    # Two programs may write the same file at once, and then one of them wins.
    temporary = path.parent / f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp"
    with writing(path):
        if "://" in str(path):  # An object of a store is there once all of it has arrived.
            path.write_bytes(content)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def claim(folder: epath.Path, name: str, label: dict) -> None:
    """Makes `folder` the place for what `label` says, in its file `name`, or checks that it is so already.

    Raises UserError naming what differs, or if the folder holds something else. What the label there does not
    know yet does not differ.
    """
    file, here = folder / name, flatten(json.loads(json.dumps(label)))
    if agreed(file.exists()):
        there = flatten(read_json(file))
        differs = [key for key in here if key in there and there[key] != here[key]]
        if differs:
            made_with = ", ".join(f"{key} {there[key]!r}, not {here[key]!r}" for key in differs)
            raise UserError(
                f"out: {folder} holds what was made with {made_with}; choose another folder or move it away"
            )
    elif agreed(_is_taken(folder)):
        raise UserError(
            f"out: {folder} is not empty and not from this command; choose another folder"
        )
    write_file(file, json.dumps(label, indent=1).encode())


def _is_taken(path: epath.Path) -> bool:
    return path.exists() and (
        not path.is_dir() or any(not inside.name.startswith(".") for inside in path.iterdir())
    )


def append_line(path: epath.PathLike, line: bytes) -> None:
    """Adds `line` to the end of the file, all of it or nothing. Raises UserError if the disk does not take it."""
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
def locked(folder: epath.PathLike):
    """Makes `folder` and holds its `.lock`. Raises UserError if another process does, naming it.

    The system lets go of it however the process ends, kill -9 included; the file stays. On paths with
    :// there is no lock. Of the several processes of one programme the first alone holds it.
    """
    if not is_first():
        yield
        return
    folder = epath.Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = (
            None
            if "://" in str(folder)
            else os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        )
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
            f"{folder}: {holder} is training here; wait for it or stop it, or choose another --workdir"
        ) from None
    except OSError as error:  # Some network filesystems have no locks.
        log.warning(
            "%s: no lock here (%s): see that no other process trains in it", folder, error.strerror
        )
        return
    with writing(folder):
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def npz(arrays: dict[str, np.ndarray]) -> bytes:
    """A compressed npz file of `arrays`."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def read_npz(path: epath.Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file. Raises UserError naming it if it is none or holds anything but plain arrays."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:
        raise UserError(
            f"{path}: cannot be read as npz ({error}); delete it to make it again"
        ) from error


def read_json(file: epath.Path):
    """What the JSON `file` holds. Raises UserError naming it if it cannot be read."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error
