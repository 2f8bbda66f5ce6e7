"""DPM-Solver++ (Lu et al. 2022): polynomials of x_0 in lambda; 2M, 3M and the SDE form of 2M."""

import numpy as np

from ddpm_jax.samplers.chain import Method
from ddpm_jax.samplers.multistep import (
    Levels,
    Tables,
    exponential_moments,
    levels,
    order_at,
    padded,
    weights,
    x_0_step,
)
from ddpm_jax.schedule import Schedule


def lambda_row(chain: Levels, t: int, of_x: float, moments: np.ndarray) -> list[float]:
    """The coefficients of a step from t that replaces x_0 by a polynomial in lambda.

    `of_x` is that of x_t. `moments` [k] are those of u = (lambda - lambda_t) / h, h being the
    step's length in lambda, with k - 1 earlier predictions.
    """
    return [of_x, *(chain.after(t)[0] * weights(lambda_nodes(chain, t, len(moments)), moments))]


def lambda_nodes(chain: Levels, t: int, count: int) -> np.ndarray:
    """Where the prediction at t and the `count` - 1 before it lie, in units of the step from t."""
    if count == 1:
        return np.zeros(1)
    return (chain.log_snr[t : t + count] - chain.log_snr[t]) / step_length(chain, t)


def step_length(chain: Levels, t: int) -> float:
    """h, the step's length in lambda; infinite to the image, and from where it is lost."""
    if t == 0 or not np.isfinite(chain.log_snr[t]):
        return float("inf")
    return float(chain.log_snr[t - 1] - chain.log_snr[t])


def middle_moments(h: float) -> np.ndarray:
    """Those of a line taken at the middle of the step, as 2M does (Lu et al. 2022, Algorithm 2)."""
    return -np.expm1(-h) * np.array([1.0, 0.5])


def flow_row(chain: Levels, t: int, moments: np.ndarray) -> list[float]:
    """As `lambda_row`, of a deterministic step."""
    return lambda_row(chain, t, chain.after(t)[1] / chain.sigma[t], moments)


def _second(schedule: Schedule, original: Schedule) -> Tables:
    chain = levels(schedule, original)
    rows = []
    for t in range(schedule.num_timesteps):
        moments = middle_moments(step_length(chain, t))[: order_at(chain, t, 2)]
        rows.append(padded(flow_row(chain, t, moments), 3))
    return Tables(np.array(rows))


def _third(schedule: Schedule, original: Schedule) -> Tables:
    chain = levels(schedule, original)
    rows = []
    for t in range(schedule.num_timesteps):
        moments = exponential_moments(step_length(chain, t), order_at(chain, t, 3))
        rows.append(padded(flow_row(chain, t, moments), 4))
    return Tables(np.array(rows))


def _stochastic(schedule: Schedule, original: Schedule) -> Tables:
    chain = levels(schedule, original)
    rows = []
    noise = []
    for t in range(schedule.num_timesteps):
        h = step_length(chain, t)
        sigma = chain.after(t)[1]
        moments = middle_moments(2 * h)[: order_at(chain, t, 2)]
        of_x = sigma / chain.sigma[t] * np.exp(-h)
        rows.append(padded(lambda_row(chain, t, of_x, moments), 3))
        noise.append(sigma * np.sqrt(-np.expm1(-2 * h)))
    return Tables(np.array(rows), noise=np.array(noise))


# linspace would have them extrapolate over their widest step, the one down to t = 0.
dpm_solver = Method(x_0_step, "squares", memory=1, tables=_second, deterministic=True)
"""DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2), of second order."""

dpm_solver_3 = Method(x_0_step, "squares", memory=2, tables=_third, deterministic=True)
"""DPM-Solver++(3M), of third order.

A parabola through three predictions, integrated exactly. The formula that circulates gives its
curvature half the weight, and is of second order.
"""

sde_dpm_solver = Method(x_0_step, "squares", memory=1, tables=_stochastic)
"""SDE-DPM-Solver++(2M): each step also draws noise.

It follows the process's stochastic equation, whose images have the same distribution as the flow's
(Lu et al. 2022, from version 2 on).
"""
