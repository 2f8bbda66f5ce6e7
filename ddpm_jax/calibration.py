"""What a model's own errors say of its chains: the variance and the steps with the best bound.

A reverse step with a fixed variance costs in Eq. 5 a KL divergence that depends on the network
through mse_t = E |x_0 - x0_hat|^2 alone. Once that is measured, the best variance of every step of
any chain (as in Bao et al. 2022) and the best chain of S steps (Watson et al. 2021) follow without
the network. All in float64, by NumPy.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple, get_args

import numpy as np

from ddpm_jax.diffusion import BIN, unknown
from ddpm_jax.errors import UserError
from ddpm_jax.schedule import Schedule
from ddpm_jax.shapes import Array, Float, Float64, Int32

FixedVariance = Literal["optimal", "fixed_small", "fixed_large"]
"""The variances of a reverse step whose expected KL depends on the network through mse_t alone."""

LEAST_VARIANCE = float(np.finfo(np.float32).tiny)
"""float32's smallest normal number: a variance that is smaller has no logarithm there."""

MOST_CELLS = 8
"""The most rows, and columns, of cells that an image is divided into."""


ARRAYS = {"mse": "float64", "error": "float64", "cells": "float32", "cells_error": "float32"}
"""The arrays of a Calibration, and their types."""


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """The squared errors of a model's predicted x_0 at every step, measured on real images.

    Images are in [-1, 1], and the prediction is clipped as the model's `clip` says. Hashable, and
    equal by content. Raises ValueError for arrays that do not fit together, or for numbers that are
    negative or not finite.
    """

    mse: np.ndarray
    """float64 [T]: E |x_0 - x0_hat|^2 for each dimension."""
    error: np.ndarray
    """float64 [T]: its standard error over the images."""
    cells: np.ndarray
    """float32 [T,h,w,C]: the same for each channel in each cell of the image, see `cell_grid`."""
    cells_error: np.ndarray
    """float32 [T,h,w,C]: their standard errors over the images."""
    images: int
    """How many images it was measured on."""
    decoder: float | None = None
    """The decoder's variance of the least L_0, see `best_decoder`; None for mse at t = 0."""

    def __post_init__(self) -> None:
        for name, kind in ARRAYS.items():
            array = np.array(getattr(self, name), kind)
            if not (np.isfinite(array) & (array >= 0)).all():
                raise ValueError(f"{name}: must be finite and at least 0")
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        T = self.mse.size
        fits = T > 0 and self.mse.shape == self.error.shape == (T,)
        fits = fits and self.cells.ndim == 4 and len(self.cells) == T
        if not fits or self.cells.shape != self.cells_error.shape:
            shapes = ", ".join(f"{name} {array.shape}" for name, array in self.arrays.items())
            raise ValueError(f"calibration: these shapes do not fit together: {shapes}")
        if self.images < 1:
            raise ValueError(f"images: must be at least 1, got {self.images}")
        if self.decoder is None:
            object.__setattr__(self, "decoder", max(float(self.mse[0]), LEAST_VARIANCE))
        elif not LEAST_VARIANCE <= self.decoder < np.inf:
            raise ValueError(
                f"decoder: must be at least {LEAST_VARIANCE} and finite, got {self.decoder}"
            )

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by their names."""
        return {name: getattr(self, name) for name in ARRAYS}

    @functools.cached_property
    def _content(self) -> tuple:
        arrays = self.arrays.values()
        return (self.images, self.decoder, *((array.shape, array.tobytes()) for array in arrays))

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self._content)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Calibration) and self._content == other._content

    def __hash__(self) -> int:
        return self._hash


def cell_grid(image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(h, w, C): the rows and columns of cells of an image (H, W, C), and its channels.

    h and w are the largest divisors of H and W that are at most MOST_CELLS.
    """
    H, W, C = image_shape
    return _largest_divisor(H), _largest_divisor(W), C


DECODER_VARIANCES = np.geomspace(1e-8, 1.0, 54)
"""What `best_decoder` chooses from: neighbours differ by a factor of about sqrt(2)."""


def best_decoder(bits: Float[Array, " V"]) -> float:
    """The variance of the least L_0, whose `bits` [V] were measured at DECODER_VARIANCES.

    It is not mse_0: the bins of Eq. 13 are as wide as a good decoder, and those of black and white
    reach to infinity. A parabola in the logarithm refines the least of the list.
    """
    logs = np.log(DECODER_VARIANCES)
    least = int(np.clip(np.argmin(bits), 1, len(logs) - 2))
    before, at, after = np.asarray(bits, np.float64)[least - 1 : least + 2]
    curvature = before - 2 * at + after
    shift = 0.5 * (before - after) / curvature if curvature > 0 else 0.0
    return float(np.exp(logs[least] + np.clip(shift, -1, 1) * (logs[1] - logs[0])))


