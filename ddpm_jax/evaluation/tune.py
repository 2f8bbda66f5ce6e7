"""The best sampler of few steps for a model at hand: its steps, and which method takes them.

Nothing is trained. The steps of a deterministic sampler are those whose images come nearest to the
model's own deterministic solution, from the same noise. They are sought over one half of the
starts, and judged on the other.
"""

import dataclasses
import logging
from typing import Any, NamedTuple, get_args

import numpy as np
from etils import epath

from ddpm_jax import samplers
from ddpm_jax.calls.conditions import UNGUIDED, Guide
from ddpm_jax.data.scaling import Unit
from ddpm_jax.ddpm import DDPM
from ddpm_jax.devices.processes import agreed
from ddpm_jax.devices.progress import progress_bar
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.choice import (
    Choice,
    calibrated,
    compare,
    kid_judge_of,
    stochastic,
    to_calibrate_on,
)
from ddpm_jax.evaluation.flow import Chains, Distance, distance, fine_steps, network_calls
from ddpm_jax.evaluation.grids import Grid, cheapest_chain, descend
from ddpm_jax.evaluation.labels import guide_for
from ddpm_jax.evaluation.splits import Images
from ddpm_jax.sampler import LEAST_TUNED, MOST_TUNED, Sampler, Tuned
from ddpm_jax.samplers import SAMPLERS, time_grid
from ddpm_jax.storage.files import check_writable, path_of
from ddpm_jax.storage.measured import TUNED, write_tuned
from ddpm_jax.weights.export import export, new_path
from ddpm_jax.weights.load import Loaded

log = logging.getLogger(__name__)

GRIDS: tuple[samplers.Grid, ...] = get_args(samplers.Grid)
"""The untuned grids."""

LEAST = 8
"""Fewest images: four starts for the search, and four held back."""

EVALUATIONS = 64
"""Most grids that the search draws images on, beside those that it begins with."""

FIRST = 16
"""As many of them for each of several samplers, of which the best then gets the others."""

POWERS = (1, 2, 3)
"""A chain costs the sum of these powers of its steps' errors: models differ in which is best."""

COMPETITORS = ("unipc", "deis", "dpm-solver++3m", "ipndm")
"""The deterministic samplers that are tuned where none is named."""

FINALISTS = 2
"""Samplers that are judged once more, by other samples."""

DIGITS = 3
"""Of the figures that are kept: the later ones depend on the batch and the machine."""

DDIM = Sampler("ddim")
DDIM_STEPS = 50
"""What the tuned steps are compared with."""


class Distances(NamedTuple):
    """How far a sampler's images are from the fine solution's, on starts held back."""

    sampler: Sampler
    """With the tuned steps."""
    tuned: Distance
    untuned: dict[str, Distance]
    """By the grid's name."""
    ddim: Distance
    """DDIM's with `ddim_steps` steps."""
    ddim_steps: int
    """DDIM_STEPS, or all T of a shorter chain."""


