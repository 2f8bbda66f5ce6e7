"""Training objectives (Ho et al. 2020, Section 3.4): one loss per example; the caller averages.

In all of them `t` indexes `schedule`, and `denoise_fn` is called once, with
(x_t, schedule.timesteps[t]).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ddpm_jax import diffusion
from ddpm_jax.diffusion import DenoiseFn, Prediction, Variance
from ddpm_jax.schedule import Schedule
from ddpm_jax.shapes import Array, Float, Int

LossName = Literal["simple", "vlb", "hybrid"]
"""The training objectives: each is the function of that name below."""

Weight = Callable[..., Float[jax.Array, " b"]]
"""weight(schedule, t, *, prediction): factors for each example's squared error."""


def training_loss(
    name: LossName,
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    x_0: Float[Array, "b h w c"],
    t: Int[Array, " b"],
    noise: Float[Array, "b h w c"],
    *,
    prediction: Prediction,
    variance: Variance,
    weight: Weight | None = None,
    levels: int | None = 256,
) -> Float[jax.Array, " b"]:
    """The objective `name`. `weight` is ignored for "vlb", which has its own weights.

    `levels` is that of `diffusion.decoder_log_likelihood`, here and in all functions below.
    """
    common = (schedule, denoise_fn, x_0, t, noise)
    if name == "simple":
        return simple(*common, prediction=prediction, weight=weight)
    if name == "vlb":
        return vlb(*common, prediction=prediction, variance=variance, levels=levels)
    if name == "hybrid":
        options: dict[str, Any] = {"prediction": prediction, "variance": variance}
        return hybrid(*common, **options, weight=weight, levels=levels)
    raise diffusion.unknown("loss", name, LossName)


def simple(
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    x_0: Float[Array, "b h w c"],
    t: Int[Array, " b"],
    noise: Float[Array, "b h w c"],
    *,
    prediction: Prediction,
    weight: Weight | None = None,
    min_snr_gamma: float | None = None,
) -> Float[jax.Array, " b"]:
    """Eq. 14, L_simple: the mean squared error of the network's output over H, W and C.

    The target is the quantity that `prediction` names (for eps, the noise). Each example's error is
    multiplied by its `weight`, if given. With `min_snr_gamma` the weight is `min_snr_weight` with
    that gamma.

    Raises ValueError if the output's shape is not that of x_0. A learned variance needs another
    loss, since Eq. 14 gives it no gradient.
    """
    x_t = diffusion.q_sample(schedule, x_0, t, noise)
    output = denoise_fn(x_t, schedule.timesteps[t])
    if output.shape != x_0.shape:
        raise ValueError(
            f"output: must have the shape of x_0, {x_0.shape}, for the simple loss, "
            f"got {output.shape}"
        )
    weight = weight or weight_of(None, min_snr_gamma)
    return _weighted_error(schedule, output, x_0, x_t, t, noise, prediction, weight)


def min_snr_weight(
    schedule: Schedule, t: Int[Array, " b"], gamma: float = 5.0, *, prediction: Prediction
) -> Float[jax.Array, " b"]:
    """Min-SNR weights for L_simple (Hang et al. 2023, Section 3.4).

    They turn L_simple into the error of x_0 times min(SNR, gamma), where SNR is
    alphas_bar / (1 - alphas_bar). Raises ValueError for an unknown `prediction`.
    """
    snr = jnp.square(schedule.sqrt_alphas_bar[t] / schedule.sqrt_one_minus_alphas_bar[t])
    clipped = jnp.minimum(snr, gamma)
    if prediction == "x_0":
        return clipped
    if prediction == "eps":
        return gamma / jnp.maximum(snr, gamma)  # Equal to clipped / snr, and finite at snr = 0.
    if prediction == "v":
        return clipped / (snr + 1)
    if prediction == "mean":
        coef = schedule.posterior_mean_coef_x_0[t]
        betas = schedule.betas[t]
        # Where nothing of x_0 is in the mean, both are 0: this is snr / coef^2 from Eq. 4 and 7.
        limit = (1 - betas) * jnp.square(schedule.sqrt_one_minus_alphas_bar[t] / betas)
        lost = coef < diffusion.LEAST_DIVISOR
        return jnp.where(lost, limit, clipped / jnp.square(coef))
    raise diffusion.unknown("prediction", prediction, Prediction)


WEIGHTINGS: dict[str, Weight] = {"min_snr": min_snr_weight}
"""Every weighting of the squared error by its name: a new one is a function and a name here."""


def weight_of(name: str | None, min_snr_gamma: float | None = None) -> Weight | None:
    """The weighting called `name`; `min_snr_gamma` alone names min_snr with this gamma."""
    if min_snr_gamma is not None:
        return functools.partial(min_snr_weight, gamma=min_snr_gamma)
    return None if name is None else WEIGHTINGS[name]


