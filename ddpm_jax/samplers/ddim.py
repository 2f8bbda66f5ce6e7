"""DDIM (Song et al. 2021): deterministic, or with part of the noise; and its inverse."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion import Clip, DenoiseFn, Prediction, Variance, p_mean_variance
from ddpm_jax.samplers.chain import Chain, Method, eps_of, previous
from ddpm_jax.schedule import Schedule
from ddpm_jax.shapes import Array, Float, Int


def ddim_step(
    schedule: Schedule,
    x_0: Float[Array, "b h w c"],
    x_t: Float[Array, "b h w c"],
    t: Int[Array, ""] | int,
    noise: Float[Array, "b h w c"] | float,
    *,
    eta: float,
) -> Float[jax.Array, "b h w c"]:
    """DDIM, Eq. 12: x_{t-1} from x_t and the predicted x_0.

    eps is the one that leads from x_0 to x_t: with a clipped x_0 it is not the network's own. `t`
    is one index of `schedule` for the whole batch.
    """
    alpha, sigma = previous(schedule, t)
    noise_variance = eta**2 * schedule.posterior_variance[t]
    towards_x_t = jnp.sqrt(jnp.maximum(sigma**2 - noise_variance, 0.0))
    eps = eps_of(schedule, x_0, x_t, t)
    return alpha * x_0 + towards_x_t * eps + jnp.sqrt(noise_variance) * noise


def _step(chain: Chain, x_t, t, memory, *, eta: float = 0.0):
    x_0 = chain.p(x_t, t).x_0
    noise = chain.noise(t) if eta else 0.0
    return ddim_step(chain.schedule, x_0, x_t, t, noise, eta=eta), memory


ddim = Method(_step, deterministic=True)
"""DDIM, Eq. 12 and 16.

`eta` scales the noise of a step, from none (0; with x_T given, `keys` may be None) to the
posterior's (1). `variance` says how the network was trained, and is not sampled from.
"""


def ddim_encode_step(
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    x: Float[Array, "b h w c"],
    t: Int[Array, ""] | int,
    *,
    prediction: Prediction,
    variance: Variance,
    clip: Clip = False,
) -> Float[Array, "b h w c"]:
    """One step of `ddim_encode`: from x_{t-1}, or the image where t is 0, to x_t."""
    before = jnp.maximum(t - 1, 0)
    t_batch = jnp.full(x.shape[:1], before, jnp.int32)
    output = denoise_fn(x, schedule.timesteps[t_batch])
    p = p_mean_variance(
        schedule, output, x, t_batch, prediction=prediction, variance=variance, clip=clip
    )
    eps = eps_of(schedule, p.x_0, x, before)
    x_0 = jnp.where(t == 0, x, p.x_0)
    alpha = schedule.sqrt_alphas_bar[t]
    return alpha * x_0 + schedule.sqrt_one_minus_alphas_bar[t] * eps


def ddim_encode(
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    x_0: Float[Array, "b h w c"],
    **options: Any,
) -> Float[Array, "b h w c"]:
    """The latent x_T that `ddim` with eta = 0 and this `clip` takes back to about x_0.

    DDIM's ordinary differential equation run upwards (Song et al. 2021, Section 4.3). Each step
    takes eps from the noise level it comes from, the first one from x_0 itself, so that
    the error of the round trip shrinks with the number of steps. `options` are those of
    `ddim_encode_step`: prediction, variance, clip.
    """

    def step(x, t):
        return ddim_encode_step(schedule, denoise_fn, x, t, **options), None

    return jax.lax.scan(step, x_0, np.arange(schedule.num_timesteps, dtype=np.int32))[0]
