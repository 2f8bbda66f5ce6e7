"""Figures 12 and 15: is a sample a copy? Samples beside their nearest training images."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ddpm_jax.config import Metavar, Range
from ddpm_jax.data.images import as_read, to_float
from ddpm_jax.data.sources import Source
from ddpm_jax.ddpm import DDPM
from ddpm_jax.devices.mesh import make_mesh
from ddpm_jax.devices.progress import progress_bar
from ddpm_jax.devices.rows import full_batches
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.features import (
    all_features,
    cache_root,
    extract,
    extractor_of,
)
from ddpm_jax.evaluation.splits import read_split
from ddpm_jax.figures.base import OptionalSource, RunFigure, labels_in_turn
from ddpm_jax.figures.panel import image_table
from ddpm_jax.keys import seed_key

BLOCK = 1024


class Nearest(NamedTuple):
    """The images nearest to each query, nearest first."""

    index: np.ndarray  # type: ignore[assignment] # no one searches a tuple
    """[Q,N] their places in the searched indices."""
    distance: np.ndarray
    """[Q,N] root mean squared difference of pixels (of 255 for 8-bit images), or the distance of
    features."""


class Space(NamedTuple):
    """The space in which the nearest images are searched: pixels or features."""

    nearest: Callable[..., Nearest]
    """(queries [Q,H,W,C], count, own=None) -> Nearest, like the function `nearest`."""
    words: str
    """The meaning of its distances, in words."""


@dataclasses.dataclass(frozen=True)
class Neighbours(RunFigure):
    """Samples and their nearest training images, by pixels or by features."""

    n: Annotated[int, Range(min=1)] = 8
    """Number of samples, one per row."""
    neighbours: Annotated[int, Range(min=1)] = 8
    """Number of training images beside each sample."""
    data: OptionalSource = None
    """The training images; None for the config's source."""
    features: bool = False
    """Compare images by the features that `evaluate` uses, not by pixels."""
    inception: Annotated[str | None, Metavar("PATH")] = None
    """With --features: weights of FID's InceptionV3; None trains a small proxy instead."""

    @property
    def name(self) -> str:  # type: ignore[override] # fixed in the other figures
        """Stem of the figure's file names."""
        return "neighbours-features" if self.features else "neighbours"

    def draw(self) -> epath.Path:
        """Writes the picture and .npz.

        The .npz holds samples [n,H,W,C] and neighbours [n,N,H,W,C] (levels, or the model's units),
        index and distance [n,N], and typical, the median distance between training images.
        """
        if self.inception and not self.features:
            raise UserError(
                "inception: only applies with --features; add --features, or leave it out"
            )
        model = self.load()
        flip = model.ddpm.config.data.flip
        _, source, indices = read_split(model, "train", self.data)
        space = self._space(model.ddpm, source, indices)
        labels = labels_in_turn(model.ddpm, self.n)
        rng = seed_key(self.seed)
        drawn = model.ddpm.sample(model.params, rng, self.n, labels=labels)
        samples = as_read(drawn, model.ddpm.levels)
        count = min(self.neighbours, len(indices))
        found = nearest_to(space, samples, count, flip)
        near = np.stack([source.read(indices[row]) for row in found.index])
        typical = distance_between(space, source, indices, flip)
        shown = to_float(np.concatenate([samples[:, None], near], axis=1))
        picture = image_table(
            model.ddpm.to_picture(shown, self.channels),
            rows=[f"nearest at {distance:.1f}" for distance in found.distance[:, 0]],
            columns=["sample", *(f"#{i + 1}" for i in range(count))],
            title="Samples and their nearest training images (Fig. 12)",
            notes=[
                f"Nearest of {len(indices)} training images by {space.words}. A copy would be near "
                f"0; the median from a training image to its nearest other one is {typical:.1f}."
                + (" Mirrored images count too." if flip else ""),
                *self.notes_of(model),
            ],
        )
        numbers = {
            "samples": samples,
            "neighbours": near,
            "index": indices[found.index],
            "distance": found.distance,
            "typical": np.array(typical),
        }
        return self.write(picture, numbers)

    def _space(self, ddpm: DDPM, source: Source, indices: np.ndarray) -> Space:
        if not self.features:
            return pixel_space(ddpm, source, indices)
        root = cache_root(source, self.path().parent / "real")
        extractor = extractor_of(
            self.inception, ddpm.config.data, source, indices, root, make_mesh()
        )
        network = "FID's InceptionV3" if self.inception else "a classifier of these images"
        real = all_features(extractor, source, indices, root)

        def search(queries, count, own=None):
            return nearest_features(extract(extractor, queries).features, real, count, own)

        return Space(search, f"the distance of their features, by {network}")


def pixel_space(ddpm: DDPM, source: Source, indices: np.ndarray) -> Space:
    """The pixels of the images `indices` [M] of `source`, in the unit of the data."""
    unit = ddpm.scaling.unit
    pixels = functools.partial(nearest, source=source, indices=indices, unit=unit.size)
    return Space(pixels, f"the root mean squared difference of pixels, {unit.words}")


