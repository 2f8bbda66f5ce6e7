"""How samplers do with few steps.

Two questions: how far are the images of a deterministic sampler from the model's fine solution,
and how near are the images of any sampler to real ones?
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, get_args

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ddpm_jax.calls.conditions import UNGUIDED, Guide
from ddpm_jax.config import SamplerName, Split
from ddpm_jax.data.images import as_read
from ddpm_jax.ddpm import DDPM
from ddpm_jax.evaluation import metrics
from ddpm_jax.evaluation.evaluate import real_images
from ddpm_jax.evaluation.features import (
    Extractor,
    Reference,
    cache_root,
    extract,
    extractor_of,
    reference_of,
)
from ddpm_jax.evaluation.flow import Chains, network_calls, squared_differences
from ddpm_jax.evaluation.labels import guide_for
from ddpm_jax.keys import TUNING, seed_key
from ddpm_jax.sampler import MeasuredGrid, Sampler
from ddpm_jax.samplers import SAMPLERS, Grid
from ddpm_jax.weights.load import Loaded

HELD_BACK = 2**31
"""The first start that samplers are compared on; `tune` takes those from 0 on."""

STARTS = 256
"""At most this many images are compared with the fine solution, which takes long."""


class Contestant(NamedTuple):
    """A sampler at one number of steps."""

    name: str
    """The same for all numbers of steps."""
    sampler: Sampler
    """With explicit timesteps where its grid was measured."""
    steps: int

    @property
    def deterministic(self) -> bool:
        """Whether its images follow from x_T alone."""
        return self.sampler.method.deterministic and not self.sampler.eta

    @property
    def calls(self) -> int:
        """How often an image calls the network."""
        return network_calls(self.sampler, self.steps)


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    error: float


class FidJudge(NamedTuple):
    """What images are compared with real ones by."""

    extractor: Extractor
    references: dict[Split, Reference]
    """Of the images trained on and, where they are known, of others."""
    guide: Guide = UNGUIDED
    """The labels of the samples."""
    levels: int | None = 256
    """Of the images' values; None for continuous ones."""

    @property
    def split(self) -> Split:
        """The images to compare with: those not trained on where they are known."""
        return list(self.references)[-1]

    @property
    def score(self) -> str:
        """The name of what it computes."""
        return "proxy FID" if self.extractor.kind == "proxy" else "FID"


def contestants(ddpm: DDPM, steps: Iterable[int], all_grids: bool = False) -> list[Contestant]:
    """Every sampler at each number of `steps` of at most T, on its default grid.

    With `all_grids` also on the others. Ancestral sampling with the optimal variance joins where
    the model has a calibration, and what was tuned to it at these numbers of steps.
    """
    T = ddpm.config.diffusion.num_timesteps
    counts = [S for S in dict.fromkeys(steps) if S <= T]
    chosen = []
    for name in get_args(SamplerName):
        method = SAMPLERS[name]
        grids: dict[str, Grid | None] = {name: None}
        if all_grids:
            others = [grid for grid in get_args(Grid) if grid != method.grid]
            grids |= {f"{name}, {grid}": grid for grid in others}
        for label, grid in grids.items():
            chosen += [_contestant(label, ddpm, _untuned(ddpm, name, S, grid)) for S in counts]
    chosen += _calibrated(ddpm, counts, all_grids)
    for each in ddpm.tuned.grids:
        chosen.append(_contestant(f"{each.name}, tuned", ddpm, each))
    for each in ddpm.tuned.choices:
        chosen.append(_contestant("tuned choice", ddpm, each))
    return [each for each in chosen if each.steps in counts]


def _untuned(ddpm: DDPM, name: SamplerName, steps: int, grid: Grid | None) -> Sampler:
    """With its variance given where it is fixed_small, which is then no news to be logged."""
    sampler = Sampler(name, steps, grid=grid)
    if name == "ancestral" and sampler.variance_of(ddpm.config.diffusion) == "fixed_small":
        return dataclasses.replace(sampler, variance="fixed_small")
    return sampler


def _calibrated(ddpm: DDPM, counts: list[int], all_grids: bool) -> list[Contestant]:
    """Ancestral sampling with the optimal variance, where there is a calibration."""
    if ddpm.calibration is None:
        return []
    grids: dict[str, Grid | MeasuredGrid | None] = {"ancestral, optimal variance": None}
    if all_grids:
        grids["ancestral, optimal variance, likelihood"] = "likelihood"
    return [
        _contestant(label, ddpm, Sampler("ancestral", S, grid=grid, variance="optimal"))
        for label, grid in grids.items()
        for S in counts
    ]


