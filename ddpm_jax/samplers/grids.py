"""Time grids: which of the T original steps a shorter chain visits."""

from typing import Literal

import numpy as np

from ddpm_jax.diffusion import unknown

Grid = Literal["linspace", "leading", "trailing", "quad", "squares"]
"""How a shorter chain's steps lie among the T original ones; see `time_grid`."""


def time_grid(num_timesteps: int, steps: int, grid: Grid = "linspace") -> np.ndarray:
    """`steps` of 0, ..., T-1, ascending and distinct, T being `num_timesteps`: [S] int32.

    - linspace: evenly from 0 to T-1, both included (of one step, T-1)
    - leading: the first of each of S equal parts: 0, T/S, 2T/S, ... Like quad it starts below T-1,
      where x is not yet pure noise; chains of very few steps show that, and `Sampler` refuses one
      step of either, which is 0
    - trailing: the last of each: T/S - 1, 2T/S - 1, ..., T-1
    - quad: squares of even steps from 0 to sqrt(0.8 T) (Song et al. 2021, DDIM, Appendix D.2),
      moved apart where they would coincide
    - squares: squares of even steps from 0 to sqrt(T - 1), moved apart: quad up to pure noise

    Raises ValueError for an unknown grid or `steps` outside 1, ..., T.
    """
    T = num_timesteps
    S = steps
    if not 1 <= S <= T:
        raise ValueError(f"steps: must be from 1 to {T}, got {S}")
    i = np.arange(S)
    if grid == "linspace":
        t = np.rint(np.linspace(T - 1, 0, S))[::-1]
    elif grid == "leading":
        t = i * T // S
    elif grid == "trailing":
        t = T - 1 - (i * T // S)[::-1]
    elif grid == "quad":
        t = _apart(np.linspace(0, np.sqrt(0.8 * T), S) ** 2 // 1, T)
    elif grid == "squares":
        # One step alone is the last, as of linspace.
        t = _apart(np.rint(np.linspace(np.sqrt(T - 1), 0, S)[::-1] ** 2), T)
    else:
        raise unknown("grid", grid, Grid)
    return t.astype(np.int32)


def _apart(t: np.ndarray, num_timesteps: int) -> np.ndarray:
    """Ascending steps, those that coincide moved up, or down from T - 1."""
    i = np.arange(len(t))
    t = np.maximum.accumulate(t - i) + i
    return np.minimum(t, num_timesteps - len(t) + i)
