"""Endless batches as a pure function of (seed, step), so that resuming needs only the step."""

import dataclasses
import functools
import hashlib
from typing import Any, NamedTuple, Protocol

import numpy as np

from ddpm_jax.data.names import name_bytes
from ddpm_jax.data.sources import Source
from ddpm_jax.errors import UserError


class Batch(NamedTuple):
    """Some images and their labels; a pytree of arrays, NumPy's or jax's."""

    image: Any
    """[B,H,W,C] as the source reads them, or the places [B] of the images where they are on the
    device already."""
    label: Any = None
    """int32 [B], or None where there are no labels."""


class BatchReader(Protocol):
    """The source of an update's batches: `Batches` in memory, or a `Stream` that reads ahead."""

    @property
    def source(self) -> Source:
        """The images that batches are made of."""

    def batch_at(self, step: int) -> Batch:
        """The rows of batch `step`, with the images themselves."""

    def places_at(self, step: int) -> Batch:
        """The same with the images' places in the source, int64 [R], in place of the images."""

    def close(self) -> None:
        """Lets go of what is held."""


@dataclasses.dataclass(frozen=True)
class Batches:
    """Batches of some images of a source: every epoch each of them once, in an order of its own.

    An epoch of a source that is read in blocks visits these in an order of its own, and mixes the
    images of some blocks at a time, so that it reads each block once.

    The stream does not stop at the end of an epoch: the batch there holds the last images of one
    and the first of the next.
    """

    source: Source
    indices: np.ndarray
    """[N] the images of the source that take part."""
    batch_size: int
    seed: int
    rows: np.ndarray | None = None
    """[R] the rows of each batch to read, None for all. Each of several hosts reads those of its
    own devices."""

    def batch_at(self, step: int) -> Batch:
        """The rows of batch `step`: images [R,H,W,C], labels int32 [R] or None."""
        chosen, labels = self.places_at(step)
        return Batch(self.source.read(chosen), labels)

    def places_at(self, step: int) -> Batch:
        """The rows of batch `step`: places in the source int64 [R], labels int32 [R] or None."""
        chosen = self.indices_at(step)
        labels = self.source.labels
        return Batch(chosen, None if labels is None else labels[chosen])

    def indices_at(self, step: int) -> np.ndarray:
        """Which images of the source the rows of batch `step` are: int64 [R]."""
        rows = np.arange(self.batch_size) if self.rows is None else self.rows
        position = step * self.batch_size + rows
        epoch, place = np.divmod(position, len(self.indices))
        chosen = np.empty(len(rows), np.int64)
        for e in np.unique(epoch):
            inside = epoch == e
            chosen[inside] = self.indices[self._order(int(e))[place[inside]]]
        return chosen

    def _order(self, epoch: int) -> np.ndarray:
        """The order in which an epoch visits `indices`: int64 [N]."""
        if self._places is None:
            return _permutation(self.seed, epoch, len(self.indices))
        return _permutation_by_blocks(self.seed, epoch, self._places)

    @functools.cached_property
    def _places(self) -> "_Places | None":
        blocks = self.source.blocks
        if blocks is None:
            return None
        found, block = np.unique(self.indices // blocks.images, return_inverse=True)
        return _Places(block, len(found), blocks.mixed)

    def close(self) -> None:
        """Nothing is held."""


def split(source: Source, holdout: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices (to train on, held out) of `source`, about `holdout` of them held out.

    A hash of its name decides, so an image keeps its side when others come or go. Raises UserError
    if none is left to train on.
    """
    held = np.array([_hash01(name) < holdout for name in source.names])
    train = np.flatnonzero(~held)
    if not len(train):
        raise UserError(
            f"data.holdout: {holdout} of {len(source)} images leaves none to train on; lower it"
        )
    return train, np.flatnonzero(held)


def _hash01(name: str) -> float:
    hashed = hashlib.blake2b(name_bytes(name), digest_size=8)
    return int.from_bytes(hashed.digest(), "big") / 2**64


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    # NumPy promises the streams of its bit generators for ever, and nothing that is built on them.
    bits = np.random.Philox(key=[seed, epoch]).random_raw(n)
    return np.argsort(bits, kind="stable")


@dataclasses.dataclass(frozen=True, eq=False)  # Its hash is its identity.
class _Places:
    """The blocks that some images lie in."""

    block: np.ndarray
    """[N] the block of each image, numbered from 0."""
    blocks: int
    mixed: int
    """Of how many blocks the images are mixed at a time."""


@functools.lru_cache(maxsize=4)
def _permutation_by_blocks(seed: int, epoch: int, places: _Places) -> np.ndarray:
    bits = np.random.Philox(key=[seed, epoch]).random_raw(places.blocks + len(places.block))
    rank = np.empty(places.blocks, np.int64)
    rank[np.argsort(bits[: places.blocks], kind="stable")] = np.arange(places.blocks)
    window = rank[places.block] // places.mixed
    return np.lexsort((bits[places.blocks :], window))  # By the window, and at random inside it.
