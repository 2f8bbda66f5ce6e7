"""Which sampler of few steps: deterministic and stochastic ones compared with real images by KID.

On a young model the deterministic solution is itself poor, however well a sampler follows it.
"""

import dataclasses
import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from etils import epath

from ddpm_jax.calls.conditions import UNGUIDED, Guide
from ddpm_jax.data.images import as_read, to_float
from ddpm_jax.devices.mesh import make_mesh
from ddpm_jax.devices.processes import agreed
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.bound import about_images, keep_calibration, measure
from ddpm_jax.evaluation.evaluate import real_images
from ddpm_jax.evaluation.features import all_features, cache_root, extract, proxy
from ddpm_jax.evaluation.flow import Chains
from ddpm_jax.evaluation.labels import guide_for
from ddpm_jax.evaluation.metrics import KernelDistance, kernel_distance
from ddpm_jax.evaluation.proxy import classifier_shapes
from ddpm_jax.evaluation.splits import Images, calibration_split, first_of, read_split
from ddpm_jax.sampler import Sampler
from ddpm_jax.storage.files import path_of
from ddpm_jax.storage.measured import CALIBRATION
from ddpm_jax.storage.run import is_run
from ddpm_jax.weights.load import Loaded

log = logging.getLogger(__name__)

STOCHASTIC = (
    Sampler("ancestral", variance="optimal"),
    Sampler("ddim", eta=0.5),
    Sampler("ddim", eta=1.0),
    Sampler("sde-dpm-solver++"),
)
"""The samplers that draw noise, without their steps."""

MOST_NUMBERS = 2**26
"""Most numbers of real images that are compared with."""

LEAST_ON_PIXELS = 8
"""Fewest real images that KID on pixels is computed from, however large they are."""

CALIBRATED_ON = 64
"""Images that a model without a calibration is calibrated on."""

Features = Callable[[np.ndarray], np.ndarray]


class KidJudge(NamedTuple):
    """What samples are compared with."""

    features: Features
    """Of float images [N,H,W,C] in [-1, 1]: [N,D]."""
    real: np.ndarray
    """[M,D] those of the real images."""
    words: str
    """What these are."""
    guide: Guide = UNGUIDED
    """The labels of the samples."""

    def kid(self, images: np.ndarray) -> KernelDistance:
        """The kernel distance of `images` from the real ones."""
        return kernel_distance(self.features(images), self.real)


class Candidate(NamedTuple):
    """A sampler with its steps, and how far its images are from real ones."""

    sampler: Sampler
    grid: str
    """The name of its grid."""
    kid: float
    error: float

    @property
    def words(self) -> str:
        """For example "ddim, eta 0.5, on trailing"."""
        return f"{self.sampler.words}, {self.grid}"


class Choice(NamedTuple):
    """The sampler of the least KID, or the deterministic one where noise gains nothing sure."""

    best: Candidate
    candidates: list[Candidate]
    """All that were compared, the deterministic one first."""
    judge: str
    reason: str


