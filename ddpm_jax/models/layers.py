"""The U-Net's building blocks (Ho et al. 2020, Appendix B).

Parameters are float32. Convolutions and dense layers compute in `dtype`, and their results stay
in it: the sums of residual blocks and attention, the skips, the time embedding. Norms with the
swish behind them, the sinusoids of the time embedding and the softmax are always float32.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from ddpm_jax.keys import check_threefry, happens
from ddpm_jax.models import winograd
from ddpm_jax.shapes import AnyKey, AnyKeys, Array, Float, Int

TILES = "tiles"
"""The collection of kernels as models/winograd.py transforms them, where there are such."""


def kernel_limit(scale: float = 1.0) -> Callable[..., jax.Array]:
    """An initialiser that returns half the width of a kernel's uniform distribution.

    The distribution has mean 0 and variance scale / fan_avg, and `draw_kernels` draws from it. A
    `scale` of 0 means 1e-10: the layer's output starts close to 0.
    """

    def init(key, shape, dtype=jnp.float32):
        fan_avg = math.prod(shape[:-2]) * (shape[-2] + shape[-1]) / 2
        return jnp.full(shape, math.sqrt(3 * (scale or 1e-10) / fan_avg), dtype)

    return init


def draw_kernels(limits: dict[str, Any], rng: AnyKey) -> dict[str, Any]:
    """Fresh parameters, given the tree `limits` that a network's `init` returns.

    In `limits` each kernel holds half the width of its distribution (see `kernel_limit`). All
    kernels are slices of one random vector. Flax draws each kernel in a random program of its own,
    and these dozens of programs took a CPU 17 s to compile for the smallest network.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(limits)
    is_kernel = [path[-1].key == "kernel" for path, _ in leaves]
    sizes = [
        leaf.size if kernel else 0 for kernel, (_, leaf) in zip(is_kernel, leaves, strict=True)
    ]
    check_threefry()
    draws = jax.random.uniform(rng, (sum(sizes),), jnp.float32, minval=-1, maxval=1)
    parts = jnp.split(draws, np.cumsum(sizes)[:-1])
    params = [
        leaf * draw.reshape(leaf.shape) if kernel else leaf
        for kernel, draw, (_, leaf) in zip(is_kernel, parts, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, params)


def timestep_embedding(t: Int[Array, " b"], dim: int) -> Float[jax.Array, "b {dim}"]:
    """Sinusoidal embedding of the 0-based steps `t`: all sines, then all cosines.

    Frequencies fall from 1 to 1/10000, both included. Raises ValueError if dim is odd or below 4.
    """
    if dim < 4 or dim % 2:
        raise ValueError(f"dim: must be even and at least 4, got {dim}")
    half = dim // 2
    frequencies = np.exp(-np.log(10000) * np.arange(half) / (half - 1)).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def dropout(x: Float[Array, "b ..."], keys: AnyKeys, rate: float) -> Float[jax.Array, "b ..."]:
    """Dropout of x, with each example's mask drawn from its own key in `keys`.

    flax.linen.Dropout draws one mask for the local batch, so that results depend on the number of
    devices.
    """
    keep = happens(keys, 1 - rate, x.shape[1:])
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


class Layer(nn.Module):
    """A module whose parameters are used as they are given.

    At each trace Flax evaluates the shape of every parameter's initialiser, to compare it with that
    of the parameter, which takes a third of the time of the trace. DDPM compares the shapes once.
    """

    @nn.nowrap
    def param(self, name: str, init_fn: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """The parameter `name`; made by `init_fn` if it is missing."""
        if self.has_variable("params", name):
            return self.get_variable("params", name)
        return super().param(name, init_fn, *args, **options)


class Affine(Layer):
    """A linear map to `channels` over the last axis, and a bias; a 3x3 convolution with `stride`.

    A convolution has SAME padding: (0, 1) for stride 2 and an even size.
    """

    channels: int
    dtype: DTypeLike
    scale: float
    stride: int | None = None
    """None for a dense layer, which on images is a 1x1 convolution."""

    @nn.compact
    def __call__(self, x: Float[Array, "b *places c"]) -> Float[jax.Array, "b *others channels"]:
        """The map of x, computed in `dtype`."""
        size = () if self.stride is None else (3, 3)
        shape = (*size, x.shape[-1], self.channels)
        kernel = self.param("kernel", kernel_limit(self.scale), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.channels,), jnp.float32)
        x, kernel, bias = (jnp.asarray(each, self.dtype) for each in (x, kernel, bias))
        if self.stride is None:
            y = jnp.dot(x, kernel)
        elif self.has_variable(TILES, "kernel"):
            tile: Array = self.get_variable(TILES, "kernel")
            y = jax.lax.platform_dependent(
                x,
                kernel,
                tile,
                cpu=lambda x, kernel, tile: winograd.convolution(x, tile),
                default=lambda x, kernel, tile: _convolution(x, kernel, 1),
            )
        else:
            y = _convolution(x, kernel, self.stride)
        return y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)


