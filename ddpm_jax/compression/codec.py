"""Algorithms 3 and 4 (Ho et al. 2020, Section 4.3): sending images, and receiving them."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from ddpm_jax.compression.chain import Step, edges
from ddpm_jax.compression.draws import (
    ImageDraws,
    StepDraws,
    arrivals_key,
    chosen_normals,
    image_draws,
    starts,
    step_draws,
)
from ddpm_jax.compression.gaussians import arrival_times, choose
from ddpm_jax.compression.levels import groups_at, next_levels
from ddpm_jax.shapes import Float32, Integer


class Setting(NamedTuple):
    """What both sides know before the first byte."""

    image_shape: tuple[int, int, int]
    seed: int
    candidates: int
    """N of each group, a power of two."""
    steps: tuple[Step, ...]
    """From noise to the image."""
    nominal: tuple[int, ...]
    """The groups expected in each step."""

    @property
    def dimensions(self) -> int:
        """D of an image."""
        return int(np.prod(self.image_shape))


class Sent(NamedTuple):
    """What one step says of some images."""

    levels: Integer[np.ndarray, " b"]
    numbers: list[Integer[np.ndarray, " g"]]
    """Of each image's groups."""


Predict = Callable[[Float32[np.ndarray, "b h w c"], int], Float32[np.ndarray, "b h w c"]]
"""predict(x_t, i): the predicted x_0 at the chain's index i."""


def send(
    setting: Setting,
    predict: Predict,
    indices: Integer[np.ndarray, " b"],
    x_0: Float32[np.ndarray, "b h w c"],
    group_bits: float,
) -> Iterator[tuple[Float32[np.ndarray, "b h w c"], Sent | None]]:
    """Algorithm 3 for the images of numbers `indices`: yields (the predicted x_0, what is sent).

    The last one is only predicted, and nothing is sent.
    """
    D = setting.dimensions
    x_t = starts(setting.seed, indices, setting.image_shape)
    levels = np.zeros(len(indices), np.int64)
    for number, step in enumerate(setting.steps):
        predicted = predict(x_t, len(setting.steps) - number)
        # Between the two posteriors of Eq. 7 lies d = (mean_q - mean_p) / sigma.
        d = (step.of_x_0 / step.sigma * (x_0 - predicted)).reshape(len(x_0), D)
        bits = 0.5 * np.square(d, dtype=np.float64).sum(axis=1) / np.log(2)
        levels = next_levels(bits, setting.nominal[number], group_bits, levels, D)
        draws, of_image, ends = _common(setting, number, indices, levels)
        numbers = _search(setting, d, draws, of_image, ends)
        yield predicted, Sent(levels, numbers)
        normal = chosen_normals(draws, of_image, ends, numbers, setting.candidates)
        x_t = _next(step, predicted, x_t, normal)
    yield predict(x_t, 0), None


def receive(
    setting: Setting,
    predict: Predict,
    indices: Integer[np.ndarray, " b"],
    sent: list[Sent],
    move: Callable[[int], Any],
) -> Float32[np.ndarray, "b h w c"]:
    """Algorithm 4: x_t of the images of numbers `indices` after the steps of `sent`."""
    x_t = starts(setting.seed, indices, setting.image_shape)
    for number, of_step in enumerate(sent):
        step = setting.steps[number]
        predicted = predict(x_t, len(setting.steps) - number)
        draws, of_image, ends = _common(setting, number, indices, of_step.levels)
        normal = chosen_normals(draws, of_image, ends, of_step.numbers, setting.candidates)
        x_t = _next(step, predicted, x_t, normal)
        move(1)
    return x_t


def group_edges(
    setting: Setting,
    number: int,
    levels: Integer[np.ndarray, " b"],
    order: Integer[np.ndarray, " D"],
) -> list[Integer[np.ndarray, " G"]]:
    """Where the groups of each image begin and end, among the dimensions in `order`."""
    ordered = setting.steps[number].weights[order]
    groups = groups_at(setting.nominal[number], levels, setting.dimensions)
    of_count = {int(count): edges(ordered, int(count)) for count in np.unique(groups)}
    return [of_count[int(count)] for count in groups]


def _common(
    setting: Setting,
    number: int,
    indices: Integer[np.ndarray, " b"],
    levels: Integer[np.ndarray, " b"],
) -> tuple[StepDraws, ImageDraws, list[np.ndarray]]:
    """What both sides know of a step once the levels are there: draws, and edges of groups."""
    timestep = setting.steps[number].timestep
    draws = step_draws(setting.seed, timestep, setting.candidates, setting.dimensions)
    of_image = image_draws(setting.seed, indices, draws, timestep, setting.candidates)
    return draws, of_image, group_edges(setting, number, levels, draws.order)


def _search(setting, d, draws, of_image, ends) -> list[np.ndarray]:
    """The numbers of the candidates that the sender takes."""
    turned = d[:, draws.order] * of_image.signs
    shifts: list[np.ndarray] = []
    offsets: list[np.ndarray] = []
    for image, of_one in enumerate(ends):
        shifts += [turned[image, a:b] for a, b in zip(of_one[:-1], of_one[1:], strict=True)]
        offsets.append(of_image.offsets[image, : of_one.size - 1])
    times = arrival_times(arrivals_key(draws), setting.candidates)
    numbers = choose(jax.numpy.asarray(draws.row), times, shifts, np.concatenate(offsets))
    return np.split(numbers, np.cumsum([each.size for each in offsets])[:-1])


def _next(step: Step, predicted, x_t, normal) -> np.ndarray:
    """A sample of p(x_{t-1} | x_t) made with `normal` (Eq. 7, with the predicted x_0)."""
    mean = step.of_x_0 * predicted + step.of_x_t * x_t
    return mean + step.sigma * normal.reshape(x_t.shape)