def vlb_terms(
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    x_0: Float[Array, "b h w c"],
    x_t: Float[Array, "b h w c"],
    t: Int[Array, " b"],
    *,
    prediction: Prediction,
    variance: Variance,
    clip: bool,
    levels: int | None = 256,
) -> Float[jax.Array, " b"]:
    """Eq. 5 and 13: the bound's term of each example's step t, in bits/dim.

    At t = 0 it is the decoder's L_0, at t > 0 the KL divergence (L_{t-1} in the paper, which counts
    t from 1). With `clip` the predicted x_0 is clipped to [-1, 1]: set it for evaluation, but not
    for training.
    """
    output = denoise_fn(x_t, schedule.timesteps[t])
    p = diffusion.p_mean_variance(
        schedule, output, x_t, t, prediction=prediction, variance=variance, clip=clip
    )
    return bound_terms(schedule, p, x_0, x_t, t, levels)


def bound_terms(
    schedule: Schedule,
    p: diffusion.MeanVariance,
    x_0: Float[Array, "b h w c"],
    x_t: Float[Array, "b h w c"],
    t: Int[Array, " b"],
    levels: int | None = 256,
) -> Float[jax.Array, " b"]:
    """The terms of `vlb_terms` for a reverse step p = p(x_{t-1} | x_t) that is known."""
    mean, _, log_variance = diffusion.q_posterior(schedule, x_0, x_t, t)
    kl = diffusion.example_mean(diffusion.normal_kl(mean, log_variance, p.mean, p.log_variance))
    decoder = diffusion.decoder_log_likelihood(x_0, p.mean, p.log_variance, levels)
    return jnp.where(t == 0, -diffusion.example_mean(decoder), kl) / math.log(2)


def vlb(
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    x_0: Float[Array, "b h w c"],
    t: Int[Array, " b"],
    noise: Float[Array, "b h w c"],
    *,
    prediction: Prediction,
    variance: Variance,
    levels: int | None = 256,
) -> Float[jax.Array, " b"]:
    """Eq. 5: an estimate of L in bits/dim, from one step t: T times its term, unclipped.

    Its mean over t uniform in 0, ..., T-1 is the sum of all terms but L_T, which has no learned
    parameters.
    """
    x_t = diffusion.q_sample(schedule, x_0, t, noise)
    options: dict[str, Any] = {"prediction": prediction, "variance": variance, "levels": levels}
    terms = vlb_terms(schedule, denoise_fn, x_0, x_t, t, **options, clip=False)
    return schedule.num_timesteps * terms


def hybrid(
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    x_0: Float[Array, "b h w c"],
    t: Int[Array, " b"],
    noise: Float[Array, "b h w c"],
    *,
    prediction: Prediction,
    variance: Variance,
    vlb_weight: float = 0.001,
    weight: Weight | None = None,
    min_snr_gamma: float | None = None,
    levels: int | None = 256,
) -> Float[jax.Array, " b"]:
    """L_simple + vlb_weight L_vlb (Nichol & Dhariwal 2021, Eq. 16), for a learned variance.

    L_vlb sends gradients only to the half of the output's channels that sets the variance.
    """
    x_t = diffusion.q_sample(schedule, x_0, t, noise)
    of_mean, of_variance = jnp.split(denoise_fn(x_t, schedule.timesteps[t]), 2, axis=-1)
    weight = weight or weight_of(None, min_snr_gamma)
    mean_loss = _weighted_error(schedule, of_mean, x_0, x_t, t, noise, prediction, weight)
    frozen = jnp.concatenate([jax.lax.stop_gradient(of_mean), of_variance], axis=-1)
    p = diffusion.p_mean_variance(
        schedule, frozen, x_t, t, prediction=prediction, variance=variance, clip=False
    )
    bound = schedule.num_timesteps * bound_terms(schedule, p, x_0, x_t, t, levels)
    return mean_loss + vlb_weight * bound


def _weighted_error(
    schedule: Schedule,
    output: Float[Array, "b h w c"],
    x_0: Float[Array, "b h w c"],
    x_t: Float[Array, "b h w c"],
    t: Int[Array, " b"],
    noise: Float[Array, "b h w c"],
    prediction: Prediction,
    weight: Weight | None,
) -> Float[jax.Array, " b"]:
    """The mean squared error of what the network predicts, times its weight."""
    target = diffusion.target(schedule, x_0, x_t, t, noise, prediction=prediction)
    error = diffusion.example_mean(jnp.square(output - target))
    if weight is None:
        return error
    return weight(schedule, t, prediction=prediction) * error
