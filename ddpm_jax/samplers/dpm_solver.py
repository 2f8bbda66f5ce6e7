"""DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): deterministic given x_T, of second order."""

import jax
import jax.numpy as jnp

from ddpm_jax.samplers.chain import Chain, Method, previous
from ddpm_jax.schedule import Schedule
from ddpm_jax.shapes import Array, Float, Int


def dpm_solver_step(
    schedule: Schedule,
    x_0: Float[Array, "b h w c"],
    x_0_before: Float[Array, "b h w c"],
    x_t: Float[Array, "b h w c"],
    t: Int[Array, ""] | int,
) -> Float[jax.Array, "b h w c"]:
    """One step: x_{t-1} from x_t and the x_0 predicted now and one step earlier.

    In lambda = log(alpha / sigma) the data prediction is extrapolated linearly to the middle of
    the step. The first step has no earlier prediction, and the last ends where lambda is infinite:
    both are of first order, and so are steps from where nothing of the image is left. `t` is one
    index of `schedule` for the whole batch.
    """
    last = schedule.num_timesteps - 1
    log_snr = _half_log_snr(schedule, t)
    alpha, sigma = previous(schedule, t)
    # Where nothing of the image is left, lambda is -inf: at one step (jsd), or at many.
    h = jnp.where(jnp.isneginf(log_snr), jnp.inf, jnp.log(alpha) - jnp.log(sigma) - log_snr)
    h_before = log_snr - _half_log_snr(schedule, jnp.minimum(t + 1, last))
    # The step after those takes x_0 alone, as its weight h / inf says. h_before is not a number
    # between two of them, and 0 where steps are too short for float32's lambda.
    second_order = (t > 0) & (t < last) & (h_before > 0)
    weight = jnp.where(second_order, h / (2 * h_before), 0.0)
    target = x_0 + weight * (x_0 - x_0_before)
    return sigma / schedule.sqrt_one_minus_alphas_bar[t] * x_t - alpha * jnp.expm1(-h) * target


def _step(chain: Chain, x_t, t, x_0_before):
    x_0 = chain.p(x_t, t).x_0
    return dpm_solver_step(chain.schedule, x_0, x_0_before, x_t, t), x_0


def _half_log_snr(schedule, t):
    return jnp.log(schedule.sqrt_alphas_bar[t]) - jnp.log(schedule.sqrt_one_minus_alphas_bar[t])


# linspace would have it extrapolate over its widest step, the one down to t = 0.
dpm_solver = Method(_step, grid="trailing")
"""DPM-Solver++(2M). `variance` says how the network was trained, and is not sampled from."""
