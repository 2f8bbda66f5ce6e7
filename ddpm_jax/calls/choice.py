"""Which chain a Sampler stands for with a model, and with what was measured of its weights."""

import dataclasses
import functools
from typing import Any

from ddpm_jax.calibration import Calibration, FixedVariance, likelihood_steps
from ddpm_jax.errors import UserError
from ddpm_jax.sampler import MEASURED, Sampler, log_found


def resolve(ddpm: Any, sampler: Sampler) -> Sampler:
    """As `DDPM.resolve`."""
    diffusion = ddpm.config.diffusion
    sampler.check(diffusion)
    if sampler.grid == "tuned" and sampler.strides(diffusion):
        named = sampler.sampler is not None
        found = ddpm.tuned.find(sampler.simplest(diffusion) if named else sampler)
        found.check(diffusion)
        log_found(sampler, found)
        sampler = found
    if sampler.variance == "optimal":
        _calibrated(ddpm, "variance")
    if sampler.grid == "likelihood" and sampler.strides(diffusion):
        sampler = _with_best_steps(ddpm, sampler)
    return sampler.simplest(diffusion)


def resolve_bound(ddpm: Any, sampler: Sampler) -> Sampler:
    """As `DDPM.resolve_bound`."""
    known = sampler.grid not in MEASURED and (sampler.steps or 0) <= ddpm.schedule.num_timesteps
    if known:  # Before anything is said of the chain.
        _check_bounded(ddpm, sampler)
    chosen = resolve(ddpm, sampler)
    _check_bounded(ddpm, chosen)
    return chosen


def _check_bounded(ddpm: Any, sampler: Sampler) -> None:
    if sampler.name != "ancestral":
        raise UserError(f"sampler: {sampler.name} has no bound; leave it out or choose ancestral")
    first = sampler.timesteps_of(ddpm.config.diffusion)[0]
    if first:
        raise UserError(
            f"timesteps: the bound's L_0 is of step 0, but this chain's first is step {first}; "
            "choose the grid linspace, leading, quad, squares or likelihood"
        )


def _with_best_steps(ddpm: Any, sampler: Sampler) -> Sampler:
    """The sampler with the steps of the best likelihood in the place of their number."""
    _calibrated(ddpm, "grid")
    variance: FixedVariance = "optimal"  # Also in place of a learned one, or of none.
    own = sampler.variance_of(ddpm.config.diffusion)
    if sampler.name == "ancestral" and (own == "fixed_small" or own == "fixed_large"):
        variance = own
    steps = best_steps(ddpm, sampler.steps or 0, variance)
    return dataclasses.replace(sampler, steps=None, grid=None, timesteps=steps)


@functools.lru_cache(maxsize=64)
def best_steps(ddpm: Any, steps: int, variance: FixedVariance) -> tuple[int, ...]:
    """The steps of the best likelihood; a second of work at T = 1000, so done once."""
    mse = _calibrated(ddpm, "grid").mse
    return tuple(likelihood_steps(ddpm.schedule, mse, steps, variance, ddpm.levels).tolist())


def _calibrated(ddpm: Any, option: str) -> Calibration:
    """The calibration. Raises UserError naming the option that needs it if it is missing."""
    if ddpm.calibration is None:
        raise UserError(
            f"{option}: these weights have no calibration, which this needs; run "
            "ddpm-jax calibrate RUN first, with the same --weights and --step"
        )
    return ddpm.calibration
