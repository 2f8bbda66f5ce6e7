"""Parameters made ready for a chain, which calls the network many times with the same ones."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from ddpm_jax.models import tile_kernels
from ddpm_jax.shapes import PyTree


class Ready(NamedTuple):
    """Parameters with what was computed of them once."""

    params: PyTree
    tiles: PyTree
    """See models/winograd.py."""


def ready(ddpm: Any, params: PyTree) -> PyTree:
    """Checked `params` as a chain's programs take them: Ready where that makes the network faster.

    That is on a CPU alone, or where it is not known yet which device will compute.
    """
    model = ddpm.config.model
    if not model.winograd or model.dtype != "float32" or not _has_tiles(ddpm):
        return params
    leaves = jax.tree.leaves(params)
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    if not traced and any(_platform(leaf) != "cpu" for leaf in leaves):
        return params
    return Ready(params, tile_kernels(params, ddpm.image_shape))


@functools.lru_cache(maxsize=16)
def _has_tiles(ddpm: Any) -> bool:
    tiles = functools.partial(tile_kernels, image_shape=ddpm.image_shape)
    return bool(jax.eval_shape(tiles, ddpm.shapes))


def _platform(leaf: Any) -> str:
    if isinstance(leaf, np.ndarray):
        return jax.default_backend()
    return next(iter(leaf.devices())).platform
