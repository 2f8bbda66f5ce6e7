"""The forward process, its posterior and the learned reverse step (Ho et al. 2020, Eq. 2-13).

Pure functions of arrays. In all of them `t` indexes `schedule`, and images are in [-1, 1].
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.schedule import Schedule
from ddpm_jax.shapes import Array, Float, Int

DenoiseFn = Callable[[Float[Array, "b h w c"], Int[Array, " b"]], Float[Array, "b h w outputs"]]
"""denoise_fn(x_t, timesteps) -> output of c channels, or 2 c for a learned variance."""

Prediction = Literal["eps", "x_0", "mean", "v"]
"""The quantity the network predicts: the noise, the image, the posterior mean, or v."""

Variance = Literal["fixed_large", "fixed_small", "learned", "learned_range"]
"""The variance of the reverse step.

fixed_large is beta_t, and fixed_small the posterior variance. With learned the network outputs the
logarithm; with learned_range it interpolates between the logarithms of the two fixed variances.
"""

LEARNED: tuple[Variance, ...] = ("learned", "learned_range")
"""The variances that use the second half of the network's output channels."""

Clip = bool | Literal["dynamic"]
"""Whether the predicted x_0 is clipped to [-1, 1]; dynamic: see `clip_x_0`."""

QUANTILE = 0.995
"""Of dynamic clipping (Saharia et al. 2022, Appendix E)."""

BIN = 2 / 255
"""The width of a bin of Eq. 13 in [-1, 1]; that to which bits of continuous images are counted."""

LEAST_DIVISOR = 2.0**-63
"""The square root of float32's smallest normal number."""


class MeanVariance(NamedTuple):
    """p(x_{t-1} | x_t) and the predicted x_0."""

    mean: Float[Array, "b h w c"]
    variance: Float[Array, "b h w c"]
    log_variance: Float[Array, "b h w c"]
    x_0: Float[Array, "b h w c"]


def q_sample(
    schedule: Schedule,
    x_0: Float[Array, "b h w c"],
    t: Int[Array, " b"],
    noise: Float[Array, "b h w c"],
) -> Float[jax.Array, "b h w c"]:
    """Eq. 4: a sample of q(x_t | x_0), made with `noise` ~ N(0, I)."""
    return (
        _at(schedule.sqrt_alphas_bar, t, x_0) * x_0
        + _at(schedule.sqrt_one_minus_alphas_bar, t, x_0) * noise
    )


def q_posterior(
    schedule: Schedule,
    x_0: Float[Array, "b h w c"],
    x_t: Float[Array, "b h w c"],
    t: Int[Array, " b"],
) -> tuple[
    Float[jax.Array, "b h w c"],
    Float[jax.Array, "b h w c"],
    Float[jax.Array, "b h w c"],
]:
    """Eq. 6-7: (mean, variance, log_variance) of q(x_{t-1} | x_t, x_0).

    At t = 0 the variance is 0, and log_variance has its value at t = 1.
    """
    mean = (
        _at(schedule.posterior_mean_coef_x_0, t, x_t) * x_0
        + _at(schedule.posterior_mean_coef_x_t, t, x_t) * x_t
    )
    variance = _at(schedule.posterior_variance, t, x_t)
    log_variance = _at(schedule.posterior_log_variance, t, x_t)
    return mean, jnp.broadcast_to(variance, mean.shape), jnp.broadcast_to(log_variance, mean.shape)


def p_mean_variance(
    schedule: Schedule,
    output: Float[Array, "b h w outputs"],
    x_t: Float[Array, "b h w c"],
    t: Int[Array, " b"],
    *,
    prediction: Prediction,
    variance: Variance | Float[Array, " T"],
    clip: Clip = True,
) -> MeanVariance:
    """Eq. 1 and 11: mean, variance, log_variance and x_0 of p(x_{t-1} | x_t).

    `output` is the network's output for (x_t, schedule.timesteps[t]): of c channels, or 2 c for a
    learned variance. With `clip` the predicted x_0 is clipped as `clip_x_0` does and the mean
    computed from the clipped x_0. If the network predicts the mean, `clip` changes only the
    returned x_0. `variance` is a name, or a table of the variance of each step of `schedule`: the
    output then has c channels. It is always exp(log_variance); the released code's tables differ
    from that at t = 0.

    Raises ValueError for an unknown `prediction` or `variance`, a table of another length, or an
    output of another shape.
    """
    output, log_variance = _split_variance(schedule, output, x_t, t, variance)
    x_0 = predict_x_0(schedule, output, x_t, t, prediction=prediction)
    if clip:
        x_0 = clip_x_0(x_0, dynamic=clip == "dynamic")
    mean = output if prediction == "mean" else q_posterior(schedule, x_0, x_t, t)[0]
    return MeanVariance(mean, jnp.exp(log_variance), log_variance, x_0)


