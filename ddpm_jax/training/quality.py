"""FID and KID of samples, and bits/dim of held-out images, while a model trains."""

import logging
import math
from typing import Any

import numpy as np
from etils import epath

from ddpm_jax.config import Config
from ddpm_jax.data.images import as_read, to_float
from ddpm_jax.ddpm import DDPM
from ddpm_jax.devices.rows import full_batches
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import metrics
from ddpm_jax.evaluation.evaluate import LEAST, warn_of_few
from ddpm_jax.evaluation.features import (
    BATCH,
    cache_root,
    check_inception,
    extract,
    extractor_of,
    reference_of,
)
from ddpm_jax.evaluation.inception_weights import load_inception
from ddpm_jax.evaluation.labels import guide_for, labels_of
from ddpm_jax.evaluation.proxy import classifier_shapes
from ddpm_jax.evaluation.splits import Images
from ddpm_jax.keys import WATCHED_BOUND, WATCHED_SAMPLES
from ddpm_jax.sampler import Sampler
from ddpm_jax.shapes import PyTree
from ddpm_jax.training.holdout import spread
from ddpm_jax.training.prepare import Prepared
from ddpm_jax.training.signals import UntilSignal
from ddpm_jax.training.update import run_key

log = logging.getLogger(__name__)

STEPS = 50
"""Steps of DDIM. Song et al. 2020, Table 1: FID 4.67 on CIFAR-10, and 4.04 in all 1000 steps."""


class Quality:
    """Measures the samples and the bound of a run's weights, with the same keys every time.

    The samples are compared with the images trained on: by Inception with the weights of
    train.inception, or else by the proxy of `ddpm-jax evaluate`, which keeps both in its cache.
    bits/dim is the bound of the whole chain, over so many held-out images that they take as many
    calls of the network as the samples, spread evenly over those there are.
    """

    def __init__(self, prepared: Prepared, shared: epath.Path):
        """`shared` is a folder that all processes see. Raises UserError as `check_quality` does."""
        config = prepared.config
        self.ddpm = prepared.ddpm
        self.source = prepared.source
        self.n = config.train.evaluate_images
        # As many as a training step takes: what fits in memory with gradients fits without.
        self.batch_size = config.train.batch_size // config.train.accumulate
        train = Images("train", prepared.source, prepared.train)
        self.labels = guide_for(self.ddpm, train).of(np.arange(self.n))["labels"]
        self.held_out = bound_images(prepared)
        root = cache_root(prepared.source, shared)
        self.extractor = extractor_of(
            config.train.inception,
            config.data,
            prepared.source,
            prepared.train,
            root,
            prepared.mesh,
        )
        self.reference = reference_of(self.extractor, prepared.source, prepared.train, root)
        warn_of_few(self.n, {"train": self.reference})

    def measure(self, params: PyTree, progress: UntilSignal) -> dict[str, float]:
        """The values of these weights, by their names in the log; ends as `progress` does."""
        return {**self._of_samples(params, progress), **self._of_bound(params, progress)}

    def _of_samples(self, params: PyTree, progress: Any) -> dict[str, float]:
        rng = run_key(self.ddpm.config, WATCHED_SAMPLES)
        x = self.ddpm.sample(
            params,
            rng,
            self.n,
            labels=self.labels,
            batch_size=self.batch_size,
            sampler=sampler_of(self.ddpm),
            progress=progress,
        )
        images = as_read(x, self.ddpm.levels)
        features = []
        for rows, count in full_batches(self.n, BATCH * self.extractor.mesh.size):
            progress.update(0)
            features.append(extract(self.extractor, images[rows]).features[:count])
        drawn = np.concatenate(features)
        own = metrics.statistics(drawn)
        values = [
            metrics.frechet_distance(own, self.reference.statistics),
            metrics.kernel_distance(drawn, self.reference.features).mean,
        ]
        return dict(zip(names_of_samples(self.ddpm.config), values, strict=True))

    def _of_bound(self, params: PyTree, progress: Any) -> dict[str, float]:
        if not len(self.held_out):
            return {}
        rng = run_key(self.ddpm.config, WATCHED_BOUND)
        images = Images("holdout", self.source, self.held_out)
        labels = labels_of(self.ddpm, images)
        x_0 = to_float(self.source.read(self.held_out))
        bits = self.ddpm.bits_per_dim(
            params, rng, x_0, labels=labels, batch_size=self.batch_size, progress=progress
        )
        return {"bits_per_dim": float(bits.total.mean(dtype=np.float64))}


def sampler_of(ddpm: DDPM) -> Sampler:
    """The sampler of the samples: DDIM of STEPS steps, or all T where there are fewer."""
    return Sampler("ddim", min(STEPS, ddpm.schedule.num_timesteps))


def names_of_samples(config: Config) -> tuple[str, str]:
    """The names in the log of FID and KID, by the features that a run takes."""
    return ("fid", "kid") if config.train.inception else ("proxy_fid", "proxy_kid")


def bound_images(prepared: Prepared) -> np.ndarray:
    """The held-out images [N] whose bits/dim are measured; none if `why_no_bound` says why."""
    if why_no_bound(prepared) is not None:
        return prepared.held_out[:0]
    T = prepared.ddpm.schedule.num_timesteps
    calls = prepared.config.train.evaluate_images * min(STEPS, T)
    return spread(prepared.held_out, math.ceil(calls / T))


def why_no_bound(prepared: Prepared) -> str | None:
    """Why bits/dim cannot be measured; None where it can."""
    if not len(prepared.held_out):
        return "no images are held out (data.holdout)"
    try:
        prepared.config.diffusion.check_bound()
    except UserError:
        return "the bound of this model is infinite (diffusion.schedule, without diffusion.clip)"
    return None


def check_quality(prepared: Prepared) -> None:
    """Raises UserError if a run like this cannot be evaluated, in one line with the remedy."""
    config = prepared.config
    count = len(prepared.train)
    if count < LEAST:
        raise UserError(
            f"train.evaluate_every: at least {LEAST} training images are needed to compare with, "
            f"got {count}; add some, or leave it at 0"
        )
    if config.train.inception is None:
        _check_proxy(prepared)
        return
    check_inception(config.data, "train.inception")
    load_inception(config.train.inception)


def _check_proxy(prepared: Prepared) -> None:
    try:
        classifier_shapes(prepared.source, prepared.train)
    except UserError as error:
        reason = str(error).replace("--inception", "--train.inception")
        raise UserError(f"train.evaluate_every: {reason}, or leave it at 0") from error
