"""The held-out loss, how it lies over the steps t, and how far it is above training images' own."""

import functools
import logging
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.data import Source
from ddpm_jax.data.images import to_float
from ddpm_jax.ddpm import DDPM
from ddpm_jax.devices.mesh import fetch, mesh_of, place
from ddpm_jax.devices.rows import full_batches
from ddpm_jax.keys import HOLDOUT, example_keys, random_times
from ddpm_jax.shapes import PyTree
from ddpm_jax.training.logs import Values
from ddpm_jax.training.update import run_key

log = logging.getLogger(__name__)

BANDS = 10
"""Parts of equal width that the steps 0, ..., T - 1 are divided into."""

CLEAR = 3.0
"""Standard errors of the gap that it must be above 0 by, for a model to be said to overfit."""

RISE = 1.01
"""And the held-out loss must be above this times its best."""


class Compared(NamedTuple):
    """The losses of held-out images, and of as many training images at the same t and noise."""

    held_out: list[np.ndarray]
    """float32 [N], in batches."""
    trained: np.ndarray
    """float32 [N]."""
    t: np.ndarray
    """int [N]."""
    T: int

    @property
    def loss(self) -> float:
        """The mean held-out loss."""
        return _mean(self.held_out)

    @property
    def differences(self) -> np.ndarray:
        """Held-out minus training image, pair by pair: float64 [N]."""
        return np.concatenate(self.held_out).astype(np.float64) - self.trained

    @property
    def gap_error(self) -> float:
        """Standard error of the mean difference; infinite for fewer than two pairs."""
        n = len(self.differences)
        return float(self.differences.std(ddof=1) / math.sqrt(n)) if n > 1 else math.inf

    @property
    def values(self) -> Values:
        """The means by the names that the log has; a band without images is None."""
        return {
            "holdout_loss": self.loss,
            "holdout_gap": float(self.differences.mean()),
            "holdout_bands": self._bands(np.concatenate(self.held_out)),
            "gap_bands": self._bands(self.differences),
        }

    def _bands(self, each: np.ndarray) -> list[float | None]:
        """The mean of `each` [N] in each of the BANDS of t."""
        of_each = self.t * BANDS // self.T
        inside = [each[of_each == band] for band in range(BANDS)]
        return [float(np.mean(some, dtype=np.float64)) if len(some) else None for some in inside]


def holdout_loss(ddpm: DDPM, params: PyTree, source: Source, indices: np.ndarray) -> float:
    """The mean loss over the held-out images `indices` of `source`.

    Each image gets the same t and noise in every call.
    """
    return _mean(_losses(ddpm, params, source, indices))


def compare(
    ddpm: DDPM, params: PyTree, source: Source, held_out: np.ndarray, train: np.ndarray
) -> Compared:
    """The losses of the images `held_out` [N] of `source` and of as many of `train`.

    The i-th of both get the same t and noise, in every call. Where there are fewer training images,
    some are taken more than once.
    """
    others = spread(train, len(held_out), repeat=True)
    return Compared(
        _losses(ddpm, params, source, held_out),
        np.concatenate(_losses(ddpm, params, source, others)),
        _times(ddpm, len(held_out)),
        ddpm.schedule.num_timesteps,
    )


def spread(indices: np.ndarray, most: int, repeat: bool = False) -> np.ndarray:
    """At most `most` of `indices`, evenly spaced; with `repeat` always so many."""
    n = most if repeat else min(len(indices), most)
    return indices[np.linspace(0, len(indices) - 1, n).astype(int)]


class Overfitting:
    """Finds out from the held-out losses when the model overfits, and says so once."""

    def __init__(self, before: dict[int, float]):
        """`before` are the held-out losses of earlier starts, {step: loss}."""
        self._losses = dict(sorted(before.items()))
        self._said = False

    def add(self, step: int, compared: Compared) -> None:
        """Takes what was measured after `step`; logs a line if it shows that the model overfits.

        It does if the held-out loss is CLEAR standard errors above the training images' own at the
        same t and noise, and if it has been rising: its best is two or more evaluations ago, and
        the last is the highest since then, above RISE times the best.
        """
        self._losses[step] = compared.loss
        gap = float(compared.differences.mean())
        if self._said or gap <= CLEAR * compared.gap_error:
            return
        best = min(self._losses, key=self._losses.__getitem__)
        since = [loss for at, loss in self._losses.items() if at > best]
        low = self._losses[best]
        if len(since) < 2 or since[-1] < max(since) or since[-1] <= low + (RISE - 1) * abs(low):
            return
        self._said = True
        log.warning(
            "step %d: the model overfits: the held-out loss is %.4g, up from %.4g at step %d, and "
            "that of training images %.4g less (standard error %.2g); stop here, add images or "
            "raise model.dropout",
            step,
            compared.loss,
            low,
            best,
            gap,
            compared.gap_error,
        )


def _losses(ddpm: DDPM, params: PyTree, source: Source, indices: np.ndarray) -> list[np.ndarray]:
    """The loss of each of the images `indices` [N] of `source`, in batches: float32."""
    config = ddpm.config
    mesh = mesh_of(params)
    losses = []
    for rows, count in full_batches(len(indices), config.train.batch_size):
        rng = jax.random.fold_in(run_key(config, HOLDOUT), rows[0])
        images = place(source.read(indices[rows]), mesh)
        labels = None
        if config.model.num_classes and source.labels is not None:
            labels = place(source.labels[indices[rows]], mesh)
        losses.append(fetch(_loss(ddpm, params, rng, images, labels))[:count])
    return losses


def _mean(losses: list[np.ndarray]) -> float:
    total = 0.0
    for batch in losses:
        total += float(np.sum(batch, dtype=np.float64))
    return total / sum(len(batch) for batch in losses)


@functools.partial(jax.jit, static_argnums=0)
def _loss(ddpm, params, rng, images, labels=None):
    return ddpm.loss(params, rng, to_float(images), labels=labels)


@functools.cache
def _times(ddpm: DDPM, n: int) -> np.ndarray:
    """The steps t [n] that `_losses` takes for n images."""
    size = ddpm.config.train.batch_size
    times = []
    for rows, count in full_batches(n, size):
        rng = jax.random.fold_in(run_key(ddpm.config, HOLDOUT), rows[0])
        times.append(np.asarray(_times_of(rng, size, ddpm.schedule.num_timesteps))[:count])
    return np.concatenate(times)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _times_of(rng, size: int, T: int):
    """As `DDPM.loss` draws them."""
    return random_times(example_keys(rng, jnp.arange(size, dtype=jnp.uint32)), T)
