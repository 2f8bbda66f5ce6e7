"""A checksum of arrays, computed on the devices that hold them."""

import functools
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils

from ddpm_jax.shapes import PyTree


def checksum(tree: PyTree) -> int:
    """A number below 2**32, computed from the bits and positions of all elements of `tree`.

    It is the same for any sharding, mesh and number of devices or processes. Waits for the arrays,
    which are not moved.
    """
    # Each piece is summed once, on a device that holds it, so that devices need not wait for each
    # other. There is one program per shape: XLA would take minutes to compile a single program for
    # the hundreds of arrays of a training state.
    pieces = [
        [_of_piece(shard, leaf.shape) for shard in _own_shards(leaf)]
        for leaf in map(jnp.asarray, jax.tree.leaves(tree))
    ]
    sums = np.array(
        [sum(map(int, of_leaf)) % 2**32 for of_leaf in jax.device_get(pieces)], np.uint32
    )
    if jax.process_count() > 1:
        sums = np.sum(multihost_utils.process_allgather(sums), axis=0, dtype=np.uint32)
    return zlib.crc32(sums.astype("<u4").tobytes())


def _own_shards(leaf):
    """The pieces of `leaf` on this process's devices; of replicated pieces, only the first copy."""
    return [shard for shard in leaf.addressable_shards if shard.replica_id == 0]


def _of_piece(shard, shape):
    starts = np.array([axis.start or 0 for axis in shard.index], np.uint32)
    return _sum_of(shard.data, starts, shape)


@functools.partial(jax.jit, static_argnums=2)
def _sum_of(piece, starts, shape):
    """uint32 []: what `piece` [...] adds to the array's sum.

    The piece begins at index `starts` of an array of `shape`.
    """
    position = jnp.zeros(piece.shape, jnp.uint32)
    for axis in range(len(shape)):
        along = starts[axis] + lax.broadcasted_iota(jnp.uint32, piece.shape, axis)
        position = position + along * jnp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
    total = jnp.uint32(0)
    for word, bits in enumerate(_words(piece)):
        # A sum of integers does not depend on their order, and so not on the pieces either.
        total = total + jnp.sum(
            _mix(bits + (2 * position + word) * jnp.uint32(0x9E3779B1)), dtype=jnp.uint32
        )
    return total


def _words(leaf):
    """The bits of each element as one uint32, or as two if it has 64 bits."""
    if leaf.dtype == bool:
        return [leaf.astype(jnp.uint32)]
    bits = lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * min(leaf.dtype.itemsize, 4)}"))
    return [bits.astype(jnp.uint32)] if leaf.dtype.itemsize <= 4 else [bits[..., 0], bits[..., 1]]


def _mix(x):
    """MurmurHash3's finaliser: a bijection of uint32 where each bit depends on all input bits."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
