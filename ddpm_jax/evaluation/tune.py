"""The best sampler of few steps for a model at hand: its steps, and which method takes them.

Nothing is trained. The steps of a deterministic sampler are those whose images come nearest to the
model's own deterministic solution, from the same noise. They are sought over one half of the
starts, and judged on the other.
"""

import dataclasses
import logging
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax.ddpm import DDPM
from ddpm_jax.devices.progress import progress_bar
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.flow import FINE, Chains, fine_steps, network_calls, rmse
from ddpm_jax.evaluation.grids import Grid, cheapest_chain, descend
from ddpm_jax.sampler import Sampler
from ddpm_jax.samplers import SAMPLERS, time_grid
from ddpm_jax.weights.load import Loaded

log = logging.getLogger(__name__)

GRIDS = ("linspace", "leading", "trailing", "quad")
"""The untuned grids."""

LEAST = 8
"""Fewest images: four starts for the search, and four held back."""

EVALUATIONS = 80
"""Most grids that the search draws images on, beside those that it begins with."""

FIRST = 24
"""As many of them for each of several samplers, of which the best then gets the others."""

COMPETITORS = ("unipc", "deis", "dpm-solver++3m", "ipndm")
"""The deterministic samplers that are tuned where none is named."""

DDIM = Sampler("ddim")
DDIM_STEPS = 50
"""What the tuned steps are compared with."""


class Distances(NamedTuple):
    """How far a sampler's images are from the fine solution's: RMSE of 255, on starts held back."""

    sampler: Sampler
    """With the tuned steps."""
    tuned: float
    untuned: dict[str, float]
    """By the grid's name."""
    ddim: float
    """DDIM's with DDIM_STEPS steps."""


class Search:
    """The search for the best steps of deterministic samplers."""

    def __init__(self, chains: Chains, steps: int, images: int) -> None:
        self.chains = chains
        self.steps = steps
        self.count = images // 2
        self.held = images - self.count
        self.target, self.costs = chains.fine_costs(0, self.count)
        self.errors: dict[tuple[Sampler, Grid], float] = {}

    @property
    def T(self) -> int:
        """The model's number of steps."""
        return self.chains.model.ddpm.schedule.num_timesteps

    def error(self, sampler: Sampler, grid: Grid) -> float:
        """The RMSE of 255 over the starts of the search; measured once."""
        if (sampler, grid) not in self.errors:
            images = self.chains.images(sampler, grid, 0, self.count)
            self.errors[sampler, grid] = rmse(images, self.target)
        return self.errors[sampler, grid]

    def best(self, sampler: Sampler, evaluations: int) -> Grid:
        """The best grid that the search finds; never worse than an untuned one."""
        fine = fine_steps(self.T)
        starts = [tuple(fine[i] for i in cheapest_chain(self.costs, self.steps))]
        starts += untuned_grids(self.T, self.steps).values()
        start = min(starts, key=lambda grid: self.error(sampler, grid))
        return descend(start, lambda grid: self.error(sampler, grid), self.T, evaluations)

    def judged(self, sampler: Sampler, grid: Grid) -> Distances:
        """The distances on the starts held back."""
        target = self.chains.fine(self.count, self.held)

        def distance(sampler: Sampler, grid: Grid) -> float:
            return rmse(self.chains.images(sampler, grid, self.count, self.held), target)

        tuned = dataclasses.replace(sampler, timesteps=grid)
        grids = untuned_grids(self.T, self.steps)
        untuned = {name: distance(sampler, other) for name, other in grids.items()}
        ddim = tuple(time_grid(self.T, min(DDIM_STEPS, self.T)).tolist())
        return Distances(tuned, distance(sampler, grid), untuned, distance(DDIM, ddim))


def untuned_grids(num_timesteps: int, steps: int) -> dict[str, Grid]:
    """The grids that follow from T and the number of steps, by their names."""
    return {name: tuple(time_grid(num_timesteps, steps, name).tolist()) for name in GRIDS}


def check_tunable(sampler: Sampler, steps: int, ddpm: DDPM) -> None:
    """Raises UserError if the steps of `sampler` cannot be tuned."""
    T = ddpm.schedule.num_timesteps
    most = min(FINE // 2, T - 1)
    if not 2 <= steps <= most:
        raise UserError(f"steps: must be from 2 to {most} to be tuned, got {steps}")
    if not sampler.method.deterministic or sampler.eta:
        able = [name for name, method in SAMPLERS.items() if method.deterministic]
        eta = " with --eta" if sampler.method.deterministic else ""
        raise UserError(
            f"sampler: {sampler.name}{eta} draws noise, and its steps cannot be tuned; choose "
            f"one of {', '.join(able)}, or leave --sampler out to compare it with them"
        )
    for name in ("steps", "grid", "timesteps"):
        if getattr(sampler, name) is not None:
            raise UserError(f"{name}: tune finds the steps; leave it out")