def _convolution(x, kernel, stride: int):
    layout = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    return jax.lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=layout)


class Embedding(Layer):
    """A table of `rows` vectors of `width` numbers, all zero at first."""

    rows: int
    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, classes: Int[Array, " b"]) -> Float[jax.Array, "b {self.width}"]:
        """The rows number `classes`, in `dtype`."""
        table = self.param("embedding", nn.initializers.zeros, (self.rows, self.width), jnp.float32)
        return jnp.take(jnp.asarray(table, self.dtype), classes, axis=0)


def conv3x3(
    channels: int,
    name: str,
    *,
    stride: int = 1,
    scale: float = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Affine:
    """A 3x3 convolution to `channels`; `scale` as in `kernel_limit`."""
    return Affine(channels, dtype, scale, stride, name=name)


def dense(
    channels: int, name: str, *, scale: float = 1.0, dtype: DTypeLike = jnp.float32
) -> Affine:
    """A dense layer to `channels`; `scale` as in `kernel_limit`."""
    return Affine(channels, dtype, scale, name=name)


class GroupNorm(Layer):
    """Group normalisation over H, W and the channels of a group; returns float32.

    Epsilon is 1e-6. Means are taken per channel first and then over the channels of a group. On a
    CPU this is two to six times faster than flax.linen.GroupNorm, which sums across the group's
    channels at every pixel.
    """

    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[jax.Array, "b h w c"]:
        """The normalised x in float32, whatever its dtype."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        x = jnp.asarray(x, jnp.float32)
        x = x - self._group_mean(x)
        # The variance in two passes: E[x^2] - E[x]^2 loses its digits where the mean is large.
        rstd = jax.lax.rsqrt(self._group_mean(x * x) + 1e-6)
        return x * (rstd * scale[None, None, None, :]) + bias[None, None, None, :]

    def _group_mean(self, x: Float[jax.Array, "b h w c"]) -> Float[jax.Array, "b 1 1 c"]:
        B, _, _, C = x.shape
        mean = x.mean(axis=(1, 2)).reshape(B, self.groups, C // self.groups).mean(axis=-1)
        return mean.repeat(C // self.groups, axis=-1)[:, None, None, :]


class ResBlock(nn.Module):
    """A residual block that maps images to `channels` channels.

    Norm, swish, conv, add the time embedding; norm, swish, dropout, conv; add the input.
    """

    channels: int
    norm_groups: int
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Float[jax.Array, "b h w c"],
        temb: Float[Array, "b d"],
        dropout_keys: AnyKeys | None = None,
    ) -> Float[jax.Array, "b h w {self.channels}"]:
        """The output for x and for temb, after its swish. No `dropout_keys`, no dropout."""
        h = nn.swish(GroupNorm(self.norm_groups, name="norm_0")(x))
        h = conv3x3(self.channels, "conv_0", dtype=self.dtype)(h)
        h = h + dense(self.channels, "time", dtype=self.dtype)(temb)[:, None, None, :]
        h = nn.swish(GroupNorm(self.norm_groups, name="norm_1")(h))
        if dropout_keys is not None and self.dropout > 0:
            h = dropout(h, dropout_keys, self.dropout)
        h = conv3x3(self.channels, "conv_1", scale=0, dtype=self.dtype)(h)
        if x.shape[-1] != self.channels:
            x = dense(self.channels, "shortcut", dtype=self.dtype)(x)
        return x + h


class Attention(nn.Module):
    """Single-head self-attention over the H*W positions, added to the input."""

    norm_groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[jax.Array, "b h w c"]) -> Float[jax.Array, "b h w c"]:
        """x plus what its positions attend to."""
        B, H, W, C = x.shape
        h = GroupNorm(self.norm_groups, name="norm")(x)
        q, k, v = (
            dense(C, name, dtype=self.dtype)(h).reshape(B, H * W, 1, C) for name in ("q", "k", "v")
        )
        h = jax.nn.dot_product_attention(q, k, v, scale=C**-0.5).reshape(B, H, W, C)
        return x + dense(C, "out", scale=0, dtype=self.dtype)(h)
