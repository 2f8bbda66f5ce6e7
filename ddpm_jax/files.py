"""Files that are whole or not there, on this machine or in a bucket."""

import io

import numpy as np
from etils import epath

from ddpm_jax.errors import UserError
from ddpm_jax.processes import is_first


def path_of(path: epath.PathLike) -> epath.Path:
    """`path` with ~ expanded. Raises UserError if it is on a kind of filesystem that is not known."""
    try:
        return epath.Path(path).expanduser()
    except KeyError:
        raise UserError(f"{path}: no such filesystem; choose a local path or one on gs:// or s3://") from None


def write_file(path: epath.PathLike, content: bytes) -> None:
    """Writes `content` to `path` so that no half-written file is ever seen under that name.

    Of several processes the first alone does so.
    """
    if not is_first():
        return
    path = epath.Path(path)
    if "://" in str(path):  # An object of a store is there once all of it has arrived.
        path.write_bytes(content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.tmp"
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
        raise UserError(f"{path}: cannot be read as npz ({error}); delete it to make it again") from error
