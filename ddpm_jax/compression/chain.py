"""The chain that costs the fewest bytes, and what is known of its steps before any image is seen.

Everything follows from a Calibration, which both sides have: the error mse_t of the predicted x_0
at each step, and that of each cell of the image. All in float64 and integers, by NumPy.
"""

import dataclasses

import numpy as np

from ddpm_jax.calibration import Calibration, kl_bits
from ddpm_jax.schedule import Schedule, strided
from ddpm_jax.shapes import Float, Float64, Int32, Integer

OVERHEAD = 2.5
"""Bits that a group's number takes beyond its KL divergence, measured for 6 to 12 bits a group."""

FINEST = 2**20
"""The weight of the dimensions with the largest error; integers are equal on every machine."""

LEAST = 2**10
"""Added to every weight: a dimension in which the calibration saw no error may yet have one."""


def path_costs(
    schedule: Schedule,
    mse: Float[np.ndarray, " T"],
    dimensions: int,
    group_bits: float,
    step_bits: float,
) -> tuple[Float64[np.ndarray, " T"], Int32[np.ndarray, " T"]]:
    """(the fewest expected bits from pure noise to each step [T], the step before on that way).

    A reverse step costs its KL divergence in Eq. 5, OVERHEAD for each group of about `group_bits`,
    and `step_bits`. Dynamic programming over pairs of steps. The step before T - 1 is T - 1.
    """
    T = schedule.num_timesteps
    kl = kl_bits(schedule, mse, "fixed_small") * dimensions
    groups = groups_for(kl, group_bits)
    costs = kl + OVERHEAD * groups + step_bits
    best = np.full(T, np.inf)
    best[T - 1] = 0.0
    before = np.full(T, T - 1, np.int32)
    for s in range(T - 2, -1, -1):
        totals = best[s + 1 :] + costs[s, s + 1 :]
        before[s] = s + 1 + totals.argmin()
        best[s] = totals.min()
    return best, before


def groups_for(bits: Float[np.ndarray, "..."], group_bits: float) -> Float64[np.ndarray, "..."]:
    """How many groups of at most `group_bits`, or a tenth more, hold so many bits."""
    return np.maximum(1.0, np.ceil(bits / (1.1 * group_bits)))


def path(before: Int32[np.ndarray, " T"], end: int) -> Int32[np.ndarray, " S"]:
    """The steps of the cheapest way to `end`, ascending."""
    steps = [end]
    while before[steps[-1]] != steps[-1]:
        steps.append(int(before[steps[-1]]))
    return np.array(steps, np.int32)


@dataclasses.dataclass(frozen=True)
class Step:
    """A reverse step as both sides know it, from the chain's index i to i - 1."""

    timestep: int
    """The original step that it starts from."""
    of_x_0: np.float32
    of_x_t: np.float32
    """The weights in the mean of Eq. 7."""
    sigma: np.float32
    """The standard deviation of Eq. 7."""
    bits: float
    """The expected KL divergence of an image; only the sender uses it."""
    weights: Integer[np.ndarray, " D"]
    """The shares of the dimensions in it."""


def steps_of(
    schedule: Schedule,
    calibration: Calibration,
    timesteps: Int32[np.ndarray, " S"],
    image_shape: tuple[int, int, int],
) -> list[Step]:
    """The steps of the chain `timesteps`, in the order they are taken: from noise to the image."""
    chain = strided(schedule, timesteps)
    dimensions = int(np.prod(image_shape))
    found = []
    for i in range(len(timesteps) - 1, 0, -1):
        t = int(timesteps[i])
        of_x_0 = float(chain.posterior_mean_coef_x_0[i])
        variance = float(chain.posterior_variance[i])
        nats = 0.5 * of_x_0**2 / variance * calibration.mse[t]
        found.append(
            Step(
                t,
                np.float32(of_x_0),
                np.float32(chain.posterior_mean_coef_x_t[i]),
                np.float32(np.sqrt(variance)),
                float(nats / np.log(2) * dimensions),
                _weights(calibration.cells[t], image_shape),
            )
        )
    return found


def of_cells(
    cells: Float[np.ndarray, "h w C"], image_shape: tuple[int, int, int]
) -> Float64[np.ndarray, "H W C"]:
    """A number for each dimension of an image, from those of its cells."""
    height, width, _ = image_shape
    h, w, _ = cells.shape
    whole: np.ndarray = cells.astype(np.float64)
    return whole.repeat(height // h, axis=0).repeat(width // w, axis=1)


def _weights(cells, image_shape) -> np.ndarray:
    shares = of_cells(cells, image_shape).reshape(-1)
    return np.floor(shares / (shares.max() or 1.0) * FINEST).astype(np.int64) + LEAST


def edges(ordered: Integer[np.ndarray, " D"], groups: int) -> Integer[np.ndarray, " G+1"]:
    """Where each of `groups` groups of about equal weight begins, and the last ends.

    `ordered` are the weights of the dimensions in their order. Every group has a dimension.
    """
    D = ordered.size
    sums = np.cumsum(ordered)
    number = np.arange(1, groups)
    inner = np.searchsorted(sums, number * int(sums[-1]) // groups, side="left") + 1
    # A dimension may outweigh a group: the next group then begins one further.
    inner = np.maximum.accumulate(inner - number) + number
    return np.concatenate([[0], np.minimum(inner, D - groups + number), [D]])
