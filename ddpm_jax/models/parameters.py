"""The shapes of the U-Net's parameters, from its settings alone.

Flax finds them by tracing the whole network, which takes as long as tracing a sampler.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.models.unet import UNet


def parameter_shapes(network: UNet, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """The parameters of `network` for images [H,W,C], as a tree of float32 ShapeDtypeStruct."""
    levels = range(len(network.channel_multipliers))
    channels = [network.base_channels * multiplier for multiplier in network.channel_multipliers]
    width = 4 * network.base_channels
    shapes: dict[str, Any] = {
        "time_0": _dense(network.base_channels, width),
        "time_1": _dense(width, width),
        "stem": _conv3x3(image_shape[-1], network.base_channels),
    }
    if network.class_rows:
        shapes["class_embedding"] = {"embedding": _float32(network.class_rows, width)}

    def add_block(name: str, of_input: int, level: int) -> None:
        shapes[f"{name}_block"] = _res_block(of_input, channels[level], width)
        if min(image_shape[:2]) >> level in network.attention_resolutions:
            shapes[f"{name}_attention"] = _attention(channels[level])

    h = network.base_channels
    skips = [h]
    for level in levels:
        for i in range(network.num_res_blocks):
            add_block(f"down_{level}_{i}", h, level)
            h = channels[level]
            skips.append(h)
        if level != levels[-1]:
            shapes[f"down_{level}_downsample"] = _conv3x3(h, h)
            skips.append(h)
    shapes["mid_0_block"] = _res_block(h, h, width)
    shapes["mid_attention"] = _attention(h)
    shapes["mid_1_block"] = _res_block(h, h, width)
    for level in reversed(levels):
        for i in range(network.num_res_blocks + 1):
            add_block(f"up_{level}_{i}", h + skips.pop(), level)
            h = channels[level]
        if level != 0:
            shapes[f"up_{level}_upsample"] = _conv3x3(h, h)
    shapes["out_norm"] = _norm(h)
    shapes["out_conv"] = _conv3x3(h, network.out_channels)
    return shapes


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _conv3x3(of_input: int, of_output: int) -> dict[str, Any]:
    return {"kernel": _float32(3, 3, of_input, of_output), "bias": _float32(of_output)}


def _dense(of_input: int, of_output: int) -> dict[str, Any]:
    return {"kernel": _float32(of_input, of_output), "bias": _float32(of_output)}


def _norm(channels: int) -> dict[str, Any]:
    return {"scale": _float32(channels), "bias": _float32(channels)}


def _res_block(of_input: int, of_output: int, width: int) -> dict[str, Any]:
    shapes = {
        "norm_0": _norm(of_input),
        "conv_0": _conv3x3(of_input, of_output),
        "time": _dense(width, of_output),
        "norm_1": _norm(of_output),
        "conv_1": _conv3x3(of_output, of_output),
    }
    if of_input != of_output:
        shapes["shortcut"] = _dense(of_input, of_output)
    return shapes


def _attention(channels: int) -> dict[str, Any]:
    names = ("q", "k", "v", "out")
    return {"norm": _norm(channels)} | {name: _dense(channels, channels) for name in names}
