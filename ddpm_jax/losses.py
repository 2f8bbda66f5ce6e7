"""Training objectives, one number per example; the caller takes the mean (Ho et al. 2020, Section 3.4)."""

import jax.numpy as jnp

from ddpm_jax import diffusion
from ddpm_jax.diffusion import DenoiseFn, Prediction
from ddpm_jax.schedule import Schedule


def simple(schedule: Schedule, denoise_fn: DenoiseFn, x_0, t, noise, *, prediction: Prediction):
    """Eq. 14, L_simple [B]: the mean squared error of the network's output over H, W and C.

    x_0 and noise [B,H,W,C], t [B] an index of `schedule`. For a prediction other than eps the
    target is that quantity instead of the noise.

    Raises ValueError for an output of another shape: a learned variance gets no gradient from Eq. 14.
    """
    x_t = diffusion.q_sample(schedule, x_0, t, noise)
    output = denoise_fn(x_t, schedule.timesteps[t])
    if output.shape != x_0.shape:
        raise ValueError(f"output: {output.shape}, but the simple loss of {x_0.shape} needs the same shape")
    error = output - diffusion.target(schedule, x_0, x_t, t, noise, prediction=prediction)
    return jnp.mean(error**2, axis=tuple(range(1, error.ndim)))
