"""What both sides draw from the seed: the start, the candidates of a step, signs and offsets.

All draws are threefry's, by `jax.random` (see `keys`). For the image i and the step from t on:

    image key = fold_in(key(seed), i)                       step key = fold_in(key(seed), CODEC)
    x_T       = normal(fold_in(image key, START))           and that folded with t
    order     = argsort of D bits of fold_in(step key, ORDER)
    row       = N + D normals of fold_in(step key, CANDIDATES)
    words     = 2 D bits of the image key, folded with CODEC and then t

The dimensions are put in `order`, and cut into groups. The sign of dimension k is that of the
lowest bit of word k, and the first window of group j that of the low bits of word D + j.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.compression.gaussians import candidate, normals
from ddpm_jax.keys import ARRIVALS, CANDIDATES, CODEC, ORDER, START, example_keys, seed_key
from ddpm_jax.shapes import AnyKey, Array, Float32, Int, Integer


class StepDraws(NamedTuple):
    """The draws of one step that all images share."""

    key: AnyKey
    order: Integer[np.ndarray, " D"]
    row: Float32[np.ndarray, " n"]


class ImageDraws(NamedTuple):
    """The draws of one step for some images."""

    signs: Float32[np.ndarray, "b D"]
    """1 or -1, of the dimensions in their order."""
    offsets: Integer[np.ndarray, "b D"]
    """The first window of each group."""


def starts(
    seed: int, indices: Integer[np.ndarray, " b"], image_shape: tuple[int, int, int]
) -> Float32[np.ndarray, "b h w c"]:
    """x_T float32 [B,H,W,C] of the images of these numbers."""
    return np.asarray(_starts(seed_key(seed), jnp.asarray(indices, jnp.uint32), image_shape))


def step_draws(seed: int, timestep: int, candidates: int, dimensions: int) -> StepDraws:
    """The draws of the step that starts from `timestep`."""
    key = jax.random.fold_in(jax.random.fold_in(seed_key(seed), CODEC), timestep)
    words = np.asarray(jax.random.bits(jax.random.fold_in(key, ORDER), (dimensions,), jnp.uint32))
    order = np.argsort(words, kind="stable")
    row = normals(jax.random.fold_in(key, CANDIDATES), candidates, dimensions)
    return StepDraws(key, order, np.asarray(row))


def arrivals_key(draws: StepDraws) -> AnyKey:
    """The key of the sender's arrival times, which the receiver does not need."""
    return jax.random.fold_in(draws.key, ARRIVALS)


def image_draws(
    seed: int, indices: Integer[np.ndarray, " b"], draws: StepDraws, timestep: int, candidates: int
) -> ImageDraws:
    """The draws of that step for the images of these numbers."""
    D = draws.order.size
    places = jnp.asarray(indices, jnp.uint32)
    words = np.asarray(_words(seed_key(seed), places, np.uint32(timestep), D))
    signs = (1 - 2 * (words[:, :D] & 1).astype(np.int8)).astype(np.float32)
    return ImageDraws(signs[:, draws.order], words[:, D:] & np.uint32(candidates - 1))


def chosen_normals(
    draws: StepDraws,
    of_image: ImageDraws,
    edges: list[Integer[np.ndarray, " G"]],
    numbers: list[Int[np.ndarray, " g"]],
    candidates: int,
) -> Float32[np.ndarray, "b D"]:
    """The normals of the chosen candidates, for the dimensions of each image.

    `edges` and `numbers` are those of each image's groups.
    """
    normal = np.empty(of_image.signs.shape, np.float32)
    for image, ends in enumerate(edges):
        windows = [
            candidate(draws.row, candidates, int(offset), int(number), int(last - first))
            for offset, number, first, last in zip(
                of_image.offsets[image], numbers[image], ends[:-1], ends[1:], strict=False
            )
        ]
        normal[image, draws.order] = np.concatenate(windows) * of_image.signs[image]
    return normal


@functools.partial(jax.jit, static_argnums=2)
def _starts(rng: AnyKey, indices: Array, image_shape: tuple[int, int, int]) -> jax.Array:
    keys = example_keys(rng, indices)
    of_start = jax.vmap(lambda key: jax.random.fold_in(key, START))(keys)
    return jax.vmap(lambda key: jax.random.normal(key, image_shape, jnp.float32))(of_start)


@functools.partial(jax.jit, static_argnums=3)
def _words(rng: AnyKey, indices: Array, timestep: Array, dimensions: int) -> jax.Array:
    def of_one(key):
        key = jax.random.fold_in(jax.random.fold_in(key, CODEC), timestep)
        return jax.random.bits(key, (2 * dimensions,), jnp.uint32)

    return jax.vmap(of_one)(example_keys(rng, indices))
