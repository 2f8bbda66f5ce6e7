"""InceptionV3 (Szegedy et al. 2016) as FID uses it: TensorFlow's graph of 2015-12-05.

It differs from the published network and from torchvision's: average pools leave out the padding,
the last block uses max pooling, and there are 1008 classes. Layers are named as in the PyTorch
versions of that graph. Everything is float32, multiplied in full precision on every device.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ddpm_jax.shapes import Array, Float, Float32, Int32

SIZE = 299
FEATURES = 2048
CLASSES = 1008


class Conv(NamedTuple):
    """A convolution without bias, batch normalisation and ReLU."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"


def _average_pool(x: Float[jax.Array, "b h w c"]) -> Float[jax.Array, "b h w c"]:
    # Flax divides by counts of jax's default type.
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False).astype(x.dtype)


def _max_pool(x: Float[jax.Array, "b h w c"]) -> Float[jax.Array, "b h w c"]:
    return nn.max_pool(x, (3, 3), padding="SAME")


def _halve(x: Float[jax.Array, "b h w c"]) -> Float[jax.Array, "b rows columns c"]:
    return nn.max_pool(x, (3, 3), (2, 2))


# A block is a tuple of branches, whose outputs are concatenated along the channels.
# A branch is a list of convolutions, pools and blocks.
def _a(pooled):
    return (
        [Conv("branch1x1", 64)],
        [Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))],
        [
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, (3, 3)),
            Conv("branch3x3dbl_3", 96, (3, 3)),
        ],
        [_average_pool, Conv("branch_pool", pooled)],
    )


_B = (
    [Conv("branch3x3", 384, (3, 3), 2, "VALID")],
    [
        Conv("branch3x3dbl_1", 64),
        Conv("branch3x3dbl_2", 96, (3, 3)),
        Conv("branch3x3dbl_3", 96, (3, 3), 2, "VALID"),
    ],
    [_halve],
)


def _c(width):
    return (
        [Conv("branch1x1", 192)],
        [
            Conv("branch7x7_1", width),
            Conv("branch7x7_2", width, (1, 7)),
            Conv("branch7x7_3", 192, (7, 1)),
        ],
        [
            Conv("branch7x7dbl_1", width),
            Conv("branch7x7dbl_2", width, (7, 1)),
            Conv("branch7x7dbl_3", width, (1, 7)),
            Conv("branch7x7dbl_4", width, (7, 1)),
            Conv("branch7x7dbl_5", 192, (1, 7)),
        ],
        [_average_pool, Conv("branch_pool", 192)],
    )


_D = (
    [Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, (3, 3), 2, "VALID")],
    [
        Conv("branch7x7x3_1", 192),
        Conv("branch7x7x3_2", 192, (1, 7)),
        Conv("branch7x7x3_3", 192, (7, 1)),
        Conv("branch7x7x3_4", 192, (3, 3), 2, "VALID"),
    ],
    [_halve],
)


def _e(pool):
    def crossed(name):
        return ([Conv(f"{name}a", 384, (1, 3))], [Conv(f"{name}b", 384, (3, 1))])

    return (
        [Conv("branch1x1", 320)],
        [Conv("branch3x3_1", 384), crossed("branch3x3_2")],
        [
            Conv("branch3x3dbl_1", 448),
            Conv("branch3x3dbl_2", 384, (3, 3)),
            crossed("branch3x3dbl_3"),
        ],
        [pool, Conv("branch_pool", 192)],
    )


_STEM = [
    Conv("Conv2d_1a_3x3", 32, (3, 3), 2, "VALID"),
    Conv("Conv2d_2a_3x3", 32, (3, 3), 1, "VALID"),
    Conv("Conv2d_2b_3x3", 64, (3, 3)),
    _halve,
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"),
    _halve,
]
_BLOCKS = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": _B,
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": _D,
    "Mixed_7b": _e(_average_pool),
    "Mixed_7c": _e(_max_pool),
}


def _run(x, step: Conv | Callable | tuple):
    if isinstance(step, Conv):
        return ConvUnit(step, name=step.name)(x)
    if isinstance(step, tuple):
        return jnp.concatenate([_chain(x, branch) for branch in step], axis=-1)
    return step(x)


def _chain(x, steps):
    for step in steps:
        x = _run(x, step)
    return x