def _contestant(name: str, ddpm: DDPM, sampler: Sampler) -> Contestant:
    sampler = ddpm.resolve(sampler)
    return Contestant(name, sampler, len(sampler.timesteps_of(ddpm.config.diffusion)))


def draw(
    model: Loaded,
    sampler: Sampler,
    seed: int,
    start: int,
    count: int,
    move: Callable[[int], Any],
    *,
    batch_size: int = 64,
    guide: Guide = UNGUIDED,
) -> np.ndarray:
    """Images start, ..., start + count - 1 of `seed`, float32 [count,H,W,C] in [-1, 1].

    Their starts are none that `tune` searches on or judges by. `sampler` is resolved; `batch_size`
    counts the images on each device. A sampler has one program for all numbers of steps; ancestral
    sampling with all T, or with another variance than fixed_small or optimal, has one for each.
    `move` and `guide` as for `Chains`.
    """
    diffusion = model.ddpm.config.diffusion
    grid = tuple(sampler.timesteps_of(diffusion).tolist())
    batch_size *= model.devices
    start += HELD_BACK
    known = sampler.variance_of(diffusion) in ("fixed_small", "optimal")
    if sampler.name == "ancestral" and not (known and sampler.strides(diffusion)):
        rng = jax.random.fold_in(seed_key(seed), TUNING)  # The key of Chains.
        parts = []
        for first in range(0, count, batch_size):
            n = min(batch_size, count - first)
            at = start + first
            given = guide.of(at + np.arange(n)) if guide.recorded else {}
            images = model.ddpm.sample(
                model.params, rng, n, start=at, batch_size=batch_size, sampler=sampler, **given
            )
            parts.append(images)
            move(n * len(grid))
        return np.concatenate(parts)
    method = dataclasses.replace(sampler, steps=None, grid=None, timesteps=None)
    return Chains(model, seed, batch_size, move, guide).images(method, grid, start, count)


def draw_fine(
    model: Loaded,
    seed: int,
    start: int,
    count: int,
    move: Callable[[int], Any],
    guide: Guide = UNGUIDED,
) -> np.ndarray:
    """The same images of the fine solution."""
    chains = Chains(model, seed, 64 * model.devices, move, guide)
    return chains.fine(HELD_BACK + start, count)


def distance(images: np.ndarray, fine: np.ndarray, unit: float = 127.5) -> Estimate:
    """Root mean squared difference of images [N,H,W,C] in [-1, 1] from the fine ones.

    It is of 255, or whatever `unit` of it the model's unit is.

    `fine` holds those of the first of the same starts. The error is that of the choice of starts.
    """
    squares = squared_differences(images[: len(fine)], fine, unit)
    value = float(np.sqrt(squares.mean()))
    if len(squares) < 2 or not value:
        return Estimate(value, 0.0)
    error = squares.std(ddof=1) / np.sqrt(len(squares)) / (2 * value)
    return Estimate(value, float(error))


def fid_judge_of(
    model: Loaded,
    data: str | None,
    inception_file: epath.PathLike | None,
    shared: epath.Path,
    mesh: Mesh,
) -> FidJudge:
    """The FidJudge of a model's samples, by features as `evaluate` takes them.

    `data` and `inception_file` are as for `evaluate`, `shared` as for `cache_root`. Raises
    UserError where there are no such images, or none with labels for the proxy.
    """
    sets = real_images(model, data)
    train = sets[0]
    root = cache_root(train.source, shared)
    data_of_model = model.ddpm.config.data
    extractor = extractor_of(inception_file, data_of_model, train.source, train.indices, root, mesh)
    references = {
        each.split: reference_of(extractor, each.source, each.indices, root) for each in sets
    }
    return FidJudge(extractor, references, guide_for(model.ddpm, train), model.ddpm.levels)


def fids(judge: FidJudge, images: np.ndarray) -> dict[Split, Estimate]:
    """FID of images [N,H,W,C] in [-1, 1] against each set of real ones, with its error.

    The error is `metrics.fid_error`'s, which covers the choice of the samples.
    """
    features = extract(judge.extractor, as_read(images, judge.levels)).features
    own = metrics.statistics(features)
    return {
        split: Estimate(
            metrics.frechet_distance(own, reference.statistics),
            metrics.fid_error(features, reference.statistics),
        )
        for split, reference in judge.references.items()
    }
