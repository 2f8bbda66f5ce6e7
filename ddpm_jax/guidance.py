"""Classifier-free guidance: a network with labels as a `denoise_fn` (Ho & Salimans 2022)."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from ddpm_jax.diffusion import DenoiseFn
from ddpm_jax.errors import UserError, shown
from ddpm_jax.shapes import Array, Float, Int

ConditionalFn = Callable[
    [Float[Array, "b h w c"], Int[Array, " b"], Int[Array, " b"]],
    Float[Array, "b h w outputs"],
]
"""conditional_fn(x_t, timesteps, labels) -> output, as a `DenoiseFn` that knows the labels."""

NO_CLASS = -1
"""The label of an image of no class."""

LARGEST = float(jnp.finfo(jnp.float32).max)
"""A larger guidance would be infinite in float32."""


def guided(
    conditional_fn: ConditionalFn,
    labels: Int[Array, " b"],
    guidance: float | Float[Array, ""] = 1.0,
    interval: Sequence[float] | Float[Array, " 2"] | None = None,
    *,
    none: int = NO_CLASS,
) -> DenoiseFn:
    """The `denoise_fn` of images of `labels` [B], guided by w = `guidance`.

    Its output is u + w (c - u): u is the output without a class and c the one with the label, so
    that w > 1 goes beyond c. This w is 1 + that of Ho & Salimans 2022, Eq. 6. For a given x_t,
    the predictions eps, x_0, v and mean are affine in each other, and the two weights sum to 1: the
    combination is the same whichever of them the network predicts. What clips x_0 comes afterwards.
    A learned variance, the channels after those of x_t, is that of the conditional output.

    1.0 is one plain call of `conditional_fn`. Any other number, and an array of jax even if it is
    1, doubles the batch of one call: row 2 i has the label of image i, row 2 i + 1 the label
    `none`, so that both stay on the device of image i.

    - `interval`: (lo, hi) guides at the steps lo <= t < hi alone, t being the original step
      (Kynkäänniemi et al. 2024); the batch is doubled at the others too, where the output is the
      conditional one

    Raises UserError for a `guidance` that is not finite, or an interval that is not ascending.
    """
    if not isinstance(interval, jax.Array):  # The values of traced ones are not known.
        check_guidance(guidance, interval)

    def plain(x_t: Float[Array, "b h w c"], t: Int[Array, " b"]) -> Float[Array, "b h w outputs"]:
        return conditional_fn(x_t, t, labels)

    def doubled(
        x_t: Float[Array, "b h w c"], t: Int[Array, " b"]
    ) -> Float[jax.Array, "b h w outputs"]:
        pairs = jnp.stack([labels, jnp.full_like(labels, none)], axis=1).reshape(-1)
        outputs = conditional_fn(jnp.repeat(x_t, 2, axis=0), jnp.repeat(t, 2), pairs)
        conditional = outputs[::2]
        channels = x_t.shape[-1]
        of_label = conditional[..., :channels]
        of_none = outputs[1::2, ..., :channels]
        output = of_none + guidance * (of_label - of_none)
        if interval is not None:
            lo, hi = interval
            inside = (lo <= t) & (t < hi)
            output = jnp.where(inside[:, None, None, None], output, of_label)
        output = output.astype(conditional.dtype)
        return jnp.concatenate([output, conditional[..., channels:]], axis=-1)

    one = not isinstance(guidance, jax.Array) and guidance == 1
    return plain if one else doubled


def check_guidance(
    guidance: float | Float[Array, ""], interval: Sequence[float] | Float[Array, " 2"] | None
) -> None:
    """Raises UserError for a `guidance` or an interval that `guided` does not take."""
    if not isinstance(guidance, jax.Array) and not abs(float(guidance)) <= LARGEST:
        raise UserError(f"guidance: must be a finite number, got {shown(guidance)}")
    if interval is not None and not (len(interval) == 2 and interval[0] < interval[1]):
        raise UserError(
            "guidance_interval: must be (lo, hi) with lo < hi, the steps lo <= t < hi that are "
            f"guided; got {shown(interval)}"
        )
