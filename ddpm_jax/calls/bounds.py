"""The bound on the likelihood of any number of images, in batches and on any devices."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax.calibration import cell_grid
from ddpm_jax.calls import programs
from ddpm_jax.calls.batches import Drawing, batches, checked_start
from ddpm_jax.calls.conditions import conditions
from ddpm_jax.calls.inputs import check_concrete, check_key, checked_params
from ddpm_jax.calls.ready import ready
from ddpm_jax.devices.mesh import fetch, mesh_of, place
from ddpm_jax.devices.segments import moving, watched_each
from ddpm_jax.likelihood import BitsAndCells, BitsPerDim
from ddpm_jax.sampler import Sampler
from ddpm_jax.shapes import AnyKey, Array, Float, PyTree


class Measured(NamedTuple):
    """Images whose bound is measured, with the same model and key."""

    start: int
    """The number of the first."""
    x_0: Float[Array, "b h w c"]
    labels: Any
    """Their classes, as in `DDPM.bits_per_dim`."""
    cells: bool
    """Whether the errors in cells are measured, too."""


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
    params = checked_params(params, ddpm.shapes)
    n = len(x_0)
    images = Measured(checked_start(drawing.start, n), x_0, drawing.labels, cells)
    todo = list(batches(n, drawing.batch_size, mesh_of(params)))
    steps = len(sampler.timesteps_of(ddpm.config.diffusion))
    result = _room(n, _shapes_of_curves(ddpm, steps, cells), cells)  # Where there are no images.
    with moving(drawing.progress, len(todo) * steps, "likelihood") as move:
        size = drawing.batch_size
        for _, bits in bits_of_each(ddpm, params, rng, [images], sampler, size, move):
            result = bits
    return result


def bits_of_each(
    ddpm: Any,
    params: PyTree,
    rng: AnyKey,
    measured: Iterable[Measured],
    sampler: Sampler,
    batch_size: int | None,
    move: Callable[[int], Any],
) -> Iterator[tuple[Measured, BitsPerDim | BitsAndCells]]:
    """The bound of one set of images after another, as `bits_per_dim`.

    The device begins the next batch, of the next images too, while the host fetches the last.
    `move` is called with the numbers of steps that are made.
    """
    params = ready(ddpm, checked_params(params, ddpm.shapes))
    check_key(rng)
    mesh = mesh_of(params)
    steps = sampler.timesteps_of(ddpm.config.diffusion)
    grid = cell_grid(ddpm.image_shape)

    def begun():
        for images in measured:
            n = len(images.x_0)
            condition = conditions(ddpm.config.model, images.labels, n)
            shapes = _shapes_of_curves(ddpm, len(steps), images.cells)
            result = _room(n, shapes, images.cells)
            sizes = grid[:2] if images.cells else None
            for rows, count in batches(n, batch_size, mesh):
                indices = place((images.start + rows).astype(np.uint32), mesh)
                x_0 = place(images.x_0[rows], mesh)
                empty = tuple(
                    place(np.zeros((len(rows), *shape), np.float32), mesh) for shape in shapes
                )
                of_rows = condition.of(rows, mesh)
                args = (ddpm, sampler, sizes, params, of_rows, rng, indices, x_0)
                yield (images, result, rows[:count], x_0), args, empty

    for (images, result, rows, x_0), curves in watched_each(programs.bounds, begun(), steps, move):
        bits = fetch(programs.whole_bound(ddpm, sampler, x_0, curves))
        for field, of_batch in zip(result, bits, strict=True):
            field[rows] = of_batch[: len(rows)]
        if rows[-1] == len(images.x_0) - 1:
            yield images, result


def _shapes_of_curves(ddpm: Any, steps: int, cells: bool) -> list[tuple[int, ...]]:
    """Those of an image's terms and errors over the steps."""
    shapes: list[tuple[int, ...]] = [(steps,), (steps,)]
    return shapes + [(steps, *cell_grid(ddpm.image_shape))] if cells else shapes


def _room(n: int, shapes: list[tuple[int, ...]], cells: bool) -> BitsPerDim | BitsAndCells:
    """For the bounds of n images."""
    kind = BitsAndCells if cells else BitsPerDim
    return kind(*(np.empty((n, *shape), np.float32) for shape in [(), (), *shapes]))


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
