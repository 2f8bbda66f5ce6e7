"""The bound of continuous values: a log density, and bits/dim at a stated resolution.

A density p of the model's units is one of the data's after the change of variables
value = offset + scale x: log p(value) = log p(x) - log(scale), for each dimension.
"""

import math
from typing import Any

import numpy as np

from ddpm_jax.ddpm import DDPM
from ddpm_jax.diffusion import BIN
from ddpm_jax.errors import UserError


def check_resolution(ddpm: DDPM, resolution: float | None) -> None:
    """Raises UserError for a resolution of values that have levels."""
    if resolution is not None and ddpm.levels:
        raise UserError(
            f"resolution: the values of this model have {ddpm.levels} levels, which bits/dim "
            "count; leave it out"
        )


def at_resolution(summary: dict[str, Any], ddpm: DDPM, resolution: float | None) -> dict[str, Any]:
    """The summary of a likelihood with its log density, and bits/dim at `resolution`.

    Bits/dim are what it takes to tell apart bins of this width, in the data's units: of bins far
    narrower than what the model knows, -log2 of the density times the width. None is for 2/255 of
    the model's unit, as wide as the bins of 8-bit images: `summary` is measured so.
    """
    height, width, channels = ddpm.image_shape
    scale = np.broadcast_to(ddpm.scaling.scale, channels)
    own = BIN * scale
    bins = own if resolution is None else np.full(channels, resolution)
    shift = shift_of(ddpm, resolution)
    pixels = height * width
    nats = -summary["total"] * pixels * channels * math.log(2) - pixels * np.log(own).sum()
    changed = {name: summary[name] + shift for name in ("total", "distortion")}
    of_channels = bins if len(ddpm.scaling.scale) > 1 and resolution is None else bins[:1]
    return {
        **summary,
        **changed,
        "log_density": float(nats),
        "resolution": [float(each) for each in of_channels],
    }


def shift_of(ddpm: DDPM, resolution: float | None) -> float:
    """Bits/dim that bins of `resolution` take more than those that the bound is measured in."""
    if resolution is None:
        return 0.0
    return float(np.mean(np.log2(BIN * ddpm.scaling.scale / resolution)))


def words_of_density(summary: dict[str, Any]) -> list[str]:
    """The lines for people."""
    bins = ", ".join(f"{each:.6g}" for each in summary["resolution"])
    each = " (a channel each)" if len(summary["resolution"]) > 1 else ""
    return [
        f"{'log density >=':28}{summary['log_density']:8.6g}  nats an image, in the data's units",
        f"bits/dim are those of bins of {bins} in the data's units{each}",
    ]
