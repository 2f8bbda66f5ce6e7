"""The paper's U-Net (Ho et al. 2020, Section 4 and Appendix B)."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from ddpm_jax.models.layers import (
    Attention,
    Embedding,
    GroupNorm,
    ResBlock,
    conv3x3,
    dense,
    draw_kernels,
    timestep_embedding,
)
from ddpm_jax.shapes import AnyKey, AnyKeys, Array, Float, Float32, Int


class UNet(nn.Module):
    """Maps images and steps to `out_channels` channels of their size.

    H and W must be divisible by 2^(levels - 1), and the channels of every level by `norm_groups`.
    Attention is used at the levels whose smaller side is in `attention_resolutions`, and in the
    middle. The first and the last convolution compute in float32, and what is between them in
    `dtype`, as layers.py says. At the levels in `remat`, blocks keep only their inputs for the
    gradient and recompute the rest. With `class_rows`, an embedding of so many classes is added to
    that of the time.

    To make parameters, call `init_params`: `UNet.init` returns no random kernels, but half the
    width of each kernel's distribution.
    """

    out_channels: int
    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.0
    norm_groups: int = 32
    dtype: DTypeLike = jnp.float32
    remat: tuple[int, ...] = ()
    class_rows: int = 0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Int[Array, " b"],
        dropout_keys: AnyKeys | None = None,
        classes: Int[Array, " b"] | None = None,
    ) -> Float32[jax.Array, "b h w {self.out_channels}"]:
        """The output for x and t. `dropout_keys` turns dropout on, with one key per example.

        `classes` are rows of the class embedding, where there is one.
        """
        temb = self._time_embedding(t, classes)
        block_index = itertools.count()

        def block(h, level, name):
            index = next(block_index)
            channels = self.base_channels * self.channel_multipliers[level]
            keys = (
                None
                if dropout_keys is None
                else jax.vmap(lambda key: jax.random.fold_in(key, index))(dropout_keys)
            )
            kind = nn.remat(ResBlock) if level in self.remat else ResBlock
            return kind(channels, self.norm_groups, self.dropout, self.dtype, name=name)(
                h, temb, keys
            )

        def attention(h, level, name):
            kind = nn.remat(Attention) if level in self.remat else Attention
            return kind(self.norm_groups, self.dtype, name=name)(h)

        def block_at_level(h, level, name):
            h = block(h, level, f"{name}_block")
            if min(h.shape[1:3]) in self.attention_resolutions:
                h = attention(h, level, f"{name}_attention")
            return h

        levels = range(len(self.channel_multipliers))
        # The input and the output are small, and rounding them is an error of the image itself:
        # that of x_t to bfloat16 is 8.5 % of the noise at the paper's t = 0.
        h = conv3x3(self.base_channels, "stem")(x.astype(jnp.float32)).astype(self.dtype)
        skips = [h]
        for level in levels:
            for i in range(self.num_res_blocks):
                h = block_at_level(h, level, f"down_{level}_{i}")
                skips.append(h)
            if level != levels[-1]:
                h = conv3x3(h.shape[-1], f"down_{level}_downsample", stride=2, dtype=self.dtype)(h)
                skips.append(h)

        h = block(h, levels[-1], "mid_0_block")
        h = attention(h, levels[-1], "mid_attention")
        h = block(h, levels[-1], "mid_1_block")

        for level in reversed(levels):
            for i in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block_at_level(h, level, f"up_{level}_{i}")
            if level != 0:
                h = h.repeat(2, axis=1).repeat(2, axis=2)
                h = conv3x3(h.shape[-1], f"up_{level}_upsample", dtype=self.dtype)(h)

        h = nn.swish(GroupNorm(self.norm_groups, name="out_norm")(h))
        return conv3x3(self.out_channels, "out_conv", scale=0)(h)

    def _time_embedding(
        self, t: Int[Array, " b"], classes: Int[Array, " b"] | None
    ) -> Float[jax.Array, "b {4*self.base_channels}"]:
        """swish(dense(swish(dense(sinusoids))) + the row of the class).

        Every block would begin with the outer swish, so it is applied once here. The class
        embedding starts at zero: at first a network with classes is one without.
        """
        width = 4 * self.base_channels
        temb = timestep_embedding(t, self.base_channels)
        temb = dense(width, "time_0", dtype=self.dtype)(temb)
        temb = dense(width, "time_1", dtype=self.dtype)(nn.swish(temb))
        if classes is not None:
            embedding = Embedding(self.class_rows, width, self.dtype, name="class_embedding")
            temb = temb + embedding(classes)
        return nn.swish(temb)


def init_params(network: UNet, rng: AnyKey, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Fresh float32 parameters of `network` for images [H,W,C]."""
    x_t = jnp.zeros((1, *image_shape), jnp.float32)
    t = jnp.zeros(1, jnp.int32)
    classes = t if network.class_rows else None
    return draw_kernels(network.init(rng, x_t, t, classes=classes)["params"], rng)