def nearest_to(space: Space, samples: np.ndarray, count: int, flip: bool) -> Nearest:
    """The `count` images nearest to each of `samples` [Q,H,W,C], as a Source reads them.

    With `flip`, images near the mirrored sample count too.
    """
    if not flip:
        return space.nearest(samples, count)
    # A mirrored copy is a copy too.
    both = space.nearest(np.concatenate([samples, samples[:, :, ::-1]]), count)
    index = np.concatenate(np.split(both.index, 2), axis=1)
    distance = np.concatenate(np.split(both.distance, 2), axis=1)
    return _best(Nearest(index, distance), count)


def nearest(
    queries: np.ndarray,
    count: int,
    own: np.ndarray | None = None,
    *,
    source: Source,
    indices: np.ndarray,
    unit: float = 127.5,
) -> Nearest:
    """The `count` nearest images to each of `queries` [Q,H,W,C], as a Source reads them.

    The source's images `indices` [M] are searched block by block on the device. If a query is
    itself one of them, `own` [Q] holds its place in `indices`, which is left out.
    """
    flat = _flatten(queries)
    exclude = np.full(len(queries), -1) if own is None else own
    shape = (len(queries), count)
    best = (jnp.full(shape, jnp.inf, jnp.float32), jnp.zeros(shape, jnp.int32))
    blocks = full_batches(len(indices), BLOCK)
    total = -(-len(indices) // BLOCK)
    for rows, _ in progress_bar(blocks, total=total, desc="searching", unit="block"):
        block = _flatten(source.read(indices[rows]))
        best = _search(best, flat, block, exclude, rows[0], len(indices))
    place = np.asarray(best[1])
    # Computed again in float64: a sum of large squares is rounded in float32.
    rmse = [
        _rmse(query, source.read(indices[row]), unit)
        for query, row in zip(queries, place, strict=True)
    ]
    return _best(Nearest(place, np.stack(rmse)), count)


def nearest_features(
    queries: np.ndarray, real: np.ndarray, count: int, own: np.ndarray | None = None
) -> Nearest:
    """The `count` rows of `real` [M,D] nearest to each of `queries` [Q,D]; `own`: see `nearest`."""
    index = []
    distances = []
    for i, query in enumerate(queries):
        distance = np.linalg.norm(real - query, axis=1)
        if own is not None:
            distance[own[i]] = np.inf
        place = np.argsort(distance, kind="stable")[:count]
        index.append(place)
        distances.append(distance[place])
    return Nearest(np.stack(index), np.stack(distances))


def distance_between(
    space: Space, source: Source, indices: np.ndarray, flip: bool, most: int = 256
) -> float:
    """The median distance from an image to the nearest other one, over at most `most` images.

    With `flip`, mirrored images count too. NaN for a single image.
    """
    if len(indices) < 2:
        return float("nan")
    places = np.linspace(0, len(indices) - 1, min(most, len(indices))).astype(int)
    images = source.read(indices[places])
    distance = space.nearest(images, 1, own=places).distance
    if flip:
        mirrored = space.nearest(images[:, :, ::-1], 1, own=places).distance
        distance = np.minimum(distance, mirrored)
    return float(np.median(distance))


@functools.partial(jax.jit, donate_argnums=0)
def _search(best, queries, block, own, start, total):
    """Updates `best`, (squared distances, places) each [Q,N], with one block of images [BLOCK,D].

    The block's first image is at place `start`; places from `total` on are padding.
    """
    place = (start + jnp.arange(len(block))).astype(jnp.int32)
    product = jnp.matmul(queries, block.T, precision="highest")
    distance = jnp.square(queries).sum(1)[:, None] + jnp.square(block).sum(1)[None] - 2 * product
    counts = (place < total)[None] & (place[None] != own[:, None])
    distances = jnp.concatenate([best[0], jnp.where(counts, distance, jnp.inf)], axis=1)
    places = jnp.concatenate([best[1], jnp.broadcast_to(place, distance.shape)], axis=1)
    negative, chosen = jax.lax.top_k(-distances, best[0].shape[1])
    return -negative, jnp.take_along_axis(places, chosen, axis=1)


def _best(found: Nearest, count: int) -> Nearest:
    """The `count` nearest of each row, sorted, without repeats."""
    indices = []
    distances = []
    for index, distance in zip(found.index, found.distance, strict=True):
        order = np.argsort(distance, kind="stable")
        _, first = np.unique(index[order], return_index=True)
        kept = order[np.sort(first)][:count]
        indices.append(index[kept])
        distances.append(distance[kept])
    return Nearest(np.stack(indices), np.stack(distances))


def _flatten(images: np.ndarray) -> np.ndarray:
    return to_float(images.reshape(len(images), -1))


def _rmse(image, others, unit: float) -> np.ndarray:
    """[N] in levels, where the images are; else in a unit that the model's is `unit` of."""
    difference = np.float64(others) - image
    if others.dtype.kind == "f":
        difference = difference * unit
    return np.asarray(np.sqrt(np.square(difference).mean(axis=(1, 2, 3))))