class Search:
    """The search for the best steps of deterministic samplers."""

    def __init__(self, chains: Chains, steps: int, images: int) -> None:
        self.chains = chains
        self.steps = steps
        self.count = images // 2
        self.held = images - self.count
        self.target, costs = chains.fine_costs(0, self.count)
        self.costs = agreed(costs)  # All processes search the same way.
        self.errors: dict[tuple[Sampler, Grid], float] = {}

    @property
    def unit(self) -> Unit:
        """That of distances."""
        return self.chains.model.ddpm.scaling.unit

    @property
    def T(self) -> int:
        """The model's number of steps."""
        return self.chains.model.ddpm.schedule.num_timesteps

    def error(self, sampler: Sampler, grid: Grid) -> float:
        """The RMSE, in `unit`, over the starts of the search; measured once."""
        if (sampler, grid) not in self.errors:
            images = self.chains.finite_images(sampler, grid, 0, self.count)
            error = distance(images, self.target, self.unit.size).rmse
            self.errors[sampler, grid] = float(agreed(error))
        return self.errors[sampler, grid]

    def best(self, sampler: Sampler, evaluations: int) -> Grid:
        """The best grid that the search finds; never worse than an untuned one."""
        fine = fine_steps(self.T)
        chains = [cheapest_chain(self.costs**power, self.steps) for power in POWERS]
        starts = [tuple(fine[i] for i in chain) for chain in chains]
        starts += untuned_grids(self.T, self.steps).values()
        start = min(starts, key=lambda grid: self.error(sampler, grid))
        return descend(start, lambda grid: self.error(sampler, grid), self.T, evaluations)

    def judged(self, sampler: Sampler, grid: Grid) -> Distances:
        """The distances on the starts held back."""
        target = self.chains.fine(self.count, self.held)

        def judge(sampler: Sampler, grid: Grid) -> Distance:
            images = self.chains.finite_images(sampler, grid, self.count, self.held)
            return distance(images, target, self.unit.size)

        tuned = dataclasses.replace(sampler, timesteps=grid)
        grids = untuned_grids(self.T, self.steps)
        untuned = {name: judge(sampler, other) for name, other in grids.items()}
        ddim = tuple(time_grid(self.T, min(DDIM_STEPS, self.T)).tolist())
        found = judge(sampler, grid)
        return Distances(tuned, found, untuned, judge(DDIM, ddim), len(ddim))


def untuned_grids(num_timesteps: int, steps: int) -> dict[str, Grid]:
    """The grids that follow from T and the number of steps, by their names."""
    return {name: tuple(time_grid(num_timesteps, steps, name).tolist()) for name in GRIDS}


def check_tunable(sampler: Sampler, steps: int, ddpm: DDPM) -> None:
    """Raises UserError if the steps of `sampler` cannot be tuned."""
    T = ddpm.schedule.num_timesteps
    most = min(MOST_TUNED, T - 1)
    if most < LEAST_TUNED:
        raise UserError(f"steps: this model's {T} are too few to choose among")
    if not LEAST_TUNED <= steps <= most:
        raise UserError(f"steps: must be from {LEAST_TUNED} to {most} to be tuned, got {steps}")
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


class Result(NamedTuple):
    """What `tune` has found."""

    steps: int
    held: int
    """Starts that were held back."""
    compared: dict[str, float]
    """RMSE over the starts of the search, by the samplers that were tuned."""
    distances: Distances
    """Of the best of them."""
    choice: Choice | None
    """Where no sampler was named."""
    unit: str = "of 255"
    """What distances are given in."""

    @property
    def tuned(self) -> Tuned:
        """As the model keeps it."""
        choices = () if self.choice is None else (self.choice.best.sampler,)
        return Tuned((self.distances.sampler,), choices)


