"""The choice of a sampler: one value from the command line to the chain."""

import dataclasses
import functools
import logging
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np

from ddpm_jax.calibration import FixedVariance
from ddpm_jax.config import Checked, Diffusion, Natural, Positive, Range, SamplerName
from ddpm_jax.diffusion import Variance
from ddpm_jax.errors import UserError, shown
from ddpm_jax.samplers import BH, SAMPLERS, Grid, Method, time_grid

log = logging.getLogger(__name__)

MeasuredGrid = Literal["likelihood", "tuned"]
"""Grids that follow from measurements of the model: `calibrate` and `tune` make these."""

MEASURED: tuple[MeasuredGrid, ...] = get_args(MeasuredGrid)


LEAST_TUNED = 2
MOST_TUNED = 50
"""So many steps can be tuned."""


@dataclasses.dataclass(frozen=True)
class Sampler(Checked):
    """How images are drawn; None stands for the sampler's own default."""

    GROUP: ClassVar[str] = ""
    LONGEST: ClassVar[int] = 1_000_000

    sampler: SamplerName | None = None
    """None for the paper's Algorithm 2 (ancestral), or with --grid tuned for tune's choice."""
    steps: Positive | None = None
    """Number of reverse steps; None for all T."""
    eta: Annotated[float | None, Range(min=0, max=1)] = None
    """With ddim: noise of each step, from 0 to 1; None for 0."""
    grid: Grid | MeasuredGrid | None = None
    """With --steps: how they lie among the T; likelihood and tuned need a calibration or tuning."""
    order: Annotated[int | None, Range(min=2, max=4)] = None
    """With unipc (2 or 3) and deis (2 to 4): predictions that a step uses; None for 3."""
    b_h: BH | None = None
    """With unipc: its function B(h), h (b1) or e^h - 1 (b2); None for b2."""
    variance: FixedVariance | None = None
    """With ancestral: variance of a step; optimal needs a calibration; None for the model's own."""
    timesteps: tuple[Natural, ...] | None = None
    """The steps to take among 0, ..., T - 1, ascending, in place of --steps and --grid."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timesteps is not None:
            self._check_timesteps(self.timesteps)
        elif self.steps is None and self.grid is not None:
            raise UserError(f"grid: {self.grid} requires --steps; add it, or leave --grid out")
        if self.variance is not None and self.name != "ancestral":
            raise UserError(
                f"variance: {self.name} does not take it; leave it out or choose ancestral"
            )
        for name in self.step_options:
            if name not in self.method.options:
                others = [each for each, method in SAMPLERS.items() if name in method.options]
                raise UserError(
                    f"{name}: {self.name} does not take it; leave it out or choose "
                    f"{' or '.join(others)}"
                )
        self.method.check_order(self.order)

    def _check_timesteps(self, timesteps: tuple[int, ...]) -> None:
        if self.steps is not None or self.grid is not None:
            raise UserError("timesteps: are themselves the grid; leave out --steps and --grid")
        if not timesteps or (np.diff(timesteps) <= 0).any():
            raise UserError(
                f"timesteps: must be one or more, in ascending order, got {shown(timesteps)}"
            )

    @property
    def name(self) -> SamplerName:
        """The method's name."""
        return self.sampler or "ancestral"

    @property
    def method(self) -> Method:
        """The mathematics."""
        return SAMPLERS[self.name]

    @property
    def options(self) -> dict[str, Any]:
        """All fields, as they are recorded in files."""
        fields = dataclasses.asdict(self)
        if self.timesteps is not None:
            fields["timesteps"] = list(self.timesteps)
        return fields

    def recorded(self, diffusion: Diffusion) -> dict[str, Any]:
        """The options with the grid by its name, for files that outlive today's defaults."""
        options = self.options
        if self.timesteps is None and self.strides(diffusion):
            options["grid"] = self.grid or self.method.grid
        return options

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> "Sampler":
        """The Sampler of recorded `options`. Raises UserError if they are none."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise UserError(f"sampler: has no option {shown(unknown[0])}")
        timesteps = options.get("timesteps")
        if isinstance(timesteps, list):
            options = {**options, "timesteps": tuple(timesteps)}
        return cls(**options)

    @property
    def step_options(self) -> dict[str, Any]:
        """The options of the method's step that are given."""
        common = ("sampler", "steps", "grid", "variance", "timesteps")
        return {
            name: value
            for name, value in self.options.items()
            if name not in common and value is not None
        }

    @property
    def words(self) -> str:
        """The name and the options, without the steps: "ddim, eta 0.5" for example."""
        options = {**self.step_options, "variance": self.variance}
        given = [f"{name} {value}" for name, value in options.items() if value is not None]
        return ", ".join([self.name, *given])

    def simplest(self, diffusion: Diffusion) -> "Sampler":
        """The same sampler by its name, with None for every option that has its default anyway."""
        simpler: dict[str, Any] = {
            name: None
            for name, value in self.step_options.items()
            if value == self.method.defaults[name]
        }
        simpler["sampler"] = self.name
        if not self.strides(diffusion):  # All T steps are the same on every grid.
            simpler |= {"steps": None, "grid": None, "timesteps": None}
        elif self.grid == self.method.grid:
            simpler["grid"] = None
        if self.variance == dataclasses.replace(self, variance=None).variance_of(diffusion):
            simpler["variance"] = None
        return dataclasses.replace(self, **simpler)

    def check(self, diffusion: Diffusion) -> None:
        """Raises UserError if a model of this process cannot be sampled so.

        Logs which variance a shortened chain takes, once.
        """
        T = diffusion.num_timesteps
        if self.steps is not None and self.steps > T:
            raise UserError(f"steps: must be from 1 to {T}, got {self.steps}")
        if self.timesteps is not None and self.timesteps[-1] >= T:
            raise UserError(f"timesteps: must be from 0 to {T - 1}, got {self.timesteps[-1]}")
        if self.steps == T and self.grid is not None:
            _log_idle_grid(self.grid, T)
        if self.grid in MEASURED:
            return
        if T > 1 and self.timesteps_of(diffusion)[-1] == 0:
            given = "" if self.grid is None else f"{self.grid} with --steps {self.steps} "
            what = "grid" if self.timesteps is None else "timesteps"
            raise UserError(
                f"{what}: {given}visits step 0 alone, and pure noise stays noise; choose --grid "
                "trailing or linspace, or more steps"
            )
        chosen = self.variance is not None or self.name != "ancestral"
        if not chosen and self.variance_of(diffusion) != diffusion.variance:
            _log_variance(len(self.timesteps_of(diffusion)), T, diffusion.variance)

    def timesteps_of(self, diffusion: Diffusion) -> np.ndarray:
        """The steps it takes, ascending [S]. A measured grid must be resolved before."""
        if self.timesteps is not None:
            return np.array(self.timesteps, np.int32)
        T = diffusion.num_timesteps
        grid = self.grid or self.method.grid
        if not self.strides(diffusion):
            return np.arange(T, dtype=np.int32)
        if grid == "likelihood" or grid == "tuned":
            raise ValueError(f"grid: {grid} follows from the model; use DDPM.resolve")
        return time_grid(T, self.steps or T, grid)

    def strides(self, diffusion: Diffusion) -> bool:
        """Whether it leaves steps out."""
        T = diffusion.num_timesteps
        if self.timesteps is not None:
            return len(self.timesteps) != T
        return self.steps not in (None, T)

    def variance_of(self, diffusion: Diffusion) -> Variance | FixedVariance:
        """What a reverse step's variance is taken from.

        The beta of a longer stride is far too large for a reverse step, and a learned log-variance
        belongs to steps of length one: a shortened chain takes the posterior's instead.
        """
        if self.variance is not None:
            return self.variance
        of_one_step = diffusion.variance in ("fixed_large", "learned")
        if of_one_step and self.strides(diffusion):
            return "fixed_small"
        return diffusion.variance