def optimal_variance(
    schedule: Schedule, mse: Float[Array, " T"], decoder: float | None = None
) -> Float64[np.ndarray, " S"]:
    """The variance of each reverse step of `schedule` [S] that gives the best bound.

    It is the posterior's variance, and what the error of x_0 adds to the error of the mean. At the
    chain's first step the posterior has no variance, and the mean is x_0 itself. `mse` [T] is the
    Calibration's, of the original steps; `schedule` may be a strided chain. `decoder`, where it is
    given, takes the place of mse_0. At least float32's tiny. Raises ValueError if `mse` has no
    entry for a step of `schedule`.
    """
    timesteps = np.asarray(schedule.timesteps)
    if timesteps[-1] >= np.size(mse):
        raise ValueError(
            f"mse: must have an entry for each of the model's steps, got {np.size(mse)} for step "
            f"{timesteps[-1]}"
        )
    sums = _Sums(schedule)
    now = np.arange(schedule.num_timesteps)
    step = _reverse_step(sums, now - 1, now)
    variance = step.posterior + np.square(step.of_x_0) * np.asarray(mse, np.float64)[timesteps]
    if decoder is not None and timesteps[0] == 0:
        variance[0] = decoder
    return np.maximum(variance, LEAST_VARIANCE)


def likelihood_steps(
    schedule: Schedule,
    mse: Float[Array, " T"],
    steps: int,
    variance: FixedVariance = "optimal",
    levels: int | None = 256,
) -> Int32[np.ndarray, " S"]:
    """The `steps` of the T with the best expected bound: ascending, with 0 and T - 1 among them.

    `schedule` is the whole chain, `mse` [T] the Calibration's, and `variance` that of the reverse
    steps; `levels` as for `decoder_bits`. Dynamic programming over pairs of steps (Watson et al.
    2021, Algorithm 1), whose costs are those of `pair_bits`.

    Raises UserError unless 2 <= steps <= T, and ValueError for another variance.
    """
    T = schedule.num_timesteps
    if not 2 <= steps <= T:
        raise UserError(
            f"steps: must be from 2 to {T} for the steps of the best likelihood, got {steps}"
        )
    costs = pair_bits(schedule, mse, variance, levels)
    # best[t] is the least cost of a chain from step 0 up to t, of k + 1 steps.
    best = np.full(T, np.inf)
    best[0] = 0.0
    before = np.zeros((steps, T), np.int32)
    for k in range(1, steps):
        # k steps lie below the one with number k, and steps - 1 - k above it.
        last = T - steps + k
        totals = best[k - 1 : last, None] + costs[k - 1 : last, k : last + 1]
        before[k, k : last + 1] = totals.argmin(axis=0) + k - 1
        best = np.full(T, np.inf)
        best[k : last + 1] = totals.min(axis=0)
    chosen = [T - 1]
    for k in range(steps - 1, 0, -1):
        chosen.append(int(before[k, chosen[-1]]))
    return np.array(chosen[::-1], np.int32)


def pair_bits(
    schedule: Schedule,
    mse: Float[Array, " T"],
    variance: FixedVariance,
    levels: int | None = 256,
) -> Float64[np.ndarray, "T T"]:
    """[s, t]: expected bits/dim of the reverse step from t to s in a chain that visits both.

    It is `kl_bits`. With fixed_small and fixed_large the decoder takes its variance from the
    chain's second step (see `schedule`), so that for s = 0 the expected L_0 is added.
    """
    bits = kl_bits(schedule, mse, variance)
    if variance != "optimal":
        now = np.arange(1, schedule.num_timesteps)
        step = _reverse_step(_Sums(schedule), 0, now)
        bits[0, 1:] += decoder_bits(step.posterior, float(np.asarray(mse, np.float64)[0]), levels)
    return bits