def tune(
    model: Loaded,
    steps: int,
    sampler: Sampler | None = None,
    *,
    images: int = 256,
    seed: int = 0,
    data: str | None = None,
    batch_size: int | None = None,
    out: epath.PathLike | None = None,
) -> Result:
    """The best sampler of `steps` steps, kept with the model's weights.

    With a deterministic `sampler`, given without steps, the best steps for it: of the starts
    0, ..., `images` - 1 of `seed`, one half is for the search and the other is held back. Without
    one, several are tuned, and the best competes with samplers that draw noise, by the KID of
    `images` other samples against real images, which `data` names as in `evaluate`; the best of
    these is judged by `images` samples more. Of a model with classes, they have labels as in
    `evaluate`, without guidance; where no images are read, all classes take turns. The result
    follows from the seed and the weights alone. It is written into the run, or to `out`: the
    model's own folder, or a new .safetensors file that holds the model, too. Raises UserError for
    what cannot be tuned, or where no images are known.
    """
    place = place_of(model, out)
    check_tunable(sampler or Sampler(COMPETITORS[0]), steps, model.ddpm)
    if images < LEAST:
        raise UserError(f"images: at least {LEAST} are needed to tune, got {images}")
    shared = (place if place.is_dir() else place.parent) / "evaluation" / "real"
    judge = None if sampler else kid_judge_of(model, data, shared)
    to_measure = None if sampler else to_calibrate_on(model, data)
    methods = [sampler] if sampler else [Sampler(name) for name in COMPETITORS]
    methods = [plain(each, model.ddpm) for each in methods]
    has_classes = model.ddpm.config.model.num_classes
    guide = judge.guide if judge and has_classes else guide_for(model.ddpm, None)
    calls = calls_of_search(model.ddpm, methods, steps, images)
    if judge:
        can_be_optimal = model.ddpm.calibration is not None or to_measure is not None
        candidates = 1 + len(GRIDS) * len(stochastic(can_be_optimal)) + FINALISTS
        calls += images * (steps * candidates + len(fine_steps(model.ddpm.schedule.num_timesteps)))
    announce(calls, to_measure[0] if to_measure else None, model.ddpm)
    if to_measure:
        model = calibrated(model, *to_measure, seed)
    with progress_bar(total=calls, desc="tuning", unit="call") as bar:
        chains = Chains(model, seed, batch_size or 64 * model.devices, bar.update, guide)
        search = Search(chains, steps, images)
        first = FIRST if len(methods) > 1 else EVALUATIONS
        compared = {each: search.error(each, search.best(each, first)) for each in methods}
        best = min(methods, key=lambda each: compared[each])
        distances = search.judged(best, search.best(best, EVALUATIONS))
        errors = {each.words: error for each, error in compared.items()}
        result = Result(steps, search.held, errors, distances, None, search.unit.words)
        keep(
            place, model, result, images, seed, guide
        )  # Before the comparison, which takes long, too.
        if judge:
            grids = untuned_grids(search.T, steps)
            choice = compare(chains, judge, distances.sampler, grids, images, images)
            result = result._replace(choice=choice)
            keep(place, model, result, images, seed, guide)
        bar.update(calls - bar.n)  # The search may have stopped early.
    return result


def plain(sampler: Sampler, ddpm: DDPM) -> Sampler:
    """The sampler without steps, in its simplest form."""
    return dataclasses.replace(sampler.simplest(ddpm.config.diffusion), timesteps=None)


def announce(calls: int, images: Images | None, ddpm: DDPM) -> None:
    """Says how many network calls follow; `images` are calibrated on."""
    line = f"tuning takes at most {calls:,} network calls (images times steps)"
    if images is not None:
        count = len(images.indices)
        T = ddpm.schedule.num_timesteps
        line += f", and its calibration on {count} images {count * T:,}"
    log.info("%s", line)


def place_of(model: Loaded, out: epath.PathLike | None) -> epath.Path:
    """The folder of the model, where `load` finds the result, or a new .safetensors file.

    Raises UserError if `out` is neither, if it is missing for a model that is no run, or if nothing
    can be written there.
    """
    path = model.home if out is None else path_of(out)
    if path.suffix == ".safetensors" and not path.is_dir():
        return new_path(path, "safetensors")
    if not (path.is_dir() and path.resolve() == path_of(model.path).resolve()):
        raise UserError(
            f"out: must be the model's own folder, or a new .safetensors file, got {out}"
        )
    check_writable(path / TUNED)
    return path


def keep(
    place: epath.Path,
    model: Loaded,
    result: Result,
    images: int,
    seed: int,
    guide: Guide = UNGUIDED,
) -> None:
    """Adds the result to those that are known of the weights, in `place`."""
    tuned = merged(model.ddpm.tuned, result.tuned)
    found = {**rounded(result), "images": images, "seed": seed, **guide.recorded}
    names = [_name(each) for each in result.tuned.grids]
    names += [f"choice {result.steps}" for _ in result.tuned.choices]
    about = {**model.measured.of_tuned, **dict.fromkeys(names, found)}
    if place.is_dir():
        write_tuned(place, model, tuned, about)
        place = place / TUNED
    else:
        export(place, model.tuned(tuned, about), "safetensors")
    log.info("kept: %s", place)


