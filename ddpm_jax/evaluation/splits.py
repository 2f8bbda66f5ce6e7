"""The images of a split: those a model was trained on, those held out, or those of a test set."""

import dataclasses
import logging
import typing
from typing import NamedTuple

import numpy as np

from ddpm_jax.config import Config, Split
from ddpm_jax.config.places import CHOICES
from ddpm_jax.data import Source, load_source, split
from ddpm_jax.data.class_names import numbered_words
from ddpm_jax.data.names import shown
from ddpm_jax.data.scaled import scaled
from ddpm_jax.errors import UserError
from ddpm_jax.weights.load import Loaded

log = logging.getLogger(__name__)


class Images(NamedTuple):
    """A set of real images."""

    split: Split
    source: Source
    indices: np.ndarray
    """[N] the images of the source that belong to the set."""


def default_split(config: Config) -> Split:
    """The split to report results on: test if there is one, as in the paper, else holdout.

    If the run has neither, it is test.
    """
    return "test" if config.data.test or not config.data.holdout else "holdout"


def calibration_split(model: Loaded) -> Split | None:
    """The split to calibrate on: images held out rather than the test set, None for `read_split`'s.

    Results are reported on the test set, which should not have been looked at before.
    """
    has_holdout = model.ddpm.config.data.holdout and model.data_fingerprint is not None
    return "holdout" if has_holdout else None


def first_of(images: Images, n: int | None) -> tuple[Images, int | None]:
    """(the first n of `images`, n), or (all of them, None) where they are no more; says so."""
    there = len(images.indices)
    if n is None or n == there:
        return images, None
    if n > there:
        log.info("images: %s has %d, which are all taken", images.split, there)
        return images, None
    return images._replace(indices=images.indices[:n]), n


def read_split(model: Loaded, split: Split | None = None, data: str | None = None) -> Images:
    """The images of `split`: train and holdout as they were in training, or data.test.

    `split` None is `default_split`. `data`, named as data.source, is read instead of the
    config's own source. If the training data is not known, train is all of `data`. Raises
    UserError if the split is empty or unknown, or if the images to take train or holdout from are
    not those of the training.
    """
    split = split or default_split(model.ddpm.config)
    if split not in typing.get_args(Split):
        raise UserError(f"split: must be one of {', '.join(typing.get_args(Split))}, got {split!r}")
    if split == "test":
        return _read_test(model, data)
    config = model.ddpm.config.data
    if split == "holdout" and model.data_fingerprint is None:
        raise UserError(
            "split: it is not known which images this model held out; choose --split train or test"
        )
    if config.source == "array" and data is None:
        raise UserError(
            f"data: this model was trained on an array; name its images with --data {CHOICES}"
        )
    source = load_images(model, data or config.source)
    if model.data_fingerprint is None:
        return Images(split, source, np.arange(len(source)))
    if source.remembered and source.fingerprint != model.data_fingerprint:
        source = load_images(model, data or config.source, believe=False)
    if source.fingerprint != model.data_fingerprint:
        former = source.former.get(model.data_fingerprint)
        raise UserError(
            f"data: {shown(data or config.source)} does not hold the images that this model was "
            f"trained on{f' ({former})' if former else ''}; name those with --data"
        )
    return _read_part(split, source, config.holdout)


def load_images(model: Loaded, place: str, test: bool = False, believe: bool = True) -> Source:
    """The images of `place`, with `test` of its test split, with labels as in training.

    Without `believe`, no image is taken from what an earlier start remembered.

    Warns where the model's classes have no names, and another number of classes is found. Raises
    UserError for images that cannot be used.
    """
    config = model.ddpm.config
    data = dataclasses.replace(config.data, source=config.data.source if test else place)
    data_of_it = dataclasses.replace(data, test=place if test else data.test)
    raw = load_source(data_of_it, test, believe)
    source = scaled(raw, data)
    classes = config.model.num_classes
    found = source.class_names
    is_other = source.fingerprint != model.data_fingerprint and not config.data.class_names
    if classes and found and is_other and len(found) != classes:
        log.warning(
            "data: %s has %d classes and the model %d, whose names are not known; their labels are "
            "taken to be %s",
            shown(place),
            len(found),
            classes,
            numbered_words(found),
        )
    return source


def _read_part(part: Split, source: Source, holdout: float) -> Images:
    """The images of `source` that the run trained on (`part` train) or held out."""
    train, held_out = split(source, holdout)
    indices = train if part == "train" else held_out
    if not len(indices):
        raise UserError(
            "split: this run has no held-out images (data.holdout 0); choose --split train or test"
        )
    return Images(part, source, indices)


def _read_test(model: Loaded, data: str | None) -> Images:
    config = model.ddpm.config.data
    place = data or config.test
    if place is None:
        own = "holdout" if config.holdout else "train"
        raise UserError(
            "split: this run has no test images; name some with --split test --data folder:PATH, "
            f"or choose --split {own}"
        )
    source = load_images(model, place, test=True)
    return Images("test", source, np.arange(len(source)))
