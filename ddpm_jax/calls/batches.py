"""Batches of the images that a call makes, and their numbers."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ddpm_jax.calls.inputs import check_count
from ddpm_jax.devices.mesh import fetch, mesh_of, place
from ddpm_jax.devices.rows import full_batches
from ddpm_jax.devices.segments import Progress
from ddpm_jax.shapes import PyTree


class Drawing(NamedTuple):
    """What many calls take beside their images, as in `DDPM.sample`."""

    labels: Any = None
    guidance: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    start: int = 0
    batch_size: int | None = None
    progress: Progress = False


def checked_start(start: Any, n: int) -> int:
    """The number of the first of `n` images, as an int. Raises ValueError if it is negative."""
    start = check_count("start", start)
    if start < 0 or start + n > 2**32:
        raise ValueError(f"start: must satisfy 0 <= start <= start + images <= 2**32, got {start}")
    return start


def batches(n: int, batch_size: Any, mesh: Mesh | None) -> Iterator[tuple[np.ndarray, int]]:
    """Batches of at most `batch_size`, 64 a device by default; see `full_batches`."""
    devices = mesh.size if mesh else 1
    size = 64 * devices if batch_size is None else check_count("batch_size", batch_size)
    return full_batches(n, size, shrink=True, multiple=devices)


def share_rows(call: Callable[..., PyTree], params: PyTree, *batched: PyTree) -> PyTree:
    """call(*batched), by all devices where `params` are on a mesh of several."""
    mesh = mesh_of(params)
    if mesh is None:
        return call(*batched)
    n = len(batched[0])
    ((rows, _),) = full_batches(n, n, multiple=mesh.size)
    result = call(*(place(array[rows], mesh) for array in batched))
    return jax.tree.map(lambda array: array[:n], fetch(result))
