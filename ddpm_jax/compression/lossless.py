"""The lossless layer: x_0 given the last x_t by Eq. 13, such that both sides count in integers.

A receiver whose floats differ in the last digits must still find the same distribution. So the
mean of Eq. 13 is rounded to every third level of 0, ..., 255, and a symbol says for every dimension
whether the sender's mean was far from a rounding boundary (SAFE, nearly always), or near one and
rounded DOWN or UP. The variance is that of the residuals of the images before, in pixels whose
neighbourhood was as busy: it follows from integers, and takes the place of one sigma for all.
"""

import numpy as np

from ddpm_jax.compression.numbers import Counts, Reader, Writer
from ddpm_jax.shapes import Float32, Float64, Integer, UInt8

SAFE = 0
DOWN = 1
UP = 2

SPACING = 3
"""Levels from one rounded mean to the next. With 1 three times as many would be near a boundary,
which costs more than finer means save. It divides 255."""

NEAR = 0.06
"""A mean is near a boundary within so many levels: rare, and twice above how far the means go
apart if all outputs of the network differ by 1e-5."""

BUSIEST = 9
"""Contexts of a neighbourhood are 0, ..., BUSIEST: logarithms of how much its means differ."""

ENDS = 3
"""And for each whether the mean is black, or white, or between."""

BEFORE = 8
"""So many residuals of the first guess a context's variance begins with."""


def level_means(predicted: Float32[np.ndarray, "..."]) -> Float64[np.ndarray, "..."]:
    """The predicted x_0 in levels, within 0 to 255."""
    return np.clip((np.asarray(predicted, np.float64) + 1) * 127.5, 0, 255)


def rounded(means: Float64[np.ndarray, "..."]) -> tuple[np.ndarray, np.ndarray]:
    """(the sender's rounded levels, the symbol of each)."""
    below = np.floor(means / SPACING)
    above_boundary = means - SPACING * (below + 0.5)
    near = np.abs(above_boundary) < NEAR
    rounded_up = above_boundary >= 0
    symbols = np.where(near, np.where(rounded_up, UP, DOWN), SAFE)
    return SPACING * (below + rounded_up).astype(np.int64), symbols


def resolved(
    means: Float64[np.ndarray, "..."], symbols: Integer[np.ndarray, "..."]
) -> Integer[np.ndarray, "..."]:
    """The sender's rounded levels, from the receiver's means and the sender's symbols."""
    places = means / SPACING
    # Where a boundary is near, floor gives the level below it on either side.
    nearest = np.where(symbols == SAFE, np.floor(places + 0.5), np.floor(places) + (symbols == UP))
    return np.clip(SPACING * nearest, 0, 255).astype(np.int64)


def contexts(levels: Integer[np.ndarray, "h w c"]) -> Integer[np.ndarray, "h w c"]:
    """The context of each dimension, from the levels of an image and its four neighbours."""
    padded = np.pad(levels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    busy = np.zeros_like(levels)
    for row, column in ((0, 1), (2, 1), (1, 0), (1, 2)):
        height, width, _ = levels.shape
        busy += np.abs(padded[row : row + height, column : column + width] - levels)
    # frexp's exponent of an integer is the number of its binary digits.
    digits = np.minimum(np.frexp(busy.astype(np.float64))[1], BUSIEST)
    return ENDS * digits + (levels == 0) + 2 * (levels == 255)


class Pixels:
    """Codes the pixels of one image after another; sender and receiver hold equal ones."""

    def __init__(self) -> None:
        self.symbols = Counts(np.array([96, 1, 1]))
        digits = np.repeat(np.arange(BUSIEST + 1), ENDS)
        guess = np.maximum(1, 4**digits // 64)
        self.squares = BEFORE * guess.astype(np.int64)
        self.counts = np.full(guess.size, BEFORE, np.int64)

    def write(
        self,
        writer: Writer,
        image: UInt8[np.ndarray, "h w c"],
        predicted: Float32[np.ndarray, "h w c"],
    ) -> None:
        """Codes an image."""
        levels, symbols = rounded(level_means(predicted))
        writer.write(symbols.reshape(-1), self.symbols.model)
        of_pixel = contexts(levels).reshape(-1)
        pixels = image.reshape(-1).astype(np.int64)
        means, deviations = self._gaussians(levels, of_pixel)
        writer.write_levels(pixels, means, deviations)
        self._learn(pixels - levels.reshape(-1), of_pixel, symbols)

    def read(
        self, reader: Reader, predicted: Float32[np.ndarray, "h w c"]
    ) -> UInt8[np.ndarray, "h w c"]:
        """The next image."""
        symbols = reader.read(self.symbols.model, predicted.size)
        levels = resolved(level_means(predicted), symbols.reshape(predicted.shape))
        of_pixel = contexts(levels).reshape(-1)
        means, deviations = self._gaussians(levels, of_pixel)
        pixels = reader.read_levels(means, deviations)
        self._learn(pixels - levels.reshape(-1), of_pixel, symbols)
        return pixels.astype(np.uint8).reshape(predicted.shape)

    def _gaussians(self, levels, of_pixel) -> tuple[np.ndarray, np.ndarray]:
        """The means and standard deviations of the pixels, in levels."""
        deviations = np.sqrt(self.squares / self.counts)
        return levels.reshape(-1).astype(np.float64), np.maximum(deviations, 0.05)[of_pixel]

    def _learn(self, residuals, of_pixel, symbols) -> None:
        size = self.counts.size
        self.counts += np.bincount(of_pixel, minlength=size)
        # Sums of whole numbers below 2^53 are exact in float64.
        added = np.bincount(of_pixel, weights=np.square(residuals), minlength=size)
        self.squares += added.astype(np.int64)
        self.symbols.add(symbols.reshape(-1))
