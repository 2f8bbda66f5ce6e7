"""Editing with any trained network: inpainting, variations and restoration.

Pure functions of a `denoise_fn` and a Schedule, like the samplers: nothing is trained, and a
`denoise_fn` with labels and guidance serves as well. Image i depends on its own key alone.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion import (
    Clip,
    DenoiseFn,
    Prediction,
    Variance,
    p_mean_variance,
    q_sample,
    x_0_denoiser,
)
from ddpm_jax.errors import UserError, shown
from ddpm_jax.keys import INPAINT, START, fold, gaussian_noise
from ddpm_jax.operators import Operator, is_known
from ddpm_jax.samplers import Method, ancestral_step, start_state
from ddpm_jax.samplers.chain import previous
from ddpm_jax.schedule import Schedule, strided
from ddpm_jax.shapes import AnyKeys, Array, Bool, Float, Int, Int32

Mask = Float[Array, "#b h w 1"] | Bool[Array, "#b h w 1"]


def inpaint(
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    keys: AnyKeys,
    known: Float[Array, "b h w c"],
    mask: Mask,
    *,
    resample: int = 10,
    jump: int = 10,
    prediction: Prediction,
    variance: Variance | Float[Array, " T"],
    clip: Clip = True,
) -> Float[Array, "b h w c"]:
    """Images [B,H,W,C] that are `known` where `mask` is 1 and fit to it elsewhere.

    RePaint (Lugmayr et al. 2022, Algorithm 1), ancestral on the chain `schedule`, strided or not.
    `mask` [B or 1,H,W,1] is bool or float, and pixels above 1/2 are known: they are returned as
    they are, bit for bit. See `inpaint_walk` for `resample` and `jump`, and for how often the
    network is called. `prediction`, `variance` and `clip` are as in `p_mean_variance`.
    """
    step = inpaint_step(
        schedule,
        denoise_fn,
        keys,
        known,
        mask,
        resample=resample,
        jump=jump,
        prediction=prediction,
        variance=variance,
        clip=clip,
    )
    calls = len(inpaint_walk(schedule.num_timesteps, resample, jump))
    x = start_state(keys, known.shape[1:]).x
    return jax.lax.scan(
        lambda x, position: (step(x, position), None), x, np.arange(calls, dtype=np.int32)
    )[0]


def inpaint_walk(steps: int, resample: int = 10, jump: int = 10) -> Int32[np.ndarray, "calls 2"]:
    """The network calls of `inpaint` on a chain of `steps` steps: (t, how far up afterwards).

    x goes down from pure noise. Where it has been diffused 1, 1 + jump, 1 + 2 jump, ... times and
    can be diffused `jump` times more, it is, and comes down again, until it has come down
    `resample` times in all (Lugmayr et al. 2022, Section 4.2, and the steps of their code).
    resample = 1 is no way up at all, and jump = 1 their Algorithm 1. 250 steps with 10 and 10 call
    the network 2,410 times. A chain of no more than `jump` steps has no way up.

    Raises UserError unless `resample` and `jump` are whole numbers of at least 1.
    """
    for name, value in (("resample", resample), ("jump", jump)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise UserError(f"{name}: must be a whole number of at least 1, got {shown(value)}")
    starts = range(1, steps - jump + 1, jump)
    calls = []
    for t in reversed(range(steps)):
        for _ in range(resample - 1 if t in starts else 0):
            calls.append((t, jump))
            calls += [(t + above, 0) for above in reversed(range(1, jump))]
        calls.append((t, 0))
    return np.array(calls, np.int32)


def inpaint_step(
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    keys: AnyKeys,
    known: Float[Array, "b h w c"],
    mask: Mask,
    *,
    resample: int = 10,
    jump: int = 10,
    prediction: Prediction,
    variance: Variance | Float[Array, " T"],
    clip: Clip = True,
) -> Callable[[Float[Array, "b h w c"], Int[Array, ""]], Float[Array, "b h w c"]]:
    """One network call of `inpaint`: (x before it, its position in `inpaint_walk`) -> x after it.

    The arguments are those of `inpaint`. The caller takes the positions 0, 1, ... in one loop or
    in parts of it, from x of `start_state`. Cannot be traced with `schedule` as an argument.

    A step down is that of Algorithm 2 where pixels are unknown and q_sample(known, t - 1) where
    they are known (Eq. 8 of RePaint); each pixel takes one of the two, so both are made from the
    same noise. A way up of several steps is one draw of q, whose beta is that of a `strided` chain.
    """
    walk = inpaint_walk(schedule.num_timesteps, resample, jump)
    steps = jnp.asarray(walk[:, 0])
    betas_up = jnp.asarray(_betas_up(schedule, walk, jump))
    known = jnp.asarray(known, jnp.float32)
    keep = is_known(mask)
    keys = fold(keys, INPAINT)
    shape = known.shape[1:]

    def next_x(x: Float[Array, "b h w c"], position: Int[Array, ""]) -> Float[Array, "b h w c"]:
        t = steps[position]
        t_batch = jnp.full(x.shape[:1], t, jnp.int32)
        output = denoise_fn(x, schedule.timesteps[t_batch])
        p = p_mean_variance(
            schedule, output, x, t_batch, prediction=prediction, variance=variance, clip=clip
        )
        noise = gaussian_noise(keys, 2 * position, shape)
        alpha, sigma = previous(schedule, t)
        of_known = jnp.where(t == 0, known, alpha * known + sigma * noise)
        x = jnp.where(keep, of_known, ancestral_step(p, t, noise))
        beta = betas_up[position]

        def up():
            noise = gaussian_noise(keys, 2 * position + 1, shape)
            return jnp.sqrt(1 - beta) * x + jnp.sqrt(beta) * noise

        return jax.lax.cond(beta > 0, up, lambda: x)

    return next_x


def _betas_up(schedule, walk, jump):
    """The variance that the way up after each call adds, 0 without a way up."""
    if not walk[:, 1].any():
        return np.zeros(len(walk), np.float32)
    # Ways up start after 1 + i jump steps of noise: at the entries i jump of the schedule.
    betas = np.asarray(strided(schedule, np.arange(0, schedule.num_timesteps, jump)).betas)
    return np.array(
        [betas[(t - 1) // jump + 1] if rise else 0.0 for t, rise in walk.tolist()], np.float32
    )


def vary(
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    keys: AnyKeys,
    images: Float[Array, "b h w c"],
    k: int,
    method: Method,
    *,
    prediction: Prediction,
    variance: Variance | Float[Array, " T"],
    clip: Clip = True,
    original: Schedule | None = None,
    **options: Any,
) -> Float[jax.Array, "b h w c"]:
    """Variations of `images` [B,H,W,C]: diffused by `k` steps of `schedule`, then back.

    SDEdit (Meng et al. 2021, Algorithm 1) with any sampler: the few first steps of the way back
    choose anew what `k` steps of noise have hidden. The noise of the way up is each key's
    fold_in(key, START). The other arguments are those of calling `method`, which takes the chain
    `lowest(schedule, k)`.

    Raises UserError unless 1 <= k <= the number of steps of `schedule`.
    """
    part = lowest(schedule, k)
    return method(
        part,
        denoise_fn,
        keys,
        images.shape[1:],
        prediction=prediction,
        variance=variance if isinstance(variance, str) else variance[:k],
        clip=clip,
        original=original or schedule,
        x_T=diffused(part, keys, images),
        **options,
    )


def lowest(schedule: Schedule, k: int) -> Schedule:
    """The chain of the `k` steps of `schedule` that are nearest to the image.

    Its tables are the first entries of those of `schedule`. A chain of its own, since a multistep
    method has no earlier predictions where it starts: its tables then begin with the first order.

    Raises UserError unless 1 <= k <= the number of steps of `schedule`.
    """
    S = schedule.num_timesteps
    if not 1 <= k <= S:
        raise UserError(f"k: must be from 1 to the chain's {S} steps, got {shown(k)}")
    return strided(schedule, np.arange(k))


def diffused(
    schedule: Schedule, keys: AnyKeys, images: Float[Array, "b h w c"]
) -> Float[jax.Array, "b h w c"]:
    """`images` with the noise of all steps of `schedule` (Eq. 4), of each key's START."""
    images = jnp.asarray(images, jnp.float32)
    last = jnp.full(images.shape[:1], schedule.num_timesteps - 1, jnp.int32)
    return q_sample(schedule, images, last, gaussian_noise(keys, START, images.shape[1:]))


