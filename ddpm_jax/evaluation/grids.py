"""The search for the steps of a short chain: dynamic programming, then one step at a time.

Pure functions of numbers, by NumPy. A grid is a tuple of original steps, ascending.
"""

import itertools
from collections.abc import Callable

import numpy as np

from ddpm_jax.shapes import Float, Float64

Grid = tuple[int, ...]

GAIN = 1e-4
"""A grid replaces the best one if its error is smaller by this part: less is rounding."""

FRACTIONS = (1 / 4, 1 / 8, 1 / 16)
"""How far a step moves, as parts of the gap to its neighbour."""


def euler_costs(
    alphas: Float[np.ndarray, " N"],
    sigmas: Float[np.ndarray, " N"],
    products: Float[np.ndarray, "two_N two_N"],
    to_image: Float[np.ndarray, " N"],
) -> Float64[np.ndarray, "N N_and_image"]:
    """How far one Euler step from a fine trajectory lands from where that is later.

    As GITS measures it (Chen et al. 2024). Euler's step of the flow is DDIM's: alpha_j x_0 +
    sigma_j eps, with the x_0 and eps at step i. The trajectory has N steps, ascending, of the
    levels alpha, sigma. `products` are the inner products of its vectors x at each step, followed
    by those predicted as x_0, in the mean over trajectories and dimensions. `to_image` is the mean
    square of x_0 at step i less the image. Row i, column j + 1 of the result is the root mean
    square of the step from i to j, and column 0 that of the step to the image; infinite where j is
    not below i.
    """
    N = len(alphas)
    squares = np.diag(products)
    x_x = products[:N, :N]
    x_0_x = products[N:, :N]
    of_x = sigmas[None, :] / sigmas[:, None]
    of_x_0 = alphas[None, :] - alphas[:, None] * of_x
    cross = products[:N, N:].diagonal()[:, None]
    distance = of_x**2 * squares[:N, None] + of_x_0**2 * squares[N:, None] + squares[None, :N]
    distance = distance + 2 * (of_x * of_x_0 * cross - of_x * x_x - of_x_0 * x_0_x)
    below = np.arange(N)[None, :] < np.arange(N)[:, None]
    costs = np.where(below, np.sqrt(np.maximum(distance, 0)), np.inf)
    return np.concatenate([np.sqrt(to_image)[:, None], costs], axis=1)


def cheapest_chain(costs: Float[np.ndarray, "N N_and_image"], steps: int) -> list[int]:
    """The `steps` of N nodes, ascending, that lead from the last node to the image most cheaply.

    `costs` are as `euler_costs` gives them; a chain costs their sum. Dynamic programming. Raises
    ValueError unless 1 <= steps <= N.
    """
    N = len(costs)
    if not 1 <= steps <= N:
        raise ValueError(f"steps: must be from 1 to {N}, got {steps}")
    best = costs[:, 0]  # Of one step from each node to the image; below, of k steps.
    after = []
    for _ in range(steps - 1):
        totals = costs[:, 1:] + best[None, :]
        after.append(totals.argmin(axis=1))
        best = totals.min(axis=1)
    chain = [N - 1]
    for of_step in reversed(after):
        chain.append(int(of_step[chain[-1]]))
    return chain[::-1]


def moved(grid: Grid, i: int, up: bool, num_timesteps: int, fraction: float) -> Grid | None:
    """`grid` with step i moved by `fraction` of the gap to the next above or below.

    None where there is no room. The gaps of the outermost steps end below 0 and at T.
    """
    ends = (-1, *grid, num_timesteps)
    gap = ends[i + 2] - grid[i] if up else grid[i] - ends[i]
    if gap < 2:
        return None
    move = max(1, int(gap * fraction))
    return (*grid[:i], grid[i] + (move if up else -move), *grid[i + 1 :])


def descend(
    start: Grid, error: Callable[[Grid], float], num_timesteps: int, evaluations: int
) -> Grid:
    """The best grid found from `start` by moving one step at a time; never a worse one.

    When no move of a size helps any more, smaller ones follow, see FRACTIONS. `error` is called
    with at most `evaluations` grids other than `start`, each once.
    """
    best = start
    least = error(start)
    seen = {start}
    for fraction in FRACTIONS:
        before = None
        while before != best:
            before = best
            for i, up in itertools.product(reversed(range(len(start))), (False, True)):
                grid = moved(best, i, up, num_timesteps, fraction)
                if grid is None or grid in seen:
                    continue
                if len(seen) > evaluations:
                    return best
                seen.add(grid)
                value = error(grid)
                if value < least * (1 - GAIN):
                    best = grid
                    least = value
    return best
