"""Which classes images have: those that are measured, and those that are drawn to be compared."""

import hashlib
import logging
from typing import Any

import numpy as np

from ddpm_jax.calls.conditions import UNGUIDED, Guide, checked_labels
from ddpm_jax.ddpm import DDPM
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.splits import Images
from ddpm_jax.shapes import Int, Integer

log = logging.getLogger(__name__)


def labels_of(
    ddpm: DDPM, images: Images, conditional: bool | None = None
) -> Int[np.ndarray, " n"] | None:
    """The labels int32 [N] that `images` are measured with; None for no class.

    With `conditional` they are the images' own; None asks for these where the model has classes and
    the images have labels. Raises UserError if the model or the images have none, or others than
    the model's, and if the model knows no images without a class.
    """
    network = ddpm.config.model
    always = network.num_classes and not network.no_class
    has_labels = images.source.labels is not None
    if conditional and not network.num_classes:
        raise UserError("conditional: this model was trained without classes; leave it out")
    if conditional and not has_labels:
        raise UserError(
            "conditional: these images have no labels; sort them into a folder a class, or leave "
            "it out"
        )
    if conditional is None and always and not has_labels:
        raise UserError(
            "data: these images have no labels, and this model knows no images without a class; "
            "sort them into a folder a class, or name others"
        )
    if conditional is False and always:
        raise UserError("conditional: this model knows no images without a class; leave it out")
    if conditional is None:
        conditional = bool(network.num_classes)
    return _own(ddpm, images) if conditional else None


def _own(ddpm: DDPM, images: Images) -> Int[np.ndarray, " n"] | None:
    """The images' labels, checked; None if they have none."""
    if images.source.labels is None:
        return None
    labels = images.source.labels[images.indices]
    try:
        return np.asarray(checked_labels(labels, len(labels), ddpm.config.model))
    except UserError as error:
        raise UserError(f"data: the images' {error}; number them as in training") from error


class InProportion(Guide):
    """A Guide whose many labels have the proportions of some images; files record their hash."""

    @property
    def recorded(self) -> dict[str, Any]:
        """As of any Guide, but for the labels."""
        labels = np.array(self.labels, np.int32)
        digest = hashlib.blake2b(labels.tobytes(), digest_size=8).hexdigest()
        return {**super().recorded, "labels": f"{len(labels)} in the images' proportions, {digest}"}


def guide_for(ddpm: DDPM, images: Images | None, guide: Guide = UNGUIDED) -> Guide:
    """`guide`, with labels where it names none and the model has classes.

    Image i gets its label by i alone. The labels have the proportions of those of `images`; where
    there are no images, or no labels of theirs, all classes take turns. Raises UserError for a
    guide that the model does not take.
    """
    classes = ddpm.config.model.num_classes
    if guide.labels is None and classes:
        own = None if images is None else _own(ddpm, images)
        if images is not None and own is None:
            log.info("labels: the %s images have none, so all classes take turns", images.split)
        labels = in_turn(np.arange(int(classes)) if own is None else own)
        kind = Guide if len(labels) == len(set(labels)) else InProportion
        guide = kind(labels, guide.guidance, guide.guidance_interval)
    guide.check(ddpm.config.model)
    return guide


def in_turn(labels: Integer[np.ndarray, " n"]) -> tuple[int, ...]:
    """Labels that have the proportions of `labels` if they are taken in turn, and so their first n.

    The j-th image of a class of `count` images, from 0, has the place (2 j + 1) / count: the method
    of Sainte-Laguë, by which every class has about its part of the first n labels. Equally large
    classes take turns in their order.
    """
    classes, counts = np.unique(labels, return_counts=True)
    counts //= np.gcd.reduce(counts)
    places = np.concatenate([(2 * np.arange(count) + 1) / count for count in counts])
    ordered = np.repeat(classes, counts)[np.argsort(places, kind="stable")]
    return tuple(ordered[: Guide.LONGEST].tolist())
