"""Multistep samplers: one step from a table of coefficients, computed in float64 from the chain.

A network call is the cost of a step, so these methods use the predictions of earlier steps again.
All follow the probability flow of the process, which is linear but for the network (Lu et al. 2022,
Prop. 4.1): with lambda = log(alpha / sigma), where alpha = sqrt(alphas_bar) and
sigma = sqrt(1 - alphas_bar), from a to b

    x_b = sigma_b / sigma_a x_a + alpha_b int e^(lambda - lambda_b) x_0(lambda) d lambda
    x_b = alpha_b / alpha_a x_a + alpha_b int eps d rho,      rho = sigma / alpha = e^-lambda

The x_0 or eps under the integral is replaced by a polynomial through predictions already made. The
methods differ in which of the two it is, in the variable that the polynomial is one of, and in the
moments of that variable; see `weights`.
"""

from typing import NamedTuple

import numpy as np

from ddpm_jax.samplers.chain import Chain, eps_of
from ddpm_jax.schedule import Schedule
from ddpm_jax.shapes import Array, Float, Float64, Int

Images = Float[Array, "b h w c"]
Index = Int[Array, ""] | int
Memory = tuple[Images, ...]


class Tables(NamedTuple):
    """The coefficients of a multistep method; row t is those of the step from t to t - 1."""

    predict: Float64[np.ndarray, "S columns"]
    """Of x_t, its predicted x_0, and the earlier predictions, the latest first."""
    noise: Float64[np.ndarray, " S"] | None = None
    """Of N(0, I); None for a deterministic method."""
    correct: Float64[np.ndarray, "S columns"] | None = None
    """Of x_t, x_{t+1}, the x_0 predicted from x_t, and the earlier ones: the corrected x_t."""


def x_0_step(chain: Chain, x: Images, t: Index, memory: Memory) -> tuple[Images, Memory]:
    """One step of a method that keeps the predicted x_0."""
    return _step(chain, x, t, memory, keep_eps=False)


def eps_step(chain: Chain, x: Images, t: Index, memory: Memory) -> tuple[Images, Memory]:
    """One step of a method that keeps the predicted eps."""
    return _step(chain, x, t, memory, keep_eps=True)


def _step(chain: Chain, x, t, memory, *, keep_eps: bool):
    tables: Tables = chain.tables
    x_0 = chain.p(x, t).x_0
    if tables.correct is not None:
        before, *memory = memory
        x = _combine(tables.correct[t], [x, before, x_0, *memory])
    after = _combine(tables.predict[t], [x, x_0, *memory])
    if tables.noise is not None:
        after = after + tables.noise[t] * chain.noise(t)
    prediction = eps_of(chain.schedule, x_0, x, t) if keep_eps else x_0
    kept = [prediction, *memory][: len(memory)]
    return after, tuple(kept if tables.correct is None else [x, *kept])


def _combine(coefficients, arrays):
    return sum(coefficients[i] * each for i, each in enumerate(arrays))


class Levels(NamedTuple):
    """The noise levels of a chain in float64, and what follows the last step: the image."""

    alpha: Float64[np.ndarray, " S"]
    sigma: Float64[np.ndarray, " S"]
    log_snr: Float64[np.ndarray, " S"]
    """lambda = log(alpha / sigma); -inf where float32 has nothing left of the image."""
    t: Float64[np.ndarray, " S"]
    """The original steps."""

    def after(self, t: int) -> tuple[float, float]:
        """(alpha, sigma) one step after t; of the image, (1, 0), where t is 0."""
        return (float(self.alpha[t - 1]), float(self.sigma[t - 1])) if t else (1.0, 0.0)


def levels(schedule: Schedule, original: Schedule) -> Levels:
    """The levels of `schedule`, a stride of `original` or `original` itself; neither is traced.

    They follow from the betas of `original`: float32 rounds the beta of a long stride to 1.
    """
    timesteps = np.asarray(schedule.timesteps)
    visited = np.searchsorted(np.asarray(original.timesteps), timesteps)
    with np.errstate(divide="ignore"):  # A beta of 1 leaves nothing.
        log_alphas_bar = np.cumsum(np.log1p(-np.asarray(original.betas, np.float64)))[visited]
    lost = np.exp(log_alphas_bar) < np.finfo(np.float32).tiny
    log_alphas_bar = np.where(lost, -np.inf, log_alphas_bar)
    log_sigma = 0.5 * np.log(-np.expm1(log_alphas_bar))
    log_snr = 0.5 * log_alphas_bar - log_sigma
    alpha = np.exp(0.5 * log_alphas_bar)
    return Levels(alpha, np.exp(log_sigma), log_snr, timesteps.astype(np.float64))


def order_at(chain: Levels, t: int, order: int) -> int:
    """The order of the step from t: at most one more than there are useful earlier predictions.

    The last step ends where lambda is infinite and is of first order, and the one before it of
    second: a long polynomial would extrapolate over the widest steps. So are steps from where
    nothing of the image is left.
    """
    useful = int(np.isfinite(chain.log_snr[t:]).sum())
    return max(1, min(order, useful, t + 1))


def weights(nodes: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """The weights [k] of predictions at `nodes` [k] that integrate polynomials exactly.

    They solve sum_j weights[j] nodes[j]^i = moments[i], i = 0, ..., k - 1, where moments[i] is the
    integral of the i-th power.
    """
    return np.linalg.solve(np.vander(nodes, increasing=True).T, moments)


def exponential_moments(h: float, count: int) -> np.ndarray:
    """int_0^1 h e^(h (u - 1)) u^i du for i = 0, ..., count - 1: [count].

    They are i! h phi_{i+1}(-h) with the phi functions of exponential integrators.
    """
    if h > 1:
        moments = [-np.expm1(-h)]
        for i in range(1, count):
            moments.append(1 - i * moments[-1] / h)
        return np.array(moments)
    # That recursion loses digits of small steps. Term m is i! (-h)^m h / (i + m + 1)!.
    moments = []
    for i in range(count):
        term = h / (i + 1)
        total = term
        for m in range(1, 25):
            term *= -h / (i + m + 1)
            total += term
        moments.append(total)
    return np.array(moments)


def padded(row: list[float], columns: int) -> list[float]:
    """`row` with zeros for earlier predictions that the step does not use."""
    return [*row, *[0.0] * (columns - len(row))]
