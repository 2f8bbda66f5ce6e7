"""Samples in batches; the device begins the next while the host fetches the last."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax.calls import programs
from ddpm_jax.calls.batches import batches
from ddpm_jax.calls.conditions import Condition
from ddpm_jax.calls.inputs import check_key, checked_params
from ddpm_jax.calls.ready import ready
from ddpm_jax.devices.mesh import fetch, mesh_of, place
from ddpm_jax.devices.segments import Progress, moving, watched_each
from ddpm_jax.sampler import Sampler
from ddpm_jax.shapes import AnyKey, Float, PyTree


class Run(NamedTuple):
    """Consecutive images: start, ..., start + n - 1."""

    start: int
    n: int
    condition: Condition
    """Of the n images, in the host's memory."""


def draw(
    ddpm: Any,
    params: PyTree,
    rng: AnyKey,
    runs: Iterable[Run],
    sampler: Sampler,
    batch_size: int | None,
    progress: Progress,
) -> Iterator[Float[np.ndarray, "n h w c"]]:
    """The images of each of `runs`, as `DDPM.sample` draws them; `sampler` is resolved."""
    params = ready(ddpm, checked_params(params, ddpm.shapes))
    check_key(rng)
    mesh = mesh_of(params)
    steps = sampler.timesteps_of(ddpm.config.diffusion)[::-1]
    clip = ddpm.config.diffusion.clip
    todo = [(run, list(batches(run.n, batch_size, mesh))) for run in runs]

    def begun():
        for run, of_run in todo:
            for rows, count in of_run:
                indices = place((run.start + rows).astype(np.uint32), mesh)
                keys, state = programs.begin(ddpm, sampler, rng, indices)
                args = (ddpm, sampler, clip, params, run.condition.of(rows, mesh), keys)
                yield (rows, count), args, state

    total = sum(len(of_run) for _, of_run in todo) * len(steps)
    with moving(progress, total, "sampling") as move:
        drawn = watched_each(programs.advance, begun(), steps, move)
        for run, of_run in todo:
            result = np.empty((run.n, *ddpm.image_shape), np.float32)
            for _ in of_run:
                (rows, count), state = next(drawn)
                result[rows[:count]] = fetch(state.x)[:count]
            yield programs.within_bounds(ddpm, result)
