"""Integers as bytes, by the range coder of the library constriction.

How often a symbol occurred in the layers before decides what it costs: `Counts` are integers, equal
on both sides. Arrays of symbols are coded one after another, in the order of the calls.
"""

from typing import Any

import constriction
import numpy as np

from ddpm_jax.errors import UserError
from ddpm_jax.shapes import Float64, Int, Integer

coding = constriction.stream.queue
models = constriction.stream.model

LEVELS = models.QuantizedGaussian(0, 255)
"""A Gaussian whose mean and deviation are given with each level."""


class Counts:
    """How often each of some symbols occurred, which is what the next ones are coded with."""

    def __init__(self, first: Int[np.ndarray, " n"]):
        """`first` are the counts before any symbol, all positive."""
        self.counts: Integer[np.ndarray, " n"] = np.array(first, np.int64)

    @property
    def model(self) -> Any:
        """The library's distribution."""
        return models.Categorical(self.counts / self.counts.sum(), perfect=False)

    def add(self, symbols: Int[np.ndarray, " m"]) -> None:
        """Counts some more symbols."""
        self.counts += np.bincount(symbols, minlength=self.counts.size)

    def bits(self, symbols: Int[np.ndarray, " m"]) -> Float64[np.ndarray, " m"]:
        """What each of the symbols costs."""
        return -np.log2(self.counts / self.counts.sum())[symbols]


class Writer:
    """Symbols in, bytes out."""

    def __init__(self) -> None:
        self.coder = coding.RangeEncoder()

    def write(self, symbols: Int[np.ndarray, " m"], model: Any) -> None:
        """Codes `symbols` with one distribution of the library."""
        self.coder.encode(np.ascontiguousarray(symbols, np.int32), model)

    def write_levels(
        self,
        levels: Int[np.ndarray, " m"],
        means: Float64[np.ndarray, " m"],
        deviations: Float64[np.ndarray, " m"],
    ) -> None:
        """Codes levels of 0, ..., 255, each by its own Gaussian in bins (Eq. 13)."""
        self.coder.encode(np.ascontiguousarray(levels, np.int32), LEVELS, means, deviations)

    @property
    def bits(self) -> int:
        """About so many were written, by words of 32."""
        return self.coder.num_bits()

    def bytes(self) -> bytes:
        """All that was written; zeros at the end are left out."""
        return self.coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")


class Reader:
    """Bytes in, symbols out."""

    def __init__(self, data: bytes):
        # A reader looks a word ahead; zeros at the end were left out.
        padded = data + bytes(-len(data) % 4 + 8)
        self.coder = coding.RangeDecoder(np.frombuffer(padded, "<u4").astype(np.uint32))

    def read_levels(
        self, means: Float64[np.ndarray, " m"], deviations: Float64[np.ndarray, " m"]
    ) -> Integer[np.ndarray, " m"]:
        """The next levels, of these Gaussians. Raises UserError as `read` does."""
        return self._decoded(LEVELS, means, deviations)

    def read(self, model: Any, count: int) -> Integer[np.ndarray, " m"]:
        """The next `count` symbols. Raises UserError if the bytes are none of a Writer's."""
        return self._decoded(model, count)

    def _decoded(self, *of_what) -> np.ndarray:
        try:
            return np.asarray(self.coder.decode(*of_what), np.int64)
        except AssertionError as error:
            raise UserError("file: holds numbers that nothing wrote") from error


def split_number(numbers: Int[np.ndarray, " m"]) -> tuple[np.ndarray, np.ndarray]:
    """(the bits that number + 1 has after its first, what these bits say)."""
    above = np.asarray(numbers, np.int64) + 1
    lengths = np.frexp(above.astype(np.float64))[1] - 1
    return lengths.astype(np.int64), above - (1 << lengths.astype(np.int64))


def write_numbers(writer: Writer, numbers: Int[np.ndarray, " m"], lengths: Counts) -> None:
    """Codes numbers from 0 on: their lengths by how often these occurred, then their bits."""
    of_each, rests = split_number(numbers)
    if of_each.size:
        writer.write(of_each, lengths.model)
    for length in np.unique(of_each[of_each > 0]):
        writer.write(rests[of_each == length], models.Uniform(1 << int(length)))


def read_numbers(reader: Reader, count: int, lengths: Counts) -> Integer[np.ndarray, " m"]:
    """The next `count` numbers."""
    if not count:
        return np.zeros(0, np.int64)
    of_each = reader.read(lengths.model, count)
    rests = np.zeros(count, np.int64)
    for length in np.unique(of_each[of_each > 0]):
        these = of_each == length
        rests[these] = reader.read(models.Uniform(1 << int(length)), int(these.sum()))
    return (1 << of_each) + rests - 1
