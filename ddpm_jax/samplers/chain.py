"""The reverse chain: one `lax.scan` over one pure step (Ho et al. 2020, Algorithm 2).

A sampler is a time grid, given as a `schedule.strided` chain, and a step. Every image has a key of
its own, and its noise at the original step t comes from fold_in(key, t) alone, so an image depends
neither on the batch it is drawn in nor on the number of devices.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion import DenoiseFn, MeanVariance, Prediction, Variance, p_mean_variance
from ddpm_jax.keys import START, gaussian_noise
from ddpm_jax.samplers.grids import Grid
from ddpm_jax.schedule import Schedule
from ddpm_jax.shapes import AnyKeys, Array, Float, Int


class Chain(NamedTuple):
    """A reverse chain as its steps see it; t is one index of `schedule` for the whole batch."""

    schedule: Schedule
    p: Callable[..., MeanVariance]
    """p(x_t [B,H,W,C], t): p(x_{t-1} | x_t), one call of the network."""
    noise: Callable[..., jax.Array]
    """noise(t): N(0, I) [B,H,W,C], each image's own."""


Step = Callable[..., tuple[jax.Array, jax.Array]]
"""step(chain, x_t [B,H,W,C], t, x_0_before, **options) -> (x_{t-1}, the x_0 predicted from x_t).

`x_0_before` is the x_0 of the step before this one, zeros in the first; options are keywords.
"""


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to draw images, made of its step alone; calling it runs the whole chain."""

    step: Step
    grid: Grid = "linspace"
    """The time grid that it takes unless another is chosen."""

    @property
    def options(self) -> list[str]:
        """The names of the step's own options."""
        parameters = inspect.signature(self.step).parameters.values()
        return [each.name for each in parameters if each.kind == each.KEYWORD_ONLY]

    def __call__(
        self,
        schedule: Schedule,
        denoise_fn: DenoiseFn,
        keys: AnyKeys | None,
        image_shape: tuple[int, ...],
        *,
        prediction: Prediction,
        variance: Variance,
        clip: bool = True,
        x_T: Float[Array, "b h w c"] | None = None,
        trajectory: bool = False,
        **options: Any,
    ) -> Any:
        """Images x_0 [B,H,W,C] float32, one for each of `keys` [B].

        schedule      the chain, strided or not; `denoise_fn` gets the original steps,
                      schedule.timesteps
        image_shape   (H, W, C)
        prediction, variance, clip   as in `p_mean_variance`
        x_T           [B,H,W,C] to start from; None for N(0, I) of fold_in(key, START), however
                      many steps follow
        trajectory    return (x_0, xs) instead of x_0, xs [S,B,H,W,C] being x after each of the S
                      steps; without it nothing of the chain is kept
        options       the step's own, eta of ddim for example
        """

        def p(x_t, t):
            t_batch = jnp.full(x_t.shape[:1], t, jnp.int32)
            output = denoise_fn(x_t, schedule.timesteps[t_batch])
            return p_mean_variance(
                schedule, output, x_t, t_batch, prediction=prediction, variance=variance, clip=clip
            )

        def noise(t):
            # `keys` are None only where nothing is drawn.
            step = schedule.timesteps[t]
            return gaussian_noise(keys, step, image_shape)  # type: ignore[arg-type]

        def body(carry, t):
            x_t, x_0_before = carry
            x, x_0 = self.step(chain, x_t, t, x_0_before, **options)
            return (x, x_0), x if trajectory else None

        chain = Chain(schedule, p, noise)
        if x_T is None:
            x_T = gaussian_noise(keys, START, image_shape)  # type: ignore[arg-type]
        steps = np.arange(schedule.num_timesteps, dtype=np.int32)[::-1]
        (x_0, _), xs = jax.lax.scan(body, (x_T, jnp.zeros_like(x_T)), steps)
        return (x_0, xs) if trajectory else x_0


def previous(
    schedule: Schedule, t: Int[Array, ""] | int
) -> tuple[Float[jax.Array, ""], Float[jax.Array, ""]]:
    """(sqrt(alphas_bar), sqrt(1 - alphas_bar)) one step before t; (1, 0) before the first."""
    before = jnp.maximum(t - 1, 0)
    alpha = jnp.where(t == 0, 1.0, schedule.sqrt_alphas_bar[before])
    return alpha, jnp.where(t == 0, 0.0, schedule.sqrt_one_minus_alphas_bar[before])


def eps_of(
    schedule: Schedule,
    x_0: Float[Array, "b h w c"],
    x_t: Float[Array, "b h w c"],
    t: Int[Array, ""] | int,
) -> Float[Array, "b h w c"]:
    """The eps that leads from x_0 to x_t (Eq. 4 solved for it)."""
    return (x_t - schedule.sqrt_alphas_bar[t] * x_0) / schedule.sqrt_one_minus_alphas_bar[t]
