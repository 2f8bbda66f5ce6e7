"""The bound on the likelihood of any number of images, in batches and on any devices."""

from typing import Any

import numpy as np

from ddpm_jax.calibration import cell_grid
from ddpm_jax.calls import programs
from ddpm_jax.calls.batches import Drawing, batches, checked_start
from ddpm_jax.calls.conditions import conditions
from ddpm_jax.calls.inputs import check_concrete, check_key, checked_params
from ddpm_jax.calls.ready import ready
from ddpm_jax.devices.mesh import fetch, mesh_of, place
from ddpm_jax.devices.segments import moving, watched
from ddpm_jax.likelihood import BitsAndCells, BitsPerDim
from ddpm_jax.sampler import Sampler
from ddpm_jax.shapes import AnyKey, Array, Float, PyTree


def bits_per_dim(
    ddpm: Any,
    params: PyTree,
    rng: AnyKey,
    x_0: Float[Array, "b h w c"],
    sampler: Sampler,
    cells: bool,
    drawing: Drawing,
) -> BitsPerDim | BitsAndCells:
    """As `DDPM.bits_per_dim`; `sampler` is resolved."""
    check_concrete("bits_per_dim", params=params, rng=rng, x_0=x_0, labels=drawing.labels)
    params = ready(ddpm, checked_params(params, ddpm.shapes))
    check_key(rng)
    n = len(x_0)
    start = checked_start(drawing.start, n)
    condition = conditions(ddpm.config.model, drawing.labels, n)
    steps = sampler.timesteps_of(ddpm.config.diffusion)
    grid = cell_grid(ddpm.image_shape)
    shapes: list[tuple[int, ...]] = [(len(steps),), (len(steps),)]  # Of the terms and errors.
    shapes += [(len(steps), *grid)] if cells else []
    mesh = mesh_of(params)
    kind = BitsAndCells if cells else BitsPerDim
    result = kind(*(np.empty((n, *shape), np.float32) for shape in [(), (), *shapes]))
    todo = list(batches(n, drawing.batch_size, mesh))
    with moving(drawing.progress, len(todo) * len(steps), "likelihood") as move:
        for rows, count in todo:
            indices = place((start + rows).astype(np.uint32), mesh)
            images = place(x_0[rows], mesh)
            empty = tuple(
                place(np.zeros((len(rows), *shape), np.float32), mesh) for shape in shapes
            )
            of_rows = condition.of(rows, mesh)
            sizes = grid[:2] if cells else None
            args = (ddpm, sampler, sizes, params, of_rows, rng, indices, images)
            parts = watched(programs.bounds, args, empty, steps, move)
            bits = programs.whole_bound(ddpm, sampler, images, parts)
            for field, of_batch in zip(result, fetch(bits), strict=True):
                field[rows[:count]] = of_batch[:count]
    return result


def decoder_bits(
    ddpm: Any,
    params: PyTree,
    rng: AnyKey,
    x_0: Float[Array, "b h w c"],
    variances: Float[Array, " V"],
    drawing: Drawing,
) -> Float[np.ndarray, "n V"]:
    """As `DDPM.decoder_bits`."""
    params = ready(ddpm, checked_params(params, ddpm.shapes))
    check_key(rng)
    n = len(x_0)
    condition = conditions(ddpm.config.model, drawing.labels, n)
    start = checked_start(drawing.start, n)
    mesh = mesh_of(params)
    result = np.empty((n, len(variances)), np.float32)
    for rows, count in batches(n, drawing.batch_size, mesh):
        indices = place((start + rows).astype(np.uint32), mesh)
        images = place(x_0[rows], mesh)
        table = np.float32(variances)
        of_rows = condition.of(rows, mesh)
        bits = programs.decoder_bits(ddpm, params, of_rows, rng, indices, images, table)
        result[rows[:count]] = fetch(bits)[:count]
    return result