def calls_of_search(ddpm: DDPM, samplers: list[Sampler], steps: int, images: int) -> int:
    """The most network calls that tuning one of `samplers` takes: images times steps, summed."""
    search = images // 2
    held = images - search
    T = ddpm.schedule.num_timesteps
    begun = [network_calls(each, steps) for each in samplers]
    untuned = len(GRIDS)
    begin = untuned + len(POWERS)
    calls = images * len(fine_steps(T))
    if len(samplers) > 1:
        calls += search * (begin + FIRST) * sum(begun)
        calls += search * (EVALUATIONS - FIRST) * max(begun)
    else:
        calls += search * (begin + EVALUATIONS) * begun[0]
    return calls + held * ((untuned + 1) * max(begun) + min(DDIM_STEPS, T))


def merged(before: Tuned, found: Tuned) -> Tuned:
    """The results of both; those of the same sampler, options and number of steps are replaced."""

    def key(sampler: Sampler, choice: bool) -> tuple:
        method = None if choice else dataclasses.replace(sampler, timesteps=None)
        return method, len(sampler.timesteps or ())

    def both(old: tuple[Sampler, ...], new: tuple[Sampler, ...], choice: bool):
        entries = {key(each, choice): each for each in (*old, *new)}
        return tuple(entries[each] for each in sorted(entries, key=repr))

    return Tuned(both(before.grids, found.grids, False), both(before.choices, found.choices, True))


def rounded(result: Result) -> dict[str, Any]:
    """The figures of the result, as they are kept; None for one that is not finite."""
    distances = result.distances

    def figures(of: Distance) -> dict[str, float | None]:
        return {
            name: round(value, DIGITS) if np.isfinite(value) else None
            for name, value in of._asdict().items()
        }

    kept: dict[str, Any] = {
        "tuned": figures(distances.tuned),
        "untuned": {name: figures(each) for name, each in distances.untuned.items()},
        f"ddim {distances.ddim_steps}": figures(distances.ddim),
    }
    if result.choice is not None:
        kept["reason"] = result.choice.reason
    return kept


def table(result: Result) -> str:
    """The result as text."""
    distances = result.distances
    sampler = distances.sampler
    lines = []
    if len(result.compared) > 1:
        lines.append(
            f"nearest to the deterministic solution, RMSE {result.unit} over the search's starts:"
        )
        lines += [f"  {name:26}{error:9.3f}" for name, error in result.compared.items()]
    lines += [
        f"{sampler.words}, {result.steps} steps: RMSE {result.unit} from the deterministic "
        f"solution, over {result.held} starts held back",
        f"  {'':26}{'of all':>9}{'median of the images':>23}",
    ]
    rows = {"tuned": distances.tuned, **distances.untuned}
    rows[f"(ddim, {distances.ddim_steps} steps)"] = distances.ddim
    lines += [f"  {name:26}{each.rmse:9.3f}{each.median:23.3f}" for name, each in rows.items()]
    lines.append(f"the tuned steps: {' '.join(map(str, sampler.timesteps or ()))}")
    if result.choice is not None:
        lines += _rows_of(result.choice)
    return "\n".join(lines)


def _rows_of(choice: Choice) -> list[str]:
    lines = [f"KID against {choice.judge}, with its error:"]
    lines += [f"  {each.words:44}{each.kid:10.5f}{each.error:10.5f}" for each in choice.candidates]
    return [*lines, f"chosen: {choice.reason}"]


def _name(sampler: Sampler) -> str:
    return f"{sampler.words}, {len(sampler.timesteps or ())}"
