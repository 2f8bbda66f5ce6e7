"""The bound on the negative log-likelihood in bits/dim (Ho et al. 2020, Sections 3.3 and 4.3)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import diffusion, losses
from ddpm_jax.diffusion import DenoiseFn, Prediction, Variance
from ddpm_jax.keys import example_keys, gaussian_noise
from ddpm_jax.schedule import Schedule
from ddpm_jax.shapes import AnyKey, AnyKeys, Array, Float, Int, Integer


class BitsPerDim(NamedTuple):
    """The bound of each image and its parts."""

    total: Float[Array, " b"]
    """Bits/dim: prior + the sum of terms."""
    prior: Float[Array, " b"]
    """Bits/dim: L_T."""
    terms: Float[Array, "b T"]
    """Bits/dim: at t = 0 the decoder's L_0 (distortion); at t > 0 the KL term L_t (rate)."""
    mse: Float[Array, "b T"]
    """Mean squared error of the x_0 predicted from x_t, images in [-1, 1]."""

    @property
    def cells(self) -> None:
        """None: the errors of cells were not asked for."""
        return None


class BitsAndCells(NamedTuple):
    """A BitsPerDim with the errors of the cells, where they were asked for."""

    total: Float[Array, " b"]
    prior: Float[Array, " b"]
    terms: Float[Array, "b T"]
    mse: Float[Array, "b T"]
    cells: Float[Array, "b T rows columns c"]
    """As mse, for each channel in each cell of the image."""


def prior_bits(schedule: Schedule, x_0: Float[Array, "b h w c"]) -> Float[jax.Array, " b"]:
    """Eq. 5, L_T: KL(q(x_T | x_0) || N(0, I)) of images x_0, in bits/dim."""
    mean = schedule.sqrt_alphas_bar[-1] * x_0
    log_variance = 2 * jnp.log(schedule.sqrt_one_minus_alphas_bar[-1])
    kl = diffusion.normal_kl(mean, log_variance, 0.0, 0.0)
    return diffusion.example_mean(kl) / math.log(2)


def bits_per_dim(
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    rng: AnyKey,
    x_0: Float[Array, "b h w c"],
    *,
    start: int | Integer[Array, ""] = 0,
    prediction: Prediction,
    variance: Variance | Float[Array, " T"],
    clip: bool = True,
    levels: int | None = 256,
    cells: tuple[int, int] | None = None,
) -> BitsPerDim | BitsAndCells:
    """Eq. 5 for images x_0 with `levels` levels in [-1, 1], with one sample of x_t per step t.

    With `levels` None x_0 is continuous, and p(x_0) a density; see
    `diffusion.decoder_log_likelihood`.

    `schedule` may be a strided chain that begins at the original step 0: the decoder's L_0 is of
    that step. The noise of image i at the original step t comes from
    fold_in(fold_in(rng, start + i), t), so it depends neither on the batch nor on the other steps.
    `variance` and `clip` are as in `p_mean_variance`; `cells` (rows, columns) divides H and W.
    Raises ValueError if `rng` is not a threefry key.
    """
    keys = example_keys(rng, start + jnp.arange(len(x_0), dtype=jnp.uint32))
    options: dict[str, Any] = {"prediction": prediction, "variance": variance, "clip": clip}
    options["levels"] = levels

    def step(_, t):
        return None, bound_at(schedule, denoise_fn, keys, x_0, t, **options, cells=cells)

    _, of_steps = jax.lax.scan(step, None, np.arange(schedule.num_timesteps, dtype=np.int32))
    return whole_bound(schedule, x_0, *(jnp.moveaxis(each, 0, 1) for each in of_steps))


