"""Chains of a model on any time grid, and their distance from its own deterministic solution.

The deterministic samplers all follow one flow, from x_T to an image. A chain of many small steps
is near its end, and a good chain of few steps lands close to it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.calibration import optimal_variance
from ddpm_jax.calls import programs
from ddpm_jax.calls.conditions import UNGUIDED, Condition, Guide, conditions
from ddpm_jax.calls.ready import ready
from ddpm_jax.devices.mesh import fetch, mesh_of, place
from ddpm_jax.devices.rows import full_batches
from ddpm_jax.devices.segments import watched
from ddpm_jax.errors import NonFiniteSamples
from ddpm_jax.evaluation.grids import Grid, euler_costs
from ddpm_jax.keys import TUNING, seed_key
from ddpm_jax.sampler import Sampler
from ddpm_jax.samplers import time_grid
from ddpm_jax.samplers.multistep import levels
from ddpm_jax.schedule import strided
from ddpm_jax.weights.load import Loaded

FINE = 100
"""Steps of the fine solution."""

SOLVER = Sampler("dpm-solver++3m")
"""What takes them. Its memory begins with the x_0 that it has predicted last."""

MEMORY = 2**26
"""Most numbers of the fine trajectories that are kept at a time."""


def fine_steps(num_timesteps: int) -> Grid:
    """The steps of the fine solution, on the grid squares."""
    return tuple(time_grid(num_timesteps, min(FINE, num_timesteps), "squares").tolist())


def network_calls(sampler: Sampler, steps: int) -> int:
    """How often the network is called for one image."""
    return 2 * steps - 1 if sampler.name == "heun" else steps


@dataclasses.dataclass(frozen=True)
class Chains:
    """Draws images of a seed on any grid; a new grid takes no new program.

    Image i starts from noise of its own, and depends on nothing else.
    """

    model: Loaded
    seed: int
    batch_size: int
    move: Callable[[int], Any]
    """Called with the number of network calls that were made: images times steps."""
    guide: Guide = UNGUIDED
    """The labels of the images; no guidance."""

    def images(self, sampler: Sampler, grid: Grid, start: int, count: int) -> np.ndarray:
        """Images start, ..., start + count - 1, float32 [count,H,W,C] in [-1, 1].

        `sampler` is the method with its options, without steps.
        """
        images = np.empty((count, *self.model.ddpm.image_shape), np.float32)
        for rows, real in self._batches(count, self.batch_size):
            keys, state, chain = self._begin(sampler, grid, start + rows)
            args = (*chain, np.int32(len(grid)), keys)
            move = self._mover(sampler, len(grid), real)
            state = watched(programs.advance_on, args, state, np.array(grid[::-1]), move)
            images[rows[:real]] = fetch(state.x)[:real]
        return programs.within_bounds(self.model.ddpm, images)

    def finite_images(
        self, sampler: Sampler, grid: Grid, start: int, count: int
    ) -> np.ndarray | None:
        """As `images`; None where they are not finite, since the steps are too wide."""
        try:
            return self.images(sampler, grid, start, count)
        except NonFiniteSamples:
            return None

    def fine(self, start: int, count: int) -> np.ndarray:
        """The same images of the fine solution."""
        return self.images(SOLVER, fine_steps(self._T), start, count)

    def fine_costs(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(the fine images, the costs of Euler's steps between all pairs of the fine steps).

        The costs are those of `grids.euler_costs`, in the mean over the images.
        """
        grid = fine_steps(self._T)
        N = len(grid)
        images = np.empty((count, *self.model.ddpm.image_shape), np.float32)
        products = np.zeros((2 * N, 2 * N))
        to_image = np.zeros(N)
        most = max(1, MEMORY // (2 * N * images[0].size))
        for rows, real in self._batches(count, min(self.batch_size, most)):
            keys, state, chain = self._begin(SOLVER, grid, start + rows)
            move = self._mover(SOLVER, N, real)
            vectors = np.empty((real, 2 * N, images[0].size), np.float32)
            for i in reversed(range(N)):
                vectors[:, i] = fetch(state.x)[:real].reshape(real, -1)
                args = (*chain, np.int32(i + 1), keys)
                state = watched(programs.advance_on, args, state, np.array(grid[i : i + 1]), move)
                vectors[:, N + i] = fetch(state.memory[0])[:real].reshape(real, -1)
            ends = fetch(state.x)[:real]
            images[rows[:real]] = ends
            for of_image, end in zip(vectors.astype(np.float64), ends, strict=True):
                products += of_image @ of_image.T
                to_image += np.square(of_image[N:] - end.reshape(-1)).sum(axis=1)
        schedule = self.model.ddpm.schedule
        level = levels(strided(schedule, np.array(grid)), schedule)
        numbers = images.size
        costs = euler_costs(level.alpha, level.sigma, products / numbers, to_image / numbers)
        return programs.within_bounds(self.model.ddpm, images), costs

    @property
    def _T(self) -> int:
        return self.model.ddpm.schedule.num_timesteps

    @functools.cached_property
    def _key(self):
        return jax.random.fold_in(seed_key(self.seed), TUNING)

    def _batches(self, count: int, size: int):
        return full_batches(count, size, shrink=True, multiple=self.model.devices)

    @functools.cached_property
    def _params(self):
        return ready(self.model.ddpm, self.model.params)

    def _begin(self, sampler: Sampler, grid: Grid, indices: np.ndarray):
        """(keys, state, the first arguments of the program) for some images."""
        ddpm = self.model.ddpm
        params = self._params
        places = place(indices.astype(np.uint32), mesh_of(params))
        keys, state = programs.begin(ddpm, sampler, self._key, places)
        tables = self._tables(sampler, grid)
        return keys, state, (ddpm, sampler, params, self._condition(indices), tables)

    def _condition(self, indices: np.ndarray) -> Condition:
        labels = self.guide.of(indices)["labels"]
        n = len(indices)
        condition = conditions(self.model.ddpm.config.model, labels, n)
        return condition.of(np.arange(n), mesh_of(self.model.params))

    def _tables(self, sampler: Sampler, grid: Grid) -> programs.Grid:
        """The chain on `grid`, as the program takes it."""
        ddpm = self.model.ddpm
        original = ddpm.schedule
        schedule = strided(original, np.array(grid))
        variance = None
        if sampler.variance == "optimal" and ddpm.calibration is not None:
            variance = optimal_variance(schedule, ddpm.calibration.mse)
        tables = None
        if sampler.method.tables is not None:
            tables = sampler.method.tables(schedule, original, **sampler.step_options)
        rows = max(len(grid), min(FINE, self._T))

        def fill(table):
            after = rows - len(grid)
            widths = [(0, after), *[(0, 0)] * (np.ndim(table) - 1)]
            return jnp.asarray(np.pad(np.asarray(table), widths, mode="edge"))

        return programs.Grid(*jax.tree.map(fill, (schedule, tables, variance)))

    def _mover(self, sampler: Sampler, steps: int, count: int) -> Callable[[int], Any]:
        """Counts the calls of a chain for `count` images."""
        calls = network_calls(sampler, steps)

        def move(taken: int) -> None:
            self.move(count * taken * calls // steps)

        return move


class Distance(NamedTuple):
    """How far images are from others, of 255 or in other units."""

    rmse: float
    """The root of the mean squared difference of all images."""
    median: float
    """The median of each image's own. One that becomes another image altogether moves the rmse."""


TOO_FAR = Distance(np.inf, np.inf)
"""Of images that are not finite."""


def distance(images: np.ndarray | None, others: np.ndarray, unit: float = 127.5) -> Distance:
    """The Distance of images [N,H,W,C], as `squared_differences`; TOO_FAR for None."""
    if images is None:
        return TOO_FAR
    squares = squared_differences(images, others, unit)
    return Distance(float(np.sqrt(squares.mean())), float(np.median(np.sqrt(squares))))


def squared_differences(images: np.ndarray, others: np.ndarray, unit: float = 127.5) -> np.ndarray:
    """The mean squared difference of each of images [N,H,W,C] from others: float64 [N].

    They are in the model's units, of which one is `unit` of those of the difference.
    """
    return unit**2 * np.square(np.float64(images) - others).mean(axis=(1, 2, 3))
