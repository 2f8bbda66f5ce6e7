"""DEIS (Zhang & Chen 2023, tAB): a polynomial of eps in t."""

import numpy as np

from ddpm_jax.samplers.chain import Method
from ddpm_jax.samplers.multistep import Levels, Tables, eps_step, levels, order_at, padded, weights
from ddpm_jax.schedule import Schedule

POINTS = 8
"""Points of Gauss and Legendre between two original steps: far more than float64 needs."""


def eps_row(chain: Levels, t: int, of_eps: np.ndarray) -> list[float]:
    """The coefficients of a step from t with the weights `of_eps` [k] of eps, the latest first.

    The latest eps is written as (x_t - alpha x_0) / sigma, and a step of one prediction is DDIM's:
    so nothing is divided by the alpha of where the image is lost.
    """
    alpha, sigma = chain.after(t)
    if len(of_eps) == 1:
        of_x = sigma / chain.sigma[t]
    else:
        of_x = alpha / chain.alpha[t] + alpha * of_eps[0] / chain.sigma[t]
    return [of_x, alpha - chain.alpha[t] * of_x, *(alpha * of_eps[1:])]


def _moments(chain: Levels, original: Levels, t: int, count: int) -> np.ndarray:
    """int ((t - t_0) / width)^i d rho over the step from t_0 = chain.t[t], i < count.

    Between two original steps lambda is linear in t.
    """
    start = int(np.searchsorted(original.t, chain.t[t]))
    stop = int(np.searchsorted(original.t, chain.t[t - 1]))
    width = chain.t[t] - chain.t[t - 1]
    u, of_point = np.polynomial.legendre.leggauss(POINTS)
    u = (u + 1) / 2
    lower = original.log_snr[stop:start, None]
    difference = original.log_snr[stop + 1 : start + 1, None] - lower
    steps = np.diff(original.t[stop : start + 1])[:, None]
    times = (original.t[stop:start, None] + u * steps - chain.t[t]) / width
    # rho = e^-lambda; the step runs down in t, so up in lambda.
    d_rho = np.exp(-(lower + u * difference)) * difference * of_point / 2
    return np.array([(d_rho * times**i).sum() for i in range(count)])


def _tables(schedule: Schedule, original: Schedule, *, order: int = 3) -> Tables:
    chain = levels(schedule, original)
    whole = levels(original, original)
    rows = []
    for t in range(schedule.num_timesteps):
        count = order_at(chain, t, order)
        of_eps = np.ones(1)
        if count > 1:
            nodes = (chain.t[t : t + count] - chain.t[t]) / (chain.t[t] - chain.t[t - 1])
            of_eps = weights(nodes, _moments(chain, whole, t, count))
        rows.append(padded(eps_row(chain, t, of_eps), 5))
    return Tables(np.array(rows))


deis = Method(eps_step, "squares", memory=3, tables=_tables, orders=(2, 3, 4), deterministic=True)
"""DEIS with a polynomial in t through `order` predictions: 3 (default), 2 or 4.

The paper counts the polynomial's degree: its tAB3 takes four predictions, order 4 here.
"""
