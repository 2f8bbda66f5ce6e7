"""The average of the weights (Ho et al. 2020, Appendix B: an EMA with decay 0.9999).

Update n = 0, 1, ... moves the average by 1 - decay of the way to the new weights. With `warmup` the
decay is min(decay, (1 + n) / (10 + n)), which forgets the weights that the run began with.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.shapes import Array, Int


def average(
    before: Any, params: Any, n: Int[Array, ""] | int, *, decay: float, warmup: bool = False
) -> Any:
    """The average after update `n`, whose weights are `params`: trees of float32 arrays.

    In float32, weights of the old and the new that are rounded one by one do not sum to 1, and the
    average would settle beside the mean; so the old moves by a part of the difference. A difference
    below float32's spacing over 2 (1 - decay), for 0.9999 at most 6e-4 of a weight, moves nothing.
    """
    part: float | jax.Array = 1 - decay
    if warmup:
        part = jnp.maximum(jnp.float32(part), 9 / (10 + jnp.float32(n)))
    return jax.tree.map(lambda old, new: old + part * (new - old), before, params)


def first_share(updates: int, *, decay: float, warmup: bool = False) -> float:
    """The part of the average that is still the first weights after so many updates."""
    if not warmup:
        return decay**updates
    n = np.arange(updates, dtype=np.float64)
    return float(np.prod(np.minimum(decay, (1 + n) / (10 + n))))
