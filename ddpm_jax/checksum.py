"""A checksum of arrays that is computed where they lie."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def checksum(tree) -> int:
    """A number below 2**32 made of the bits of all arrays of `tree` and of their places.

    It is the same for any sharding, mesh and number of devices. Waits for the arrays; they stay where they are.
    """
    # A program a shape, not one for all: XLA takes minutes over the hundreds of arrays of a training state.
    sums = jax.device_get([_of_leaf(leaf) for leaf in jax.tree.leaves(tree)])
    return zlib.crc32(np.array(sums, "<u4").tobytes())


@jax.jit
def _of_leaf(leaf):
    """uint32 []: any one element that changes, changes it."""
    position = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        position = position * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    total = jnp.uint32(0)
    for bits in _words(leaf):
        # Integers add up to the same in any order, and so on any number of devices.
        total = _mix(total) + jnp.sum(_mix(bits + position * jnp.uint32(0x9E3779B1)), dtype=jnp.uint32)
    return total


def _words(leaf):
    """The bits of each element as one uint32, or two of them where it has 64 bits."""
    if leaf.dtype == bool:
        return [leaf.astype(jnp.uint32)]
    bits = lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * min(leaf.dtype.itemsize, 4)}"))
    return [bits.astype(jnp.uint32)] if leaf.dtype.itemsize <= 4 else [bits[..., 0], bits[..., 1]]


def _mix(x):
    """A bijection of uint32 in which each bit depends on all: MurmurHash3's finaliser."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
