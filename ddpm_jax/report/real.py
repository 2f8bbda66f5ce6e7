"""The real images of a run, read again from where its config says that they are."""

import dataclasses
from typing import NamedTuple

import numpy as np

from ddpm_jax.config import Config
from ddpm_jax.config.places import CHOICES
from ddpm_jax.data import Source, load_source, split
from ddpm_jax.data.images import to_float
from ddpm_jax.data.names import shown
from ddpm_jax.data.scaled import scaled
from ddpm_jax.data.view import View
from ddpm_jax.errors import UserError
from ddpm_jax.report.pictures import tiles
from ddpm_jax.report.run import Run

SHOWN = 64
"""Images of the sheet."""
COLUMNS = 8


class Real(NamedTuple):
    """The images that a run was trained on."""

    source: Source
    train: np.ndarray
    """[N] those of the source that are trained on."""
    held_out: int
    """How many are not."""
    is_same: bool
    """Whether they are known to be those of the training."""


Reals = dict[str, Real | str]
"""{a run's name: its real images, or why they cannot be shown}."""


def read_real(run: Run, place: str | None = None) -> Real:
    """The images of `place`, named as data.source, or else of the run's own source.

    Raises UserError, in one line, if they are not there now or do not fit the model.
    """
    config = run.config
    if place is None and config.data.source == "array":
        raise UserError(
            "the run was trained on an array, which no file holds; name the images with "
            f"--data {CHOICES}"
        )
    data = config.data
    if place is not None:
        data = dataclasses.replace(data, source=place)
    source = scaled(load_source(data), data)
    train, held_out = split(source, data.holdout)
    return Real(source, train, len(held_out), source.fingerprint == run.fingerprint)


def sheet(config: Config, real: Real) -> np.ndarray:
    """A picture uint8 [H,W,1 or 3] of training images, evenly spread over all of them."""
    places = np.linspace(0, len(real.train) - 1, min(SHOWN, len(real.train))).astype(int)
    images = real.source.read(real.train[places])
    return tiles(View(config.data)(to_float(images)), COLUMNS)


def words_of_source(config: Config) -> str:
    """Where the images come from."""
    return shown(config.data.source)