def clip_x_0(x_0: Float[Array, "b h w c"], *, dynamic: bool = False) -> Float[Array, "b h w c"]:
    """x_0 clipped to [-1, 1].

    If `dynamic`, an image is clipped to [-s, s] and divided by s, the quantile QUANTILE of its
    absolute values, where s is above 1: few pixels are then saturated (Saharia et al. 2022,
    Section 2.3).
    """
    if not dynamic:
        return jnp.clip(x_0, -1, 1)
    s = jnp.quantile(jnp.abs(x_0), QUANTILE, axis=(1, 2, 3), keepdims=True)
    s = jnp.maximum(s, 1.0)
    return jnp.clip(x_0, -s, s) / s


def predict_x_0(
    schedule: Schedule,
    output: Float[Array, "b h w c"],
    x_t: Float[Array, "b h w c"],
    t: Int[Array, " b"],
    *,
    prediction: Prediction,
) -> Float[Array, "b h w c"]:
    """The unclipped x_0 that `output` implies (for eps: from Eq. 4)."""
    if prediction == "eps":
        return (
            _at(schedule.sqrt_recip_alphas_bar, t, x_t) * x_t
            - _at(schedule.sqrt_recipm1_alphas_bar, t, x_t) * output
        )
    if prediction == "x_0":
        return output
    if prediction == "mean":
        of_x_t = _at(schedule.posterior_mean_coef_x_t, t, x_t) * x_t
        # Finite even where nothing of x_0 is in the mean, as sqrt_recip_alphas_bar is.
        of_x_0 = jnp.maximum(_at(schedule.posterior_mean_coef_x_0, t, x_t), LEAST_DIVISOR)
        return (output - of_x_t) / of_x_0
    if prediction == "v":
        return (
            _at(schedule.sqrt_alphas_bar, t, x_t) * x_t
            - _at(schedule.sqrt_one_minus_alphas_bar, t, x_t) * output
        )
    raise unknown("prediction", prediction, Prediction)


def x_0_denoiser(schedule: Schedule, denoise_fn: DenoiseFn, *, prediction: Prediction) -> DenoiseFn:
    """Converts `denoise_fn` to prediction "x_0"; channels for the variance stay as they are.

    A predicted mean depends on the chain. To sample on a `strided` chain with a network that
    predicts the mean, convert it first with the original `schedule`. The other predictions mean the
    same on both chains.
    """

    def predict(
        x_t: Float[Array, "b h w c"], t: Int[Array, " b"]
    ) -> Float[jax.Array, "b h w outputs"]:
        output = denoise_fn(x_t, t)
        channels = x_t.shape[-1]
        of_mean = output[..., :channels]
        of_variance = output[..., channels:]
        return jnp.concatenate(
            [predict_x_0(schedule, of_mean, x_t, t, prediction=prediction), of_variance], axis=-1
        )

    return predict


def target(
    schedule: Schedule,
    x_0: Float[Array, "b h w c"],
    x_t: Float[Array, "b h w c"],
    t: Int[Array, " b"],
    noise: Float[Array, "b h w c"],
    *,
    prediction: Prediction,
) -> Float[Array, "b h w c"]:
    """The training target of the network at x_t = q_sample(schedule, x_0, t, noise).

    v is sqrt(alphas_bar) noise - sqrt(1 - alphas_bar) x_0 (Salimans & Ho 2022, Section 4).
    """
    if prediction == "eps":
        return noise
    if prediction == "x_0":
        return x_0
    if prediction == "mean":
        return q_posterior(schedule, x_0, x_t, t)[0]
    if prediction == "v":
        return (
            _at(schedule.sqrt_alphas_bar, t, x_0) * noise
            - _at(schedule.sqrt_one_minus_alphas_bar, t, x_0) * x_0
        )
    raise unknown("prediction", prediction, Prediction)


def normal_kl(
    mean_1: Float[Array, "*#shape"] | float,
    log_variance_1: Float[Array, "*#shape"] | float,
    mean_2: Float[Array, "*#shape"] | float,
    log_variance_2: Float[Array, "*#shape"] | float,
) -> Float[jax.Array, "*shape"]:
    """KL(N(mean_1, e^log_variance_1) || N(mean_2, e^log_variance_2)) in nats, elementwise."""
    log_ratio = log_variance_1 - log_variance_2
    # expm1(x) - x >= 0, so that rounding cannot make the KL of nearly equal variances negative.
    return 0.5 * (
        jnp.expm1(log_ratio) - log_ratio + (mean_1 - mean_2) ** 2 * jnp.exp(-log_variance_2)
    )