def restore(
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    keys: AnyKeys | None,
    y: Float[Array, "b h w c"],
    operator: Operator,
    method: Method,
    *,
    noise: float = 0.0,
    prediction: Prediction,
    variance: Variance | Float[Array, " T"],
    clip: Clip = True,
    original: Schedule | None = None,
    r2: Float[Array, " T"] | None = None,
    **options: Any,
) -> Float[jax.Array, "b H W C"]:
    """Images x [B,H,W,C] with A x + noise = y [B,h,w,c]; see `conditioned`.

    `noise` is the deviation of that noise, and `r2` has an entry for each step of `original`, or
    of `schedule` where that is None. The other arguments are those of calling `method`. `clip` is
    that of the conditional x_0, after A, y and the gradient: with it, A x differs from y where x
    lies outside [-1, 1].
    """
    denoise_fn = conditioned(
        original or schedule, denoise_fn, y, operator, prediction=prediction, noise=noise, r2=r2
    )
    return method(
        schedule,
        denoise_fn,
        keys,
        jax.eval_shape(operator.pinv, y).shape[1:],
        prediction="x_0",
        variance=variance,
        clip=clip,
        original=original,
        **options,
    )


def conditioned(
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    y: Float[Array, "b h w c"],
    operator: Operator,
    *,
    prediction: Prediction,
    noise: float = 0.0,
    r2: Float[Array, " T"] | None = None,
) -> DenoiseFn:
    """The `denoise_fn`, of prediction "x_0", of images x of which y = A x + noise is known.

    Without noise the predicted x_0 becomes x_0 + A^+ (y - A x_0), which satisfies A x_0 = y for
    every y in the range of A: DDNM (Wang et al. 2022, Eq. 13). No gradient is taken.

    With noise of deviation n it is the expected x_0 given x_t and y: PiGDM (Song et al. 2023). Let
    x_0 given x_t be N(x_0(x_t), r2 I), x_0(x_t) being the prediction and a alphas_bar at t. Then y
    given x_t is N(A x_0(x_t), r2 A A^T + n^2 I). Its gradient, taken through the network, is added
    to the score, and the expected x_0 is (x_t + (1 - a) score) / sqrt(a) (Tweedie):

        x_0(x_t) + (1 - a) / sqrt(a) d log p(y | x_t) / d x_t

    `r2` [T] has an entry for each step of `schedule`; None is 1 - a, which is exact for pixels
    N(m, 1). Where nothing is left of the image in x_t, the factor is infinite;
    the gradient's limit r2 A^T (r2 A A^T + n^2 I)^-1 (y - A x_0) is added instead.

    `schedule` is the chain that `prediction` belongs to, and contains the steps that are sampled.
    Channels for a learned variance stay as they are. Nothing is clipped here: what clips x_0 comes
    afterwards.

    Raises UserError for a noise that is not 0 or more, ValueError for an `r2` of another length.
    """
    if not 0 <= noise < np.inf:
        raise UserError(f"noise: must be a finite number of at least 0, got {shown(noise)}")
    r2 = _variances_of_x_0(schedule, r2)
    y = jnp.asarray(y, jnp.float32)

    def by_index(x_t, index):
        return denoise_fn(x_t, schedule.timesteps[index])

    predict = x_0_denoiser(schedule, by_index, prediction=prediction)
    x_0_of = _ddnm(predict, y, operator)
    if noise:
        x_0_of = _pigdm(schedule, predict, y, operator, noise, r2)

    def x_0_and_rest(
        x_t: Float[Array, "b h w c"], t: Int[Array, " b"]
    ) -> Float[jax.Array, "b h w outputs"]:
        return jnp.concatenate(x_0_of(x_t, jnp.searchsorted(schedule.timesteps, t)), axis=-1)

    return x_0_and_rest


