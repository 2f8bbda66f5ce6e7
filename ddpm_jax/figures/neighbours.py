"""Figures 12 and 15: is a sample a copy? Each one beside the training images nearest to it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.config.checked import Range
from ddpm_jax.data.images import to_uint8
from ddpm_jax.devices.mesh import make_mesh
from ddpm_jax.devices.progress import progress_bar
from ddpm_jax.devices.rows import full_batches
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.features import all_features, cache_root, extract, inception, proxy
from ddpm_jax.evaluation.splits import read_split
from ddpm_jax.figures.base import RunFigure
from ddpm_jax.figures.panel import image_table
from ddpm_jax.keys import seed_key

BLOCK = 1024


class Nearest(NamedTuple):
    """The nearest images of each query, the nearest first."""

    index: np.ndarray
    """[Q,N] its place in the indices that were searched."""
    distance: np.ndarray
    """[Q,N] root mean squared difference of pixels, of 255, or the distance of features."""


class Space(NamedTuple):
    """Where images are searched."""

    nearest: Callable[..., Nearest]
    """(uint8 queries [Q,H,W,C], count, own=None), as `nearest`, whose other arguments it knows."""
    words: str
    """What its distances are."""


@dataclasses.dataclass(frozen=True)
class Neighbours(RunFigure):
    """Samples and their nearest training images, by their pixels or by features."""

    n: Annotated[int, Range(min=1)] = 8
    """Samples, a row each."""
    neighbours: Annotated[int, Range(min=1)] = 8
    """Training images beside each."""
    data: str | None = None
    """folder:PATH, npz:PATH or tfds:NAME of the training images; None for where the config says."""
    features: bool = False
    """Search by the features that `evaluate` compares instead of pixels."""
    inception: str | None = None
    """With --features: file of FID's InceptionV3; None for a classifier trained on the images' labels."""

    @property
    def name(self) -> str:
        """Of the files."""
        return "neighbours-features" if self.features else "neighbours"

    def draw(self):
        """Writes the picture and .npz: uint8 samples [n,H,W,C], neighbours [n,N,H,W,C], index and distance [n,N]."""
        if self.inception and not self.features:
            raise UserError(
                "inception: pixels are compared without it; add --features, or leave it out"
            )
        model = self.load()
        flip = model.ddpm.config.data.flip
        _, source, indices = read_split(model, "train", self.data)
        space = self._space(source, indices)
        samples = to_uint8(model.ddpm.sample(model.params, seed_key(self.seed), self.n))
        queries, count = samples, min(self.neighbours, len(indices))
        if flip:  # A mirrored copy is a copy.
            queries = np.concatenate([samples, samples[:, :, ::-1]])
        found = space.nearest(queries, count)
        if flip:
            found = _best(
                Nearest(*(np.concatenate(np.split(field, 2), axis=1) for field in found)), count
            )
        near = np.stack([source.read(indices[row]) for row in found.index])
        typical = distance_between(space, source, indices, flip)
        picture = image_table(
            np.concatenate([samples[:, None], near], axis=1),
            rows=[f"nearest at {distance:.1f}" for distance in found.distance[:, 0]],
            columns=["sample", *(f"#{i + 1}" for i in range(count))],
            title="Samples and the training images nearest to them (Fig. 12)",
            notes=[
                f"Among {len(indices)} training images, by {space.words}. "
                f"Between a training image and the one nearest to it: {typical:.1f} (median); a copy would be near 0."
                + (" Mirrored images count too." if flip else ""),
                self.footnote(model.words),
            ],
        )
        numbers = {
            "samples": samples,
            "neighbours": near,
            "index": indices[found.index],
            "distance": found.distance,
        }
        return self.write(picture, {**numbers, "typical": np.array(typical)})

    def _space(self, source, indices) -> Space:
        if not self.features:
            search = functools.partial(nearest, source=source, indices=indices)
            return Space(search, "the root mean squared difference of pixels, of 255")
        mesh = make_mesh()
        root = cache_root(source, self.path().parent / "real")
        extractor = (
            inception(self.inception, mesh)
            if self.inception
            else proxy(source, indices, root, mesh)
        )
        real = all_features(extractor, source, indices, root)

        def search(queries, count, own=None):
            return nearest_features(extract(extractor, queries).features, real, count, own)

        by = "FID's InceptionV3" if self.inception else "a classifier of these images"
        return Space(search, f"the distance of their features, by {by}")


def nearest(
    queries: np.ndarray, count: int, own: np.ndarray | None = None, *, source, indices: np.ndarray
) -> Nearest:
    """The `count` of the source's images `indices` [M] nearest to each of uint8 `queries` [Q,H,W,C].

    Searched block by block on the device. `own` [Q] is a place in `indices` that does not count, for
    a query that is itself one of them.
    """
    flat = _flatten(queries)
    exclude = np.full(len(queries), -1) if own is None else own
    best = (jnp.full((len(queries), count), jnp.inf), jnp.zeros((len(queries), count), jnp.int32))
    blocks = full_batches(len(indices), BLOCK)
    total = -(-len(indices) // BLOCK)
    for rows, _ in progress_bar(blocks, total=total, desc="searching", unit="block"):
        images = _flatten(source.read(indices[rows]))
        best = _search(best, flat, images, exclude, rows[0], len(indices))
    place = np.asarray(best[1])
    # Once more without the rounding of float32, which a sum of large squares has.
    rmse = [
        _rmse(query, source.read(indices[row])) for query, row in zip(queries, place, strict=True)
    ]
    return _best(Nearest(place, np.stack(rmse)), count)


def nearest_features(
    queries: np.ndarray, real: np.ndarray, count: int, own: np.ndarray | None = None
) -> Nearest:
    """The `count` rows of `real` [M,D] nearest to each of `queries` [Q,D]; `own` as in `nearest`."""
    found = []
    for query, exclude in zip(
        queries, np.full(len(queries), -1) if own is None else own, strict=True
    ):
        distance = np.linalg.norm(real - query, axis=1)
        if exclude >= 0:
            distance[exclude] = np.inf
        place = np.argsort(distance, kind="stable")[:count]
        found.append((place, distance[place]))
    return Nearest(*map(np.stack, zip(*found, strict=True)))


def distance_between(
    space: Space, source, indices: np.ndarray, flip: bool, most: int = 256
) -> float:
    """The median, over at most `most` images, of the distance to the nearest other one, mirrored or not if `flip`.

    NaN for a single image.
    """
    if len(indices) < 2:
        return float("nan")
    some = np.linspace(0, len(indices) - 1, min(most, len(indices))).astype(int)
    images = source.read(indices[some])
    ways = [images, images[:, :, ::-1]] if flip else [images]
    return float(
        np.median(np.min([space.nearest(way, 1, own=some).distance for way in ways], axis=0))
    )


@functools.partial(jax.jit, donate_argnums=0)
def _search(best, queries, block, own, start, total):
    """`best` (squared distances, places), each [Q,N], with the images block [BLOCK,D] from place `start` on."""
    place = start + jnp.arange(len(block))
    product = jnp.matmul(queries, block.T, precision="highest")
    distance = jnp.square(queries).sum(1)[:, None] + jnp.square(block).sum(1)[None] - 2 * product
    counts = (place < total)[None] & (place[None] != own[:, None])
    distances = jnp.concatenate([best[0], jnp.where(counts, distance, jnp.inf)], axis=1)
    places = jnp.concatenate([best[1], jnp.broadcast_to(place, distance.shape)], axis=1)
    negative, chosen = jax.lax.top_k(-distances, best[0].shape[1])
    return -negative, jnp.take_along_axis(places, chosen, axis=1)


def _best(found: Nearest, count: int) -> Nearest:
    """The `count` nearest of each row, sorted, no image twice."""
    rows = []
    for index, distance in zip(*found, strict=True):
        order = np.argsort(distance, kind="stable")
        _, first = np.unique(index[order], return_index=True)
        kept = order[np.sort(first)][:count]
        rows.append((index[kept], distance[kept]))
    return Nearest(*map(np.stack, zip(*rows, strict=True)))


def _flatten(images: np.ndarray) -> np.ndarray:
    return np.float32(images.reshape(len(images), -1)) / 127.5 - 1


def _rmse(image, others) -> np.ndarray:
    difference = np.float64(others) - image
    return np.sqrt(np.square(difference).mean(axis=(1, 2, 3)))