def bound_at(
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    keys: AnyKeys,
    x_0: Float[Array, "b h w c"],
    t: Int[Array, ""],
    *,
    prediction: Prediction,
    variance: Variance | Float[Array, " T"],
    clip: bool = True,
    levels: int | None = 256,
    cells: tuple[int, int] | None = None,
) -> tuple[Float[jax.Array, "b ..."], ...]:
    """(the bound's term [b], the mean squared error of the predicted x_0 [b]) at one t.

    With `cells` (rows, columns) also the error for each channel in each cell, [b,rows,columns,c].
    Image i is diffused with noise of fold_in(keys[i], schedule.timesteps[t]). Bits/dim.
    """
    t_batch = jnp.full(x_0.shape[:1], t, jnp.int32)
    noise = gaussian_noise(keys, schedule.timesteps[t], x_0.shape[1:])
    x_t = diffusion.q_sample(schedule, x_0, t_batch, noise)
    output = denoise_fn(x_t, schedule.timesteps[t_batch])
    p = diffusion.p_mean_variance(
        schedule, output, x_t, t_batch, prediction=prediction, variance=variance, clip=clip
    )
    terms = losses.bound_terms(schedule, p, x_0, x_t, t_batch, levels)
    squares = jnp.square(x_0 - p.x_0)
    mse = diffusion.example_mean(squares)
    return (terms, mse) if cells is None else (terms, mse, cell_means(squares, cells))


def cell_means(
    x: Float[Array, "b h w c"], cells: tuple[int, int]
) -> Float[jax.Array, "b rows columns c"]:
    """The means of the cells of images x, `cells` being (rows, columns), which divide h and w."""
    b, h, w, c = x.shape
    rows, columns = cells
    return jnp.mean(x.reshape(b, rows, h // rows, columns, w // columns, c), axis=(2, 4))


def decoder_bits(
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    keys: AnyKeys,
    x_0: Float[Array, "b h w c"],
    variances: Float[Array, " V"],
    *,
    prediction: Prediction,
    variance: Variance,
    clip: bool = True,
    levels: int | None = 256,
) -> Float[jax.Array, "b V"]:
    """Eq. 13, L_0 in bits/dim of each image with each of `variances` in place of the decoder's own.

    The mean is the predicted x_0. x_1 is that of `bound_at`; the other arguments are as there.
    """
    t = jnp.zeros(x_0.shape[:1], jnp.int32)
    x_t = diffusion.q_sample(schedule, x_0, t, gaussian_noise(keys, 0, x_0.shape[1:]))
    output = denoise_fn(x_t, schedule.timesteps[t])
    p = diffusion.p_mean_variance(
        schedule, output, x_t, t, prediction=prediction, variance=variance, clip=clip
    )

    def bits(log_variance):
        table = jnp.full_like(x_0, log_variance)
        log_likelihood = diffusion.decoder_log_likelihood(x_0, p.x_0, table, levels)
        return -diffusion.example_mean(log_likelihood) / math.log(2)

    return jax.lax.map(bits, jnp.log(variances)).T


def whole_bound(
    schedule: Schedule,
    x_0: Float[Array, "b h w c"],
    terms: Float[Array, "b T"],
    mse: Float[Array, "b T"],
    cells: Float[Array, "b T rows columns c"] | None = None,
) -> BitsPerDim | BitsAndCells:
    """The bound of images x_0, put together from `bound_at` of every t."""
    prior = prior_bits(schedule, x_0)
    total = prior + terms.sum(axis=1)
    if cells is None:
        return BitsPerDim(total, prior, terms, mse)
    return BitsAndCells(total, prior, terms, mse, cells)


def rate(
    prior: Float[Array, "*batch"] | float, terms: Float[Array, "*batch T"]
) -> Float[np.ndarray, "*batch T"]:
    """Bits/dim sent after 1, ..., T reverse steps (the paper's Table 4 and Figure 5).

    Entry k - 1 is L_T plus the terms of t > T - k. `prior` and `terms` are as in
    `BitsPerDim`. The last entry and the distortion terms[..., 0] add up to the whole bound.
    """
    terms = np.asarray(terms)
    sent = np.flip(terms[..., 1:], axis=-1).cumsum(axis=-1)
    return (
        np.concatenate([np.zeros_like(terms[..., :1]), sent], axis=-1)
        + np.asarray(prior)[..., None]
    )
