"""A checksum of arrays, computed on the devices that hold them."""

import collections
import functools
import math
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils

from ddpm_jax.shapes import PyTree

STACKED = 2**26
"""Bytes of arrays of one shape that are summed by one kernel.

CIFAR10's 1,315 arrays make 30 kernels so, which take 4.6 s of CPU time to compile; with 2**20 bytes
it is 297 kernels and 17.6 s.
"""


def checksum(tree: PyTree) -> int:
    """A number below 2**32, computed from the bits and positions of all elements of `tree`.

    It is the same for any sharding, mesh and number of devices or processes. Waits for the arrays,
    which are not moved.
    """
    return checksums({"tree": tree})["tree"]


def checksums(trees: dict[str, PyTree]) -> dict[str, int]:
    """The `checksum` of each of `trees`, by one program on each device that holds some of them."""
    of_trees = {name: jax.tree.leaves(tree) for name, tree in trees.items()}
    sums = _sums([jnp.asarray(leaf) for leaves in of_trees.values() for leaf in leaves])
    if jax.process_count() > 1:
        sums = multihost_utils.process_allgather(sums).sum(axis=0, dtype=np.uint32)
    ends = np.cumsum([len(leaves) for leaves in of_trees.values()])
    of_each = np.split(sums, ends[:-1])
    return {
        name: zlib.crc32(some.astype("<u4").tobytes())
        for name, some in zip(of_trees, of_each, strict=True)
    }


class _Piece(NamedTuple):
    """A part of an array on one device."""

    number: int
    """That of its array."""
    data: jax.Array
    start: int
    """The position of its first element in the array."""
    shape: tuple[int, ...]
    """That of the array."""


def _sums(leaves: list[jax.Array]) -> np.ndarray:
    """uint32 [N]: what this process's devices add to the sum of each of N arrays."""
    on_device = collections.defaultdict(list)
    for number, leaf in enumerate(leaves):
        for shard in _own_shards(leaf):
            piece = _Piece(number, shard.data, _first_position(shard, leaf.shape), leaf.shape)
            on_device[shard.device].append(piece)
    # Each piece is summed once, on a device that holds it, so that devices need not wait for each
    # other.
    sums = [_dispatched(pieces) for pieces in on_device.values()]
    total = np.zeros(len(leaves), np.uint32)
    for pieces, of_device in zip(on_device.values(), jax.device_get(sums), strict=True):
        np.add.at(total, [piece.number for piece in pieces], of_device)
    return total


def _own_shards(leaf):
    """The pieces of `leaf` on this process's devices; of replicated pieces, only the first copy."""
    return [shard for shard in leaf.addressable_shards if shard.replica_id == 0]


def _first_position(shard, shape) -> int:
    starts = [axis.start or 0 for axis in shard.index]
    return sum(start * stride for start, stride in zip(starts, _strides(shape), strict=True))


def _strides(shape: tuple[int, ...]) -> list[int]:
    """How far apart the neighbours along each axis are, in elements."""
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _dispatched(pieces: list[_Piece]) -> jax.Array:
    """uint32 [N]: what each of N pieces of one device adds to its array's sum."""
    starts = np.array([piece.start % 2**32 for piece in pieces], np.uint32)
    shapes = tuple(piece.shape for piece in pieces)
    return _sums_of([piece.data for piece in pieces], starts, shapes)


@functools.partial(jax.jit, static_argnums=2)
def _sums_of(pieces, starts, shapes):
    """uint32 [N], of pieces that begin at the positions `starts` [N] of arrays of `shapes`."""
    stacks = list(_alike(pieces, shapes))
    order = np.concatenate(stacks)
    starts = starts[order]
    sums = []
    begin = 0
    for numbers in stacks:
        end = begin + len(numbers)
        stack = jnp.stack([pieces[number] for number in numbers])
        sums.append(jax.vmap(_sum_of, (0, 0, None))(stack, starts[begin:end], shapes[numbers[0]]))
        begin = end
    return jnp.concatenate(sums)[np.argsort(order)]


def _alike(pieces, shapes) -> Iterator[list[int]]:
    """The numbers of pieces that can be summed as one, in groups of at most STACKED bytes."""
    groups = collections.defaultdict(list)
    for number, (piece, shape) in enumerate(zip(pieces, shapes, strict=True)):
        groups[piece.shape, piece.dtype, shape].append(number)
    for (of_piece, dtype, _), numbers in groups.items():
        size = math.prod(of_piece) * dtype.itemsize
        most = max(1, STACKED // max(1, size))
        yield from (numbers[i : i + most] for i in range(0, len(numbers), most))


def _sum_of(piece, start, shape):
    """uint32 []: what `piece` [...] adds to the sum of its array, which has `shape`."""
    position = jnp.full(piece.shape, start)
    for axis, stride in enumerate(_strides(shape)):
        along = lax.broadcasted_iota(jnp.uint32, piece.shape, axis)
        position = position + along * jnp.uint32(stride % 2**32)
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
