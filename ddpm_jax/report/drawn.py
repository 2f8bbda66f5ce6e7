"""What a report computes itself: a few samples on their way, and the images nearest to them."""

import logging
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ddpm_jax.data.images import as_read
from ddpm_jax.data.view import View
from ddpm_jax.figures.base import labels_in_turn
from ddpm_jax.figures.neighbours import distance_between, nearest_to, pixel_space
from ddpm_jax.keys import seed_key
from ddpm_jax.report.chain import Trace, trace
from ddpm_jax.report.real import Real
from ddpm_jax.report.run import Run
from ddpm_jax.shapes import UInt8
from ddpm_jax.weights.load import load_for_command

log = logging.getLogger(__name__)

SAMPLES = 8
NEAREST = 5

MOST_SEARCHED = 2**28
"""Numbers of all training images that are searched: those of CIFAR10 are 154 million."""


class Near(NamedTuple):
    """The training images nearest to the samples."""

    images: np.ndarray
    """[N,K,H,W,C], as a Source reads them."""
    index: np.ndarray  # type: ignore[assignment] # no one searches a tuple
    """[N,K] their indices in the source."""
    distance: np.ndarray
    """[N,K]."""
    typical: float
    """The median from a training image to its nearest other one."""
    words: str
    """The meaning of the distances."""


class Drawn(NamedTuple):
    """Samples of a run's newest checkpoint."""

    weights: str
    """For example "ema weights of step 5000"."""
    t: np.ndarray
    """[F], as in a Trace."""
    x: UInt8[np.ndarray, "f n h w c"]
    x_0: UInt8[np.ndarray, "f n h w c"]
    labels: np.ndarray | None
    """[N] their classes."""
    near: Near | None
    """None where the images are not there, or too many to search."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an image."""
        return self.x.shape[2:]


Draws = Mapping[str, Drawn | str]
"""{a run's name: its samples, or why there are none}."""


def draw(run: Run, real: Real | None) -> Drawn:
    """A few samples of the run's newest checkpoint, and which of the `real` images are nearest.

    Raises UserError if there is no checkpoint that can be used, or samples are not finite.
    """
    model = load_for_command(run.path, None, None, None)
    ddpm = model.ddpm
    labels = labels_in_turn(ddpm, SAMPLES)
    log.info("%s: drawing %d samples (--compute none leaves them out)", run.name, SAMPLES)
    drawn = trace(ddpm, model.params, seed_key(0), SAMPLES, labels)
    view = View(run.config.data)
    near = None if real is None or is_too_many(run, real) else _near(run, real, drawn)
    return Drawn(model.words, drawn.t, view(drawn.x), view(drawn.x_0), labels, near)


def is_too_many(run: Run, real: Real) -> bool:
    """Whether the nearest images take too long to find."""
    return len(real.train) * int(np.prod(run.config.data.image_shape)) > MOST_SEARCHED


def _near(run: Run, real: Real, drawn: Trace) -> Near:
    flip = run.config.data.flip
    space = pixel_space(run.ddpm, real.source, real.train)
    samples = as_read(drawn.x[-1], run.ddpm.levels)
    found = nearest_to(space, samples, min(NEAREST, len(real.train)), flip)
    images = np.stack([real.source.read(real.train[row]) for row in found.index])
    typical = distance_between(space, real.source, real.train, flip)
    return Near(images, real.train[found.index], found.distance, typical, space.words)
