"""Results in npz files that later commands use again: checked, since files get damaged."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from etils import epath

from ddpm_jax.errors import UserError
from ddpm_jax.storage.files import read_npz


class Kept(NamedTuple):
    """An array that a file must hold."""

    dtype: str
    shape: tuple[int | None, ...]
    """None for any length."""

    def __str__(self) -> str:
        sizes = ", ".join("any" if size is None else str(size) for size in self.shape)
        return f"{self.dtype} [{sizes}]"


def read_kept(path: epath.Path, wanted: Mapping[str, Kept]) -> dict[str, np.ndarray]:
    """The arrays of the npz file `path`, which are those of `wanted` and no others.

    Raises UserError naming the file, and the array that is missing or of another kind.
    """
    arrays = read_npz(path)
    check_kept(path, arrays, wanted)
    return arrays


def check_kept(path: object, arrays: Mapping[str, np.ndarray], wanted: Mapping[str, Kept]) -> None:
    """Raises UserError naming `path`, and the array, unless `arrays` are those of `wanted`."""
    for name in [*wanted, *arrays]:
        there = _describe(arrays.get(name))
        here = str(wanted.get(name, "absent"))
        if name not in wanted or not _is(arrays.get(name), wanted[name]):
            raise UserError(
                f"{path}: array {name!r:.80} is {there}, but must be {here}; "
                "delete the file to compute it again"
            )


def _is(array: np.ndarray | None, wanted: Kept) -> bool:
    if array is None or array.dtype != wanted.dtype or array.ndim != len(wanted.shape):
        return False
    sizes = zip(array.shape, wanted.shape, strict=True)
    return all(size in (None, found) for found, size in sizes)


def _describe(array: np.ndarray | None) -> str:
    return "absent" if array is None else str(Kept(str(array.dtype), array.shape))
