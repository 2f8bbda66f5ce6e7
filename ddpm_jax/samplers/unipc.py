"""UniPC (Zhao et al. 2023): DPM-Solver++'s polynomials, and a corrector that costs no call.

The prediction at x_t, which the next step needs anyway, first corrects x_t itself: the step before
is done again with it.
"""

from typing import Literal, get_args

import numpy as np

from ddpm_jax.diffusion import unknown
from ddpm_jax.samplers.chain import Method
from ddpm_jax.samplers.dpm_solver import flow_row, lambda_nodes, step_length
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

BH = Literal["b1", "b2"]
"""The function B(h) of UniPC: h (b1) or e^h - 1 (b2). It matters where a line is drawn alone."""


def _moments(h: float, count: int, b_h: BH) -> np.ndarray:
    """Those of a step of length h through `count` predictions.

    Two predictions, a line, take B(h) / 2 for the second moment (Zhao et al. 2023, Appendix F);
    with more, B(h) cancels.
    """
    moments = exponential_moments(h, count)
    if count == 2:
        moments[1] = (h if b_h == "b1" else moments[0]) / 2
    return moments


def _correction(chain: Levels, t: int, order: int, b_h: BH, columns: int) -> list[float]:
    """The coefficients of the corrected x_t: x_t, x_{t+1}, x_0 of x_t, x_0 of x_{t+1}, ..."""
    if t + 1 == len(chain.t) or not np.isfinite(chain.log_snr[t + 1]):
        return padded([1.0], columns)
    before = t + 1
    count = order_at(chain, before, order)
    nodes = np.append(1.0, lambda_nodes(chain, before, count))
    of_x_0 = weights(nodes, _moments(step_length(chain, before), count + 1, b_h))
    row = [0.0, chain.sigma[t] / chain.sigma[before], *(chain.alpha[t] * of_x_0)]
    return padded(row, columns)


def _tables(schedule: Schedule, original: Schedule, *, order: int = 3, b_h: BH = "b2") -> Tables:
    if b_h not in get_args(BH):
        raise unknown("b_h", b_h, BH)
    chain = levels(schedule, original)
    predict = []
    correct = []
    for t in range(schedule.num_timesteps):
        moments = _moments(step_length(chain, t), order_at(chain, t, order), b_h)
        predict.append(padded(flow_row(chain, t, moments), 5))
        correct.append(_correction(chain, t, order, b_h, 6))
    return Tables(np.array(predict), correct=np.array(correct))


unipc = Method(x_0_step, "squares", memory=4, tables=_tables, orders=(2, 3), deterministic=True)
"""UniPC of `order` 3 (default) or 2 with `b_h` b2 (default) or b1."""
