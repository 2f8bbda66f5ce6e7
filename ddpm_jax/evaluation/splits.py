"""The images that a model was trained on, those that it was not, and those of a test set."""

import dataclasses
from typing import Literal

import numpy as np

from ddpm_jax.config import Config
from ddpm_jax.data import Source, load_source
from ddpm_jax.data import split as divide
from ddpm_jax.errors import UserError
from ddpm_jax.weights.load import Loaded

Split = Literal["train", "holdout", "test"]


def default_split(config: Config) -> Split:
    """The split that figures are reported on: test where there is one, as in the paper, else holdout."""
    return "test" if config.data.test or not config.data.holdout else "holdout"


def read_split(model: Loaded, split: Split, data: str | None = None) -> tuple[Source, np.ndarray]:
    """(source, indices) of the images of `split`: train and holdout as they were in training, or data.test.

    `data` (folder:PATH, npz:PATH or tfds:NAME) is where to read them instead of where the config says. Where it is not
    known what the model was trained on, train is all of `data`. Raises UserError if the split is empty or
    unknown, or images of train and holdout are not those of the training.
    """
    config = model.ddpm.config.data
    if split == "test":
        if (data or config.test) is None:
            own = "holdout" if config.holdout else "train"
            raise UserError(
                "split: this run has no test images; name some with --split test --data folder:PATH, "
                f"or choose --split {own}"
            )
        source = load_source(dataclasses.replace(config, test=data or config.test), test=True)
        return source, np.arange(len(source))
    if split not in ("train", "holdout"):
        raise UserError(f"split: {split!r} is not one of train, holdout, test")
    if split == "holdout" and model.data_fingerprint is None:
        raise UserError(
            "split: what this model held out is not known; choose --split train or test"
        )
    if config.source == "array" and data is None:
        raise UserError(
            "data: this model had its images from elsewhere; pass --data npz:PATH (folder:PATH, tfds:NAME)"
        )
    source = load_source(dataclasses.replace(config, source=data or config.source))
    if model.data_fingerprint is None:
        return source, np.arange(len(source))
    if source.fingerprint != model.data_fingerprint:
        raise UserError(
            f"data: {data or config.source} holds other images than this model was trained on"
        )
    indices = divide(source, config.holdout)[split == "holdout"]
    if not len(indices):
        raise UserError(
            "split: this run held nothing out (data.holdout 0); choose --split train or test"
        )
    return source, indices