ANCESTRAL = Sampler()
"""Algorithm 2 with all T steps."""


class Tuned(NamedTuple):
    """The results of `ddpm-jax tune` for a model's weights: Samplers with explicit timesteps."""

    grids: tuple[Sampler, ...] = ()
    """The best steps of a sampler that was named."""
    choices: tuple[Sampler, ...] = ()
    """The best sampler of all for a number of steps."""

    def find(self, sampler: Sampler) -> Sampler:
        """The entry that `sampler`, of grid tuned, asks for. Raises UserError if it is missing."""
        named = sampler.sampler is not None
        steps = sampler.steps
        there = self.grids if named else self.choices
        if not named and sampler.variance is not None:
            raise UserError(
                "variance: --grid tuned takes the variance of tune's choice; leave --variance out, "
                "or choose another grid"
            )
        if named and (sampler.eta or not sampler.method.deterministic):
            raise UserError(
                f"grid: tuned is for deterministic samplers, and {sampler.name} draws noise; leave "
                "--sampler out to take tune's choice, or choose another grid"
            )
        if named:
            wanted = dataclasses.replace(sampler, steps=None, grid=None)
            there = tuple(
                each for each in there if dataclasses.replace(each, timesteps=None) == wanted
            )
        for each in there:
            if len(each.timesteps or ()) == steps:
                return each
        tuned = sorted({len(each.timesteps or ()) for each in there})
        of = f" of {sampler.name}" if named else ""
        known = f" (there are those of {', '.join(map(str, tuned))})" if tuned else ""
        option = f" --sampler {sampler.name}" if named else ""
        remedy = f"run ddpm-jax tune RUN --steps {steps}{option} with the same --weights and --step"
        if steps is None or not LEAST_TUNED <= steps <= MOST_TUNED:
            remedy = f"from {LEAST_TUNED} to {MOST_TUNED} can be; choose so many"
        raise UserError(
            f"grid: no {steps} steps{of} were tuned for these weights{known}; {remedy}, or choose "
            "another grid"
        )


NOTHING_TUNED = Tuned()


def as_sampler(sampler: Sampler | SamplerName | None = None, **options: Any) -> Sampler:
    """The Sampler that a name, or None, and options stand for; a Sampler stays as it is.

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
    if isinstance(value, list | tuple) or np.ndim(value) == 1:
        return tuple(map(_plain, value))
    return value.item() if hasattr(value, "item") and np.ndim(value) == 0 else value


@functools.cache
def _log_idle_grid(grid: Grid | MeasuredGrid, T: int) -> None:
    log.warning("grid: %s makes no difference, since all %d steps are taken", grid, T)


@functools.cache
def log_found(asked: Sampler, found: Sampler) -> None:
    """Says, once, what `asked`, of grid tuned, stands for."""
    steps = " ".join(map(str, found.timesteps or ()))
    log.info("grid tuned, %d steps: %s, at the steps %s", asked.steps, found.words, steps)


@functools.cache
def _log_variance(steps: int, T: int, variance: Variance) -> None:
    log.warning(
        "%d of %d steps: sampling with the posterior's variance (fixed_small), since %s only "
        "fits all steps",
        steps,
        T,
        variance,
    )
