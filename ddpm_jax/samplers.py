"""Reverse chains: one `lax.scan` over a pure step (Ho et al. 2020, Algorithm 2, and its faster successors).

A sampler is a time grid, given as a `schedule.strided` chain, and a step. Every image has a key of
its own, and its noise at the original step t comes from fold_in(key, t) alone, so an image depends
neither on the batch it is drawn in nor on the number of devices.

All samplers share their arguments:
  schedule      the chain, strided or not; `denoise_fn` is told the original steps, schedule.timesteps
  keys          [B], one an image
  image_shape   (H, W, C)
  prediction, variance, clip   as in `p_mean_variance`
  x_T           [B,H,W,C] to start from; None for N(0, I) of fold_in(key, START), however many steps follow
  trajectory    return (x_0, xs) instead of x_0, xs [S,B,H,W,C] being x after each of the S steps;
                without it nothing of the chain is kept
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion import DenoiseFn, MeanVariance, Prediction, Variance, p_mean_variance
from ddpm_jax.schedule import Schedule

START = 2**32 - 1
"""What a key is folded with for x_T: no step has this number."""

Grid = Literal["linspace", "leading", "trailing", "quad"]
"""How a shorter chain's steps lie among the T original ones; see `time_grid`."""


def time_grid(num_timesteps: int, steps: int, grid: Grid = "linspace") -> np.ndarray:
    """`steps` of 0, ..., T-1, ascending and distinct, T being `num_timesteps`: [S] int32.

    linspace   evenly from 0 to T-1, both included (of one step, T-1)
    leading    the first of each of S equal parts: 0, T/S, 2T/S, ...; like quad it starts below T-1, where
               x is not yet pure noise, which a chain of very few steps shows
    trailing   the last of each: T/S - 1, 2T/S - 1, ..., T-1
    quad       squares of even steps from 0 to sqrt(0.8 T) (Song et al. 2021, DDIM, Appendix D.2),
               moved apart where they would coincide

    Raises ValueError for an unknown grid or `steps` outside 1, ..., T.
    """
    T, S = num_timesteps, steps
    if not 1 <= S <= T:
        raise ValueError(f"steps: must be from 1 to {T}, got {S}")
    i = np.arange(S)
    if grid == "linspace":
        t = np.rint(np.linspace(T - 1, 0, S))[::-1]
    elif grid == "leading":
        t = i * T // S
    elif grid == "trailing":
        t = T - 1 - (i * T // S)[::-1]
    elif grid == "quad":
        t = np.linspace(0, np.sqrt(0.8 * T), S) ** 2 // 1
        t = np.maximum.accumulate(t - i) + i
        t = np.minimum(t, T - S + i)
    else:
        raise ValueError(f"grid: {grid!r} is not one of linspace, leading, trailing, quad")
    return t.astype(np.int32)


def ancestral(
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    keys,
    image_shape: tuple[int, ...],
    *,
    prediction: Prediction,
    variance: Variance,
    clip: bool = True,
    x_T=None,
    trajectory: bool = False,
):
    """Algorithm 2: images x_0 [B,H,W,C] float32."""

    def step(p, x_t, t, _):
        return ancestral_step(p, t, gaussian_noise(keys, schedule.timesteps[t], image_shape))

    p_fn = _reverse(schedule, denoise_fn, prediction=prediction, variance=variance, clip=clip)
    return _scan(step, p_fn, schedule, _start(keys, image_shape, x_T), trajectory)


def ancestral_step(p: MeanVariance, t, noise):
    """Algorithm 2, line 4: a draw of p(x_{t-1} | x_t) [B,H,W,C] made from `noise` [B,H,W,C].

    `t` is one index for the whole batch. At t = 0 the mean is returned: no noise.
    """
    return p.mean + jnp.where(t > 0, 1.0, 0.0) * jnp.exp(0.5 * p.log_variance) * noise


def ddim(
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    keys,
    image_shape: tuple[int, ...],
    *,
    prediction: Prediction,
    variance: Variance,
    eta: float = 0.0,
    clip: bool = True,
    x_T=None,
    trajectory: bool = False,
):
    """Images x_0 [B,H,W,C] by DDIM (Song et al. 2021, Eq. 12 and 16).

    eta scales the noise of a step, from none (0; with x_T given, `keys` may be None) to the
    posterior's (1). `variance` tells how the network was trained, and is not sampled from.
    """

    def step(p, x_t, t, _):
        noise = gaussian_noise(keys, schedule.timesteps[t], image_shape) if eta else 0.0
        return ddim_step(schedule, p.x_0, x_t, t, noise, eta=eta)

    p_fn = _reverse(schedule, denoise_fn, prediction=prediction, variance=variance, clip=clip)
    return _scan(step, p_fn, schedule, _start(keys, image_shape, x_T), trajectory)


def ddim_step(schedule: Schedule, x_0, x_t, t, noise, *, eta: float):
    """DDIM, Eq. 12: x_{t-1} [B,H,W,C] from x_t and the predicted x_0 [B,H,W,C].

    eps is what leads from x_0 to x_t: with a clipped x_0 it is not the network's own. `t` is one
    index of `schedule` for the whole batch.
    """
    alpha, sigma = _previous(schedule, t)
    noise_variance = eta**2 * schedule.posterior_variance[t]
    towards_x_t = jnp.sqrt(jnp.maximum(sigma**2 - noise_variance, 0.0))
    return (
        alpha * x_0 + towards_x_t * _eps(schedule, x_0, x_t, t) + jnp.sqrt(noise_variance) * noise
    )


def ddim_encode(
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    x_0,
    *,
    prediction: Prediction,
    variance: Variance,
    clip: bool = False,
):
    """The latent x_T [B,H,W,C] that `ddim` with eta = 0 and the same `clip` takes back to about x_0 [B,H,W,C].

    DDIM's ordinary differential equation run upwards (Song et al. 2021, Section 4.3): each step takes
    eps from the noise level it comes from, the first one from x_0 itself, so that the error of the
    round trip shrinks with the number of steps.
    """
    p_fn = _reverse(schedule, denoise_fn, prediction=prediction, variance=variance, clip=clip)

    def step(x, t):
        before = jnp.maximum(t - 1, 0)
        predicted = p_fn(x, before).x_0
        eps = _eps(schedule, predicted, x, before)
        predicted = jnp.where(t == 0, x, predicted)
        return schedule.sqrt_alphas_bar[t] * predicted + schedule.sqrt_one_minus_alphas_bar[
            t
        ] * eps, None

    return jax.lax.scan(step, x_0, np.arange(schedule.num_timesteps, dtype=np.int32))[0]


def dpm_solver(
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    keys,
    image_shape: tuple[int, ...],
    *,
    prediction: Prediction,
    variance: Variance,
    clip: bool = True,
    x_T=None,
    trajectory: bool = False,
):
    """Images x_0 [B,H,W,C] by DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): deterministic given x_T, of second order.

    `variance` tells how the network was trained, and is not sampled from.
    """

    def step(p, x_t, t, x_0_before):
        return dpm_solver_step(schedule, p.x_0, x_0_before, x_t, t)

    p_fn = _reverse(schedule, denoise_fn, prediction=prediction, variance=variance, clip=clip)
    return _scan(step, p_fn, schedule, _start(keys, image_shape, x_T), trajectory)


def dpm_solver_step(schedule: Schedule, x_0, x_0_before, x_t, t):
    """DPM-Solver++(2M), one step: x_{t-1} [B,H,W,C] from x_t and the x_0 predicted now and one step earlier.

    In lambda = log(alpha / sigma) the data prediction is extrapolated linearly to the middle of the
    step. The first step knows no earlier one, and the last ends where lambda is infinite: both are of
    first order. `t` is one index of `schedule` for the whole batch.
    """
    last = schedule.num_timesteps - 1
    log_snr = _half_log_snr(schedule, t)
    alpha, sigma = _previous(schedule, t)
    h = jnp.log(alpha) - jnp.log(sigma) - log_snr
    h_before = log_snr - _half_log_snr(schedule, jnp.minimum(t + 1, last))
    # jsd starts at lambda = -inf; the step after it then takes x_0 alone, as its weight h / inf says.
    weight = jnp.where((t == 0) | (t == last), 0.0, h / (2 * h_before))
    target = x_0 + weight * (x_0 - x_0_before)
    return sigma / schedule.sqrt_one_minus_alphas_bar[t] * x_t - alpha * jnp.expm1(-h) * target


def example_keys(rng, indices):
    """fold_in(rng, i) for each of `indices` [B]: keys [B].

    Raises ValueError if `rng` is not a threefry key: what the others draw depends on the batch.
    """
    if "threefry" not in str(jax.random.key_impl(rng)):
        raise ValueError(
            f"rng: a threefry key is needed, got {jax.random.key_impl(rng)}; use jax.random.key(seed)"
        )
    return jax.vmap(lambda i: jax.random.fold_in(rng, i))(indices)


def gaussian_noise(keys, t, image_shape: tuple[int, ...]):
    """N(0, I) [B, *image_shape] for `keys` [B] at step `t`: each image's from its own fold_in(key, t)."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, t), image_shape))(keys)


def _start(keys, image_shape, x_T):
    return gaussian_noise(keys, START, image_shape) if x_T is None else x_T


def _reverse(schedule, denoise_fn, **options):
    """p_fn(x_t, t) -> MeanVariance for one index t of the whole batch."""

    def p_fn(x_t, t):
        t_batch = jnp.full(x_t.shape[:1], t, jnp.int32)
        return p_mean_variance(
            schedule, denoise_fn(x_t, schedule.timesteps[t_batch]), x_t, t_batch, **options
        )

    return p_fn


def _scan(step, p_fn, schedule, x_T, trajectory):
    def body(carry, t):
        x_t, x_0_before = carry
        p = p_fn(x_t, t)
        x = step(p, x_t, t, x_0_before)
        return (x, p.x_0), x if trajectory else None

    steps = np.arange(schedule.num_timesteps, dtype=np.int32)[::-1]
    (x_0, _), xs = jax.lax.scan(body, (x_T, jnp.zeros_like(x_T)), steps)
    return (x_0, xs) if trajectory else x_0


def _previous(schedule, t):
    """(sqrt(alphas_bar), sqrt(1 - alphas_bar)) one step before t; (1, 0) before the first."""
    before = jnp.maximum(t - 1, 0)
    alpha = jnp.where(t == 0, 1.0, schedule.sqrt_alphas_bar[before])
    return alpha, jnp.where(t == 0, 0.0, schedule.sqrt_one_minus_alphas_bar[before])


def _eps(schedule, x_0, x_t, t):
    return (x_t - schedule.sqrt_alphas_bar[t] * x_0) / schedule.sqrt_one_minus_alphas_bar[t]


def _half_log_snr(schedule, t):
    return jnp.log(schedule.sqrt_alphas_bar[t]) - jnp.log(schedule.sqrt_one_minus_alphas_bar[t])
