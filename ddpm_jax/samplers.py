"""Reverse chains: one `lax.scan` over a pure step (Ho et al. 2020, Algorithm 2).

Every image has a key of its own, and its noise at step t comes from fold_in(key, t) alone, so an
image depends neither on the batch it is drawn in nor on the number of devices.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion import DenoiseFn, Prediction, Variance, p_mean_variance
from ddpm_jax.schedule import Schedule


def ancestral(
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    keys,
    image_shape: tuple[int, ...],
    *,
    prediction: Prediction,
    variance: Variance,
    clip: bool = True,
    trajectory: bool = False,
):
    """Algorithm 2: images x_0 [B, *image_shape] float32, one for each of `keys` [B].

    With `trajectory` returns (x_0, xs) instead, xs [T, B, *image_shape] being x after each step,
    the last one x_0. Without it nothing of the chain is kept.
    """
    num_timesteps = schedule.num_timesteps
    x_T = gaussian_noise(keys, num_timesteps, image_shape)

    def step(x_t, t):
        noise = gaussian_noise(keys, t, image_shape)
        x = ancestral_step(schedule, denoise_fn, x_t, t, noise, prediction=prediction, variance=variance, clip=clip)
        return x, x if trajectory else None

    x_0, xs = jax.lax.scan(step, x_T, np.arange(num_timesteps, dtype=np.int32)[::-1])
    return (x_0, xs) if trajectory else x_0


def ancestral_step(
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    x_t,
    t,
    noise,
    *,
    prediction: Prediction,
    variance: Variance,
    clip: bool = True,
):
    """Algorithm 2, lines 3-4: a draw of p(x_{t-1} | x_t) [B,H,W,C] made from `noise` [B,H,W,C].

    `t` is one index of `schedule` for the whole batch. At t = 0 the mean is returned: no noise.
    """
    t_batch = jnp.full(x_t.shape[:1], t, jnp.int32)
    output = denoise_fn(x_t, schedule.timesteps[t_batch])
    p = p_mean_variance(schedule, output, x_t, t_batch, prediction=prediction, variance=variance, clip=clip)
    return p.mean + jnp.where(t > 0, 1.0, 0.0) * jnp.exp(0.5 * p.log_variance) * noise


def gaussian_noise(keys, t, image_shape: tuple[int, ...]):
    """N(0, I) [B, *image_shape] for `keys` [B] at step `t`: each image's from its own fold_in(key, t)."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, t), image_shape))(keys)
