"""The proxy for InceptionV3: a classifier of the reference images, trained on their labels.

Numbers computed from its features can rank two models of the same images. They are not FID, and
cannot be compared with numbers from other features.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from ddpm_jax.data import Batches, Source
from ddpm_jax.devices.progress import progress_bar
from ddpm_jax.devices.rows import full_batches
from ddpm_jax.errors import UserError
from ddpm_jax.keys import PROXY_SPLIT
from ddpm_jax.models import Classifier, classifier_features, init_classifier
from ddpm_jax.shapes import PyTree

BATCH_SIZE = 128


class Proxy(NamedTuple):
    """A trained classifier."""

    params: Any
    """For `models.classifier_features`; float32 on JAX's default device."""
    accuracy: float
    """Fraction of the held-out tenth that it classifies correctly."""


def train_classifier(
    source: Source, indices: np.ndarray, *, seed: int = 0, steps: int | None = None
) -> Proxy:
    """A Classifier of the images `indices` [M] of `source`, trained on nine tenths of them.

    Adam with a cosine decay from 0.002, batches of 128, no augmentation; `steps` defaults to ten
    epochs, but at least 400 and at most 4000. The same seed gives the same classifier. Raises
    UserError if there are no labels, only one class, or too few or too small images.
    """
    labels, classes = _labels(source, indices)
    # Batches draws the order of each epoch from [seed, epoch]; no training reaches this epoch.
    bits = np.random.Philox(key=[seed, PROXY_SPLIT]).random_raw(len(indices))
    held_out, train = np.split(
        np.asarray(indices)[np.argsort(bits, kind="stable")], [len(indices) // 10]
    )
    steps = steps or int(np.clip(10 * len(train) // BATCH_SIZE, 400, 4000))
    network = Classifier(classes)
    params = init_classifier(network, jax.random.key(seed), source.read(indices[:1]).shape[1:])
    opt_state = _optimizer(steps).init(params)
    batches = Batches(source, train, BATCH_SIZE, seed)
    for step in progress_bar(range(steps), desc="training the proxy", unit="step"):
        chosen = batches.indices_at(step)
        params, opt_state = _update(
            network, steps, params, opt_state, source.read(chosen), labels[chosen]
        )
    return Proxy(params, _accuracy(params, source, held_out, labels))


def classifier_shapes(source: Source, indices: np.ndarray) -> PyTree:
    """The parameters that `train_classifier` gives for these images, as a tree of shapes and types.

    Raises UserError as it does.
    """
    _, classes = _labels(source, indices)
    image_shape = source.read(indices[:1]).shape[1:]
    init = functools.partial(init_classifier, Classifier(classes), image_shape=image_shape)
    return jax.eval_shape(init, jax.random.key(0))


def _labels(source: Source, indices) -> tuple[np.ndarray, int]:
    """(class of each image int32 [N], number of classes).

    Classes are numbered from 0; only the entries of the images in `indices` mean something.
    """
    remedy = "pass FID's InceptionV3 with --inception PATH"
    if source.labels is None:
        raise UserError(f"data: these images have no labels to train the proxy on; {remedy}")
    classes = np.unique(source.labels[indices])
    if len(classes) < 2:
        raise UserError(f"data: the proxy needs at least two classes of images, got one; {remedy}")
    if len(indices) < 20:
        raise UserError(f"data: the proxy needs at least 20 images, got {len(indices)}; {remedy}")
    height, width, _ = source.read(indices[:1]).shape[1:]
    if min(height, width) < 8:
        raise UserError(
            f"data: the proxy needs images of at least 8x8 pixels, got {height}x{width}; {remedy}"
        )
    return np.searchsorted(classes, source.labels).astype(np.int32), len(classes)


def _accuracy(params, source, indices, labels) -> float:
    right = 0
    for rows, count in full_batches(len(indices), BATCH_SIZE):
        chosen = indices[rows]
        _, logits = classifier_features(params, source.read(chosen))
        correct = np.asarray(logits).argmax(axis=1) == labels[chosen]
        right += correct[:count].sum()
    return float(right / len(indices))


def _optimizer(steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(2e-3, steps))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def _update(network, steps, params, opt_state, images, labels):
    def loss(params):
        _, logits = network.apply({"params": params}, images)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    updates, opt_state = _optimizer(steps).update(jax.grad(loss)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state