def decoder_log_likelihood(
    x_0: Float[Array, "*shape"],
    mean: Float[Array, "*shape"],
    log_variance: Float[Array, "*shape"],
    levels: int | None = 256,
) -> Float[jax.Array, "*shape"]:
    """Eq. 13: log p(x_0 | x_1) in nats, elementwise: a Gaussian integrated over the bin of x_0.

    The 256 `levels` are k / 127.5 - 1 and the bins x_0 +- 1/255; the first and last bins extend to
    infinity. Other numbers of levels divide [-1, 1] likewise. Uses the logarithm of the exact
    normal CDF, which stays finite far into the tails.

    `levels` None is for continuous x_0: the Gaussian's density, times BIN as the width of a bin.
    """
    if levels is None:
        square = jnp.square(x_0 - mean) * jnp.exp(-log_variance)
        return jnp.asarray(math.log(BIN) - 0.5 * (math.log(2 * math.pi) + log_variance + square))
    half = 1 / (levels - 1)
    inv_std = jnp.exp(-0.5 * log_variance)
    lower = (x_0 - half - mean) * inv_std
    upper = (x_0 + half - mean) * inv_std
    # Since cdf(b) - cdf(a) = cdf(-a) - cdf(-b), use the left tail, where log_ndtr is exact.
    flip = lower + upper > 0
    a, b = jnp.where(flip, -upper, lower), jnp.where(flip, -lower, upper)
    log_cdf_a, log_cdf_b = jax.scipy.special.log_ndtr(a), jax.scipy.special.log_ndtr(b)
    gap = jnp.maximum(log_cdf_b - log_cdf_a, jnp.finfo(jnp.float32).tiny)
    inside = log_cdf_b + jnp.log(-jnp.expm1(-gap))
    below, above = jax.scipy.special.log_ndtr(upper), jax.scipy.special.log_ndtr(-lower)
    last = 1 - half / 4
    return jnp.where(x_0 < -last, below, jnp.where(x_0 > last, above, inside))


def unknown(field: str, value: object, choices: object) -> ValueError:
    """The error for a `value` that is not one of `choices`, a Literal."""
    return ValueError(f"{field}: {value!r} is not one of {', '.join(get_args(choices))}")


def example_mean(x: Float[Array, "b ..."]) -> Float[jax.Array, " b"]:
    """The mean over all axes but the first."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def _split_variance(schedule, output, x_t, t, variance):
    """Splits `output` into (the prediction, the log-variance)."""
    table = None if isinstance(variance, str) else _log_table(schedule, variance)
    learned = table is None and variance in LEARNED
    expected = x_t.shape[:-1] + ((2 if learned else 1) * x_t.shape[-1],)
    if output.shape != expected:
        raise ValueError(
            f"output: must be {expected} for x_t {x_t.shape} and variance "
            f"{repr(variance) if table is None else 'of a table'}, got {output.shape}"
        )
    if table is not None:
        return output, jnp.broadcast_to(_at(table, t, x_t), x_t.shape)
    if variance == "fixed_large":
        return output, jnp.broadcast_to(_at(schedule.fixed_large_log_variance, t, x_t), x_t.shape)
    if variance == "fixed_small":
        return output, jnp.broadcast_to(_at(schedule.posterior_log_variance, t, x_t), x_t.shape)
    if variance == "learned":
        output, log_variance = jnp.split(output, 2, axis=-1)
        return output, log_variance
    if variance == "learned_range":
        # Nichol & Dhariwal 2021, Eq. 15, with v in [-1, 1].
        output, v = jnp.split(output, 2, axis=-1)
        low, high = (
            _at(schedule.posterior_log_variance, t, x_t),
            jnp.log(_at(schedule.betas, t, x_t)),
        )
        return output, low + (v + 1) / 2 * (high - low)
    raise unknown("variance", variance, Variance)


def _log_table(schedule, variance):
    """The logarithms of a table of variances, float32; float64 of NumPy is rounded last."""
    if variance.shape != schedule.betas.shape:
        raise ValueError(
            f"variance: must have an entry for each step of the chain, {schedule.betas.shape}, "
            f"got {variance.shape}"
        )
    log = np.log if isinstance(variance, np.ndarray) else jnp.log
    return jnp.asarray(log(variance), jnp.float32)


def _at(
    table: Float[jax.Array, " T"], t: Int[Array, " b"], x: Float[Array, "b ..."]
) -> Float[jax.Array, "b ..."]:
    """table[t] as [b, 1, ..., 1], which multiplies x."""
    return table[t].reshape(t.shape + (1,) * (x.ndim - 1))