def kid_judge_of(model: Loaded, data: str | None, shared: epath.Path) -> KidJudge:
    """What samples of `model` are compared with: held-out images where there are any.

    On the features of a small classifier of the training images where they have labels, else on
    pixels. `data` is as in `evaluate`, and `shared` as in `cache_root`. Raises UserError if too few
    images are known.
    """
    try:
        sets = real_images(model, data)
    except UserError as error:
        raise UserError(f"{error}; or name a --sampler, which needs no images") from error
    train = sets[0]
    real = sets[-1]
    if len(real.indices) < 4:
        raise UserError(
            f"data: at least 4 images are needed to compare with, got {len(real.indices)}"
        )
    guide = guide_for(model.ddpm, train)
    words = f"{len(real.indices)} images of {real.split}"
    try:
        classifier_shapes(train.source, train.indices)
    except UserError as error:
        log.info("KID is that of pixels: %s", error)
        most = max(LEAST_ON_PIXELS, MOST_NUMBERS // int(np.prod(model.ddpm.image_shape)))
        places = np.unique(np.linspace(0, len(real.indices) - 1, most).astype(int))
        images = np.asarray(to_float(real.source.read(real.indices[places])))
        return KidJudge(_pixels, _pixels(images), f"{words}, on pixels", guide)
    root = cache_root(train.source, shared)
    extractor = proxy(train.source, train.indices, root, make_mesh())

    def features(images: np.ndarray) -> np.ndarray:
        return extract(extractor, as_read(images, model.ddpm.levels)).features

    there = all_features(extractor, real.source, real.indices, root)
    return KidJudge(features, there, f"{words}, on the features of a proxy", guide)


def _pixels(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1)


def to_calibrate_on(model: Loaded, data: str | None) -> tuple[Images, int | None] | None:
    """The few images that a calibration shall be measured on, as `first_of` gives them.

    None where the model has one, or, said in a line, where it cannot be measured and kept here.
    """
    if model.ddpm.calibration is not None:
        return None
    left_out = "the ancestral sampler is left out, since its best variance needs a calibration"
    if not is_run(model.path):
        log.info("%s: make one with ddpm-jax calibrate", left_out)
        return None
    try:
        model.ddpm.config.diffusion.check_bound()
        return first_of(read_split(model, calibration_split(model), data), CALIBRATED_ON)
    except UserError as error:
        log.info("%s: %s", left_out, error)
        return None


def calibrated(model: Loaded, images: Images, first: int | None, seed: int) -> Loaded:
    """The model with a calibration, measured on `images` and kept in its run."""
    calibration = measure(model, images, 1, seed, first=first, calibrating=True).calibration
    assert calibration is not None  # That is what `calibrating` asks for.
    keep_calibration(path_of(model.path) / CALIBRATION, model, images, seed, calibration)
    return model.calibrated(calibration, about_images(model, images, seed))


def stochastic(optimal: bool) -> list[Sampler]:
    """Those of STOCHASTIC; the ones with the optimal variance only if `optimal`."""
    return [each for each in STOCHASTIC if optimal or each.variance is None]


def compare(
    chains: Chains,
    judge: KidJudge,
    deterministic: Sampler,
    grids: dict[str, tuple[int, ...]],
    start: int,
    count: int,
) -> Choice:
    """`deterministic`, with its tuned steps, against the stochastic samplers on each of `grids`.

    By the KID of images start, ..., start + count - 1. The least of many figures is too low by
    chance, so the best stochastic one is judged against `deterministic` by `count` more images,
    and so is the fine solution, the best that `deterministic` could come to.
    """

    def candidate(sampler: Sampler, grid: str, start: int) -> Candidate:
        method = dataclasses.replace(sampler, timesteps=None)
        images = chains.finite_images(method, sampler.timesteps or (), start, count)
        if images is None:
            return Candidate(sampler, grid, np.inf, 0.0)
        kid = judge.kid(images)
        mean, error = agreed(np.array([kid.mean, kid.error]))
        return Candidate(sampler, grid, float(mean), float(error))

    first = candidate(deterministic, "tuned", start)
    others = [
        candidate(dataclasses.replace(sampler, timesteps=steps), name, start)
        for sampler in stochastic(chains.model.ddpm.calibration is not None)
        for name, steps in grids.items()
    ]
    best = min(others, key=lambda each: each.kid)
    finals = [candidate(each.sampler, each.grid, start + count) for each in (first, best)]
    solution = judge.kid(chains.fine(start + count, count)).mean
    candidates = [first, *others]
    return chosen(finals[0], finals[1], float(agreed(solution)), candidates, judge.words)


def chosen(
    first: Candidate, best: Candidate, solution: float, candidates: list[Candidate], judge: str
) -> Choice:
    """`best`, which draws noise, if its KID is lower than that of `first` by more than the error.

    `solution` is the KID of the fine solution. It and the figures of these two come from other
    images than those of all `candidates`.
    """
    gain = first.kid - best.kid
    error = float(np.hypot(first.error, best.error))
    figures = (
        f"KID of more samples {best.kid:.5f} against {first.kid:.5f}, error of the difference "
        f"{error:.5f}"
    )
    of_solution = f"the deterministic solution itself has {solution:.5f}"
    if gain > error:
        reason = (
            f"{best.words}: its images are nearer to real ones than those of {first.words} "
            f"({figures}); {of_solution}"
        )
        return Choice(best, candidates, judge, reason)
    reason = (
        f"{first.words}: no sampler with noise is better by more than the error "
        f"(the best, {best.words}: {figures}); {of_solution}"
    )
    return Choice(first, candidates, judge, reason)