class ConvUnit(nn.Module):
    """relu(batch_norm(conv(x))), with the batch norm's stored mean and variance; epsilon 1e-3."""

    conv: Conv

    @nn.compact
    def __call__(
        self, x: Float[jax.Array, "b h w c"]
    ) -> Float[jax.Array, "b rows columns {self.conv.channels}"]:
        """The activations of x."""
        channels = self.conv.channels
        zeros = nn.initializers.zeros
        ones = nn.initializers.ones
        shape = (*self.conv.kernel, x.shape[-1], channels)
        kernel = self.param("kernel", zeros, shape, jnp.float32)
        scale = self.param("scale", ones, (channels,), jnp.float32)
        bias = self.param("bias", zeros, (channels,), jnp.float32)
        mean = self.param("mean", zeros, (channels,), jnp.float32)
        variance = self.param("variance", ones, (channels,), jnp.float32)
        x = jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.conv.stride, self.conv.stride),
            self.conv.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",
        )
        factor = scale * jax.lax.rsqrt(variance + 1e-3)
        return nn.relu(
            (x - mean[None, None, None]) * factor[None, None, None] + bias[None, None, None]
        )


class Block(nn.Module):
    """Runs each branch on the same input and concatenates their outputs along the channels."""

    branches: tuple[list, ...]

    @nn.compact
    def __call__(
        self, x: Float[jax.Array, "b h w c"]
    ) -> Float[jax.Array, "b rows columns channels"]:
        """The activations of x, those of the first branch first."""
        return _run(x, self.branches)


class Inception(nn.Module):
    """Maps what `preprocess` returns to (features, logits).

    The logits leave out the last layer's bias, as the original code of the inception score does
    (Salimans et al. 2016).
    """

    @nn.compact
    def __call__(
        self, x: Float32[jax.Array, "b 299 299 3"]
    ) -> tuple[Float32[jax.Array, "b 2048"], Float32[jax.Array, "b 1008"]]:
        """(features, logits) of x in [-1, 1)."""
        x = _chain(x, _STEM)
        for name, branches in _BLOCKS.items():
            x = Block(branches, name=name)(x)
        features = x.mean(axis=(1, 2))
        weights = self.param("fc", nn.initializers.zeros, (FEATURES, CLASSES), jnp.float32)
        return features, jnp.matmul(features, weights, precision="highest")


def preprocess(images: Array) -> Float32[Array, "b 299 299 3"]:
    """Turns uint8 images [B,H,W,1 or 3] into the network's input in [-1, 1).

    Greyscale images get three equal channels. Resizing is bilinear as in TensorFlow 1 without
    aligned corners: between the pixel at floor(i H / 299) and the next one, with no averaging where
    the image shrinks.

    Raises ValueError for another shape or type.
    """
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.dtype != jnp.uint8:
        raise ValueError(
            f"images: must be uint8 [B, H, W, 1 or 3], got {images.dtype} {list(images.shape)}"
        )
    x = images.astype(jnp.float32)
    top, bottom, down = _resize_places(x.shape[1])
    left, right, along = _resize_places(x.shape[2])
    down = down[None, :, None, None]
    along = along[None, None, :, None]
    x = x[:, :, left] + (x[:, :, right] - x[:, :, left]) * along
    x = x[:, top] + (x[:, bottom] - x[:, top]) * down
    return (x.repeat(3 // x.shape[-1], axis=-1) - 128) / 128


def _resize_places(
    length: int,
) -> tuple[
    Int32[np.ndarray, "299"],
    Int32[np.ndarray, "299"],
    Float32[np.ndarray, "299"],
]:
    """(pixel before, pixel after, fraction of the way between them)."""
    place = np.arange(SIZE, dtype=np.float32) * np.float32(length / SIZE)
    before = place.astype(np.int32)
    return before, np.minimum(before + 1, length - 1), place - before.astype(np.float32)


@jax.jit
def inception_features(
    params: dict[str, Any], images: Array
) -> tuple[Float32[jax.Array, "b 2048"], Float32[jax.Array, "b 1008"]]:
    """(features, logits) of uint8 images [B,H,W,1 or 3].

    `params` are what `load_inception` returns.
    """
    # flax: apply returns variables too where they are asked for.
    return Inception().apply({"params": params}, preprocess(images))  # type: ignore[return-value]


@functools.cache
def inception_shapes() -> dict[str, Any]:
    """The parameters as a tree of shapes and types."""
    x = jnp.zeros((1, SIZE, SIZE, 3), jnp.float32)
    return jax.eval_shape(Inception().init, jax.random.key(0), x)["params"]
