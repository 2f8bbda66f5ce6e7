"""Heun's method (Karras et al. 2022, Algorithm 1 without its noise): deterministic, second order.

On this process the probability flow is straight in x / sqrt(alphas_bar) over
sigma = sqrt(1 - alphas_bar) / sqrt(alphas_bar), with eps as its slope (their Eq. 4 for the
scaling and noise of Eq. 4 here). DDIM follows the slope at the start of a step; this takes the
mean of the slopes at both ends, so a step calls the network twice. The last one ends at sigma = 0,
where there is no slope, and is DDIM's.
"""

import jax
import jax.numpy as jnp

from ddpm_jax.samplers.chain import Chain, Method, eps_of, previous
from ddpm_jax.samplers.ddim import ddim_step
from ddpm_jax.schedule import Schedule
from ddpm_jax.shapes import Array, Float, Int


def heun_step(
    schedule: Schedule,
    x_0: Float[Array, "b h w c"],
    x_t: Float[Array, "b h w c"],
    x_0_end: Float[Array, "b h w c"],
    x_end: Float[Array, "b h w c"],
    t: Int[Array, ""] | int,
) -> Float[Array, "b h w c"]:
    """One step: x_{t-1} from the slopes at both of its ends, t > 0.

    x_0 was predicted from x_t; `x_end` is DDIM's x_{t-1}, and `x_0_end` was predicted from it.
    `t` is one index of `schedule` for the whole batch.
    """
    slope = eps_of(schedule, x_0, x_t, t)
    slope_end = eps_of(schedule, x_0_end, x_end, t - 1)
    alpha, sigma = previous(schedule, t)
    width = sigma - alpha * schedule.sqrt_recipm1_alphas_bar[t]
    # Where nothing of the image is left, sigma is infinite: the step stays DDIM's.
    tiny = jnp.finfo(jnp.float32).tiny
    width = jnp.where(schedule.alphas_bar[t] > tiny, width, 0.0)
    return x_end + 0.5 * width * (slope_end - slope)


def _step(chain: Chain, x_t, t, memory):
    schedule = chain.schedule
    x_0 = chain.p(x_t, t).x_0
    x_end = ddim_step(schedule, x_0, x_t, t, 0.0, eta=0.0)

    def corrected():
        x_0_end = chain.p(x_end, t - 1).x_0
        return heun_step(schedule, x_0, x_t, x_0_end, x_end, t)

    return jax.lax.cond(t > 0, corrected, lambda: x_end), memory


heun = Method(_step, "trailing", deterministic=True)
"""Heun's method. `variance` says how the network was trained, and is not sampled from."""
