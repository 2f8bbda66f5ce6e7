"""A small classifier whose features replace InceptionV3's when Inception's weights are missing."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ddpm_jax.models.layers import GroupNorm, conv3x3, dense, draw_kernels
from ddpm_jax.shapes import AnyKey, Array, Float, Float32

FEATURES = 64
SMALLEST = 8
UNIT = {"uint8": 127.5, "uint16": 32_767.5, "float32": None}
"""The types of images, and how many levels are one unit of the model's."""


class Classifier(nn.Module):
    """Maps images [B,H,W,C] to (features, logits).

    3x3 convolutions, each followed by group norm and swish: one to 32 channels, then stride-2
    convolutions to 64 channels until the smaller side is below 8, then one more. The features are
    the mean of its output over all positions.

    To make parameters, call `init_classifier`: `Classifier.init` returns no random kernels, but
    half the width of each kernel's distribution.
    """

    classes: int

    @nn.compact
    def __call__(
        self, images: Array
    ) -> tuple[Float32[jax.Array, "b 64"], Float32[jax.Array, "b {self.classes}"]]:
        """(features, logits) of images [B,H,W,C], of 8 or 16 bits or floats in the model's units.

        Raises ValueError for another shape or type, or a side below 8.
        """
        if images.ndim != 4 or min(images.shape[1:3]) < SMALLEST or str(images.dtype) not in UNIT:
            raise ValueError(
                f"images: must be {', '.join(UNIT)} [B, H, W, C] of at least 8x8 pixels, "
                f"got {images.dtype} {images.shape}"
            )
        # Applies to convolutions too, so that all devices compute the same features.
        with jax.default_matmul_precision("highest"):
            x = self._unit(_centred(images), FEATURES // 2, 1, "first")
            while min(x.shape[1:3]) >= 8:
                x = self._unit(x, FEATURES, 2, f"to_{(min(x.shape[1:3]) + 1) // 2}")
            features = self._unit(x, FEATURES, 1, "last").mean(axis=(1, 2))
            return features, dense(self.classes, "logits")(features)

    def _unit(
        self, x: Float[jax.Array, "b h w c"], channels: int, stride: int, name: str
    ) -> Float[jax.Array, "b rows columns {channels}"]:
        x = conv3x3(channels, name, stride=stride)(x)
        return nn.swish(GroupNorm(8, name=f"{name}_norm")(x))


def _centred(images: Array) -> Float[jax.Array, "b h w c"]:
    """Levels as numbers in [-1, 1]; floats as they are."""
    x = jnp.asarray(images, jnp.float32)
    unit = UNIT[str(images.dtype)]
    return x if unit is None else x / unit - 1


@functools.partial(jax.jit, static_argnums=(0, 2))
def init_classifier(
    network: Classifier, rng: AnyKey, image_shape: tuple[int, int, int]
) -> dict[str, Any]:
    """Fresh float32 parameters for images [H,W,C]."""
    return draw_kernels(network.init(rng, np.zeros((1, *image_shape), np.uint8))["params"], rng)


@jax.jit
def classifier_features(
    params: dict[str, Any], images: Array
) -> tuple[Float32[jax.Array, "b 64"], Float32[jax.Array, "b classes"]]:
    """(features, logits) of images [B,H,W,C], see `Classifier`.

    `params` are the parameters of a `Classifier`.
    """
    network = Classifier(params["logits"]["bias"].shape[0])
    # flax: apply returns variables too where they are asked for.
    return network.apply({"params": params}, images)  # type: ignore[return-value]