def _variances_of_x_0(schedule, r2):
    """`r2` as float32 [T]; None is 1 - a. Raises ValueError for another length."""
    if r2 is None:
        r2 = jnp.square(schedule.sqrt_one_minus_alphas_bar)
    if r2.shape != schedule.betas.shape:
        raise ValueError(
            f"r2: must have an entry for each step of the chain, {schedule.betas.shape}, "
            f"got {r2.shape}"
        )
    return jnp.asarray(r2, jnp.float32)


def _ddnm(predict, y, operator):
    """(x_t, index) -> (x_0 with A x_0 = y, the channels for the variance)."""

    def x_0_of(x_t, index):
        x_0, rest = _split(predict(x_t, index), x_t)
        return x_0 + operator.pinv(y - operator.A(x_0)), rest

    return x_0_of


def _pigdm(schedule, predict, y, operator, noise, r2):
    """(x_t, index) -> (the expected x_0 given x_t and y, the channels for the variance)."""

    def x_0_of(x_t, index):
        def at(table):
            return table[index].reshape(-1, 1, 1, 1)

        x_0, pull_back, rest = jax.vjp(
            lambda x_t: _split(predict(x_t, index), x_t), x_t, has_aux=True
        )
        expected, transpose = jax.vjp(operator.A, x_0)
        of_t = at(r2)
        (towards,) = transpose(operator.solve(of_t, noise**2)(y - expected))
        (gradient,) = pull_back(towards)
        factor = jnp.square(at(schedule.sqrt_one_minus_alphas_bar))
        factor = factor * at(schedule.sqrt_recip_alphas_bar)
        lost = at(schedule.alphas_bar) <= jnp.finfo(jnp.float32).tiny
        return x_0 + jnp.where(lost, of_t * towards, factor * gradient), rest

    return x_0_of


def _split(output, x_t):
    """(the prediction, the channels for the variance) of an output."""
    channels = x_t.shape[-1]
    return output[..., :channels], output[..., channels:]