def kl_bits(
    schedule: Schedule, mse: Float[Array, " T"], variance: FixedVariance
) -> Float64[np.ndarray, "T T"]:
    """[s, t]: expected KL divergence of Eq. 5 in bits/dim, of the reverse step from t to s.

    Infinite where s >= t. Raises ValueError for another variance.
    """
    if variance not in get_args(FixedVariance):
        raise unknown("variance", variance, FixedVariance)
    T = schedule.num_timesteps
    if np.shape(mse) != (T,):
        raise ValueError(f"mse: must have the shape ({T},), got {np.shape(mse)}")
    mse = np.asarray(mse, np.float64)
    sums = _Sums(schedule)
    bits = np.full((T, T), np.inf)
    for s in range(T - 1):
        now = np.arange(s + 1, T)
        bits[s, s + 1 :] = step_bits(_reverse_step(sums, s, now), mse[now], variance)
    return bits


def chain_bits(
    schedule: Schedule,
    mse: Float[Array, " T"],
    timesteps: Int32[np.ndarray, " S"],
    variance: FixedVariance,
    levels: int | None = 256,
) -> float:
    """The expected bound in bits/dim, without its prior, of the chain of two or more steps."""
    sums = _Sums(schedule)
    visited: np.ndarray = np.asarray(mse, np.float64)[timesteps]
    step = _reverse_step(sums, timesteps[:-1], timesteps[1:])
    of_decoder = np.maximum(visited[:1], LEAST_VARIANCE)
    if variance != "optimal":
        of_decoder = step.posterior[:1]
    bits = decoder_bits(of_decoder, float(visited[0]), levels).sum()
    return float(bits + step_bits(step, visited[1:], variance).sum())


class ReverseStep(NamedTuple):
    """The numbers of Eq. 7 for some reverse steps."""

    beta: Float64[np.ndarray, " n"]
    posterior: Float64[np.ndarray, " n"]
    """The posterior's variance."""
    of_x_0: Float64[np.ndarray, " n"]
    """The weight of x_0 in its mean."""


def step_bits(
    step: ReverseStep, mse: Float[Array, " n"], variance: FixedVariance
) -> Float64[np.ndarray, " n"]:
    """Expected KL divergence in bits/dim of reverse steps whose predicted x_0 has the error mse."""
    # What the error of x_0 adds to the variance, in units of the posterior's.
    added = np.square(step.of_x_0) / step.posterior * mse
    if variance == "optimal":
        nats = 0.5 * np.log1p(added)
    elif variance == "fixed_small":
        nats = 0.5 * added
    else:
        ratio = step.posterior / step.beta
        nats = 0.5 * (ratio * (1 + added) - 1 - np.log(ratio))
    return nats / np.log(2)


def decoder_bits(
    variance: Float64[np.ndarray, " n"], mse: float, levels: int | None = 256
) -> Float64[np.ndarray, " n"]:
    """Expected L_0 in bits/dim of a decoder of this variance whose mean has the error mse.

    A place in one of the bins has a variance, too, by which they widen the Gaussian. That is exact
    for bins far narrower than the Gaussian, and close for some that are wider. `levels` as for
    `diffusion.decoder_log_likelihood`: None is for a density, which has no bins.
    """
    width = BIN if levels is None else 2 / (levels - 1)
    wide = variance + (0 if levels is None else width**2 / 12)
    nats = -np.log(width) + 0.5 * np.log(2 * np.pi * wide) + mse / (2 * wide)
    return nats / np.log(2)


class _Sums:
    """log alphas_bar of a chain, from sums of log(1 - beta): small betas are not rounded away."""

    def __init__(self, schedule: Schedule):
        betas = np.asarray(schedule.betas, np.float64)
        ends = betas == 1  # log 0 is counted apart, since inf - inf is nothing.
        log_alphas = np.log1p(-np.where(ends, 0.0, betas))
        # Entry t + 1 is of the steps 0, ..., t; entry 0 of none.
        self.logs = np.append(0.0, np.cumsum(log_alphas))
        self.ends = np.append(0, np.cumsum(ends))

    def between(self, before, now):
        """log alphas_bar[now] - log alphas_bar[before]; before is -1 for the image itself."""
        logs = self.logs[now + 1] - self.logs[before + 1]
        return np.where(self.ends[now + 1] > self.ends[before + 1], -np.inf, logs)


def _reverse_step(sums: _Sums, before, now) -> ReverseStep:
    """The reverse steps from `now` to `before`."""
    beta = -np.expm1(sums.between(before, now))
    noise_before = -np.expm1(sums.between(-1, before))
    noise = -np.expm1(sums.between(-1, now))
    of_x_0 = np.exp(0.5 * sums.between(-1, before)) * beta / noise
    return ReverseStep(beta, beta * noise_before / noise, of_x_0)


def _largest_divisor(size: int) -> int:
    return max(each for each in range(1, MOST_CELLS + 1) if size % each == 0)
