"""The choice of a sampler: one value from the command line to the chain."""

import dataclasses
import functools
import logging
from typing import Annotated, Any, ClassVar

import numpy as np

from ddpm_jax.config import Checked, Diffusion, Positive, Range, SamplerName
from ddpm_jax.diffusion import Variance
from ddpm_jax.errors import UserError
from ddpm_jax.samplers import SAMPLERS, Grid, Method, time_grid

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Sampler(Checked):
    """How images are drawn; None stands for the sampler's own default."""

    GROUP: ClassVar[str] = ""

    sampler: SamplerName = "ancestral"
    """The paper's Algorithm 2 (ancestral), or a sampler that needs fewer steps."""
    steps: Positive | None = None
    """Number of reverse steps; None for all T."""
    eta: Annotated[float | None, Range(min=0, max=1)] = None
    """With ddim: noise of each step, from 0 to 1; None for 0."""
    grid: Grid | None = None
    """With --steps: how the steps are spaced among the T; None for the sampler's own grid."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is None and self.grid is not None:
            raise UserError(f"grid: {self.grid} requires --steps; add it, or leave --grid out")
        for name in self.step_options:
            if name not in self.method.options:
                others = [each for each, method in SAMPLERS.items() if name in method.options]
                raise UserError(
                    f"{name}: {self.sampler} does not take it; leave it out or choose "
                    f"{' or '.join(others)}"
                )

    @property
    def method(self) -> Method:
        """The mathematics."""
        return SAMPLERS[self.sampler]

    @property
    def options(self) -> dict[str, Any]:
        """All fields, as they are recorded in files."""
        return dataclasses.asdict(self)

    @property
    def step_options(self) -> dict[str, Any]:
        """The options of the method's step that are given."""
        common = ("sampler", "steps", "grid")
        return {
            name: value
            for name, value in self.options.items()
            if name not in common and value is not None
        }

    def simplest(self, diffusion: Diffusion) -> "Sampler":
        """The same sampler, with None for every option that has its default anyway."""
        as_default: dict[str, Any] = {
            name: None
            for name, value in self.step_options.items()
            if value == self.method.defaults[name]
        }
        if not self.strides(diffusion):  # All T steps are the same on every grid.
            as_default |= {"steps": None, "grid": None}
        elif self.grid == self.method.grid:
            as_default["grid"] = None
        return dataclasses.replace(self, **as_default)

    def check(self, diffusion: Diffusion) -> None:
        """Raises UserError if a model of this process cannot be sampled so.

        Logs which variance a shortened chain takes, once.
        """
        T = diffusion.num_timesteps
        if self.steps is not None and self.steps > T:
            raise UserError(f"steps: must be from 1 to {T}, got {self.steps}")
        if T > 1 and self.timesteps(diffusion)[-1] == 0:
            raise UserError(
                f"grid: {self.grid} with --steps {self.steps} visits step 0 alone, and pure noise "
                "stays noise; choose --grid trailing or linspace, or more steps"
            )
        if self.steps == T and self.grid is not None:
            _log_idle_grid(self.grid, T)
        _log_variance(self, diffusion)

    def timesteps(self, diffusion: Diffusion) -> np.ndarray:
        """The steps it takes, ascending [S]."""
        T = diffusion.num_timesteps
        return time_grid(T, self.steps or T, self.grid or self.method.grid)

    def strides(self, diffusion: Diffusion) -> bool:
        """Whether it leaves steps out."""
        return self.steps not in (None, diffusion.num_timesteps)

    def variance(self, diffusion: Diffusion) -> Variance:
        """What a reverse step's variance is taken from.

        The beta of a longer stride is far too large for a reverse step, and a learned log-variance
        belongs to steps of length one: a shortened chain takes the posterior's instead.
        """
        of_one_step = diffusion.variance in ("fixed_large", "learned")
        if of_one_step and self.strides(diffusion):
            return "fixed_small"
        return diffusion.variance


ANCESTRAL = Sampler()
"""Algorithm 2 with all T steps."""


def as_sampler(sampler: Sampler | SamplerName, **options: Any) -> Sampler:
    """The Sampler that a name and its options stand for; a Sampler stays as it is.

    Raises UserError for what does not fit together, TypeError for unknown options.
    """
    if not isinstance(sampler, Sampler):
        # Numbers of NumPy and jax become Python's, which files and programs' names are made of.
        plain = {name: _plain(value) for name, value in options.items()}
        return Sampler(sampler, **plain)
    if options:
        raise TypeError(
            f"{', '.join(options)}: not allowed beside a Sampler; set it in the Sampler"
        )
    return sampler


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") and np.ndim(value) == 0 else value


@functools.cache
def _log_idle_grid(grid: Grid, T: int) -> None:
    log.warning("grid: %s makes no difference, since all %d steps are taken", grid, T)


@functools.cache
def _log_variance(sampler: Sampler, diffusion: Diffusion) -> None:
    if sampler.sampler == "ancestral" and sampler.variance(diffusion) != diffusion.variance:
        log.warning(
            "%d of %d steps: sampling with the posterior's variance (fixed_small), since %s only "
            "fits all steps",
            sampler.steps,
            diffusion.num_timesteps,
            diffusion.variance,
        )
