"""What the steps say of all images, as the payloads of layers, and back."""

import numpy as np

from ddpm_jax.compression.codec import Sent
from ddpm_jax.compression.levels import MOST, differences, groups_at
from ddpm_jax.compression.numbers import (
    Counts,
    Reader,
    Writer,
    read_numbers,
    split_number,
    write_numbers,
)
from ddpm_jax.errors import UserError
from ddpm_jax.shapes import Float64, Integer

SURE = 2**20
"""More numbers than this take a bit or more each."""


class Layers:
    """Codes one step after another, from noise to the images; both sides hold equal ones."""

    def __init__(self, images: int, candidates: int, dimensions: int):
        """`candidates` is log2 of their number."""
        self.dimensions = dimensions
        self.levels = np.zeros(images, np.int64)
        self.differences = differences()
        self.lengths = Counts(np.ones(candidates + 1, np.int64))

    def write(self, sent: Sent) -> tuple[bytes, Float64[np.ndarray, " n"]]:
        """(the payload of a step, the bits that each image takes of it)."""
        writer = Writer()
        changes = sent.levels - self.levels + 2 * MOST
        writer.write(changes, self.differences.model)
        numbers = np.concatenate(sent.numbers)
        write_numbers(writer, numbers, self.lengths)
        lengths, _ = split_number(numbers)
        of_numbers = self.lengths.bits(lengths) + lengths
        ends = np.cumsum([each.size for each in sent.numbers])
        bits = np.add.reduceat(of_numbers, np.append(0, ends[:-1]))
        bits = bits + self.differences.bits(changes)
        self._learn(sent.levels, changes, lengths)
        return writer.bytes(), bits

    def read(self, payload: bytes, nominal: int) -> Sent:
        """What a step of `nominal` expected groups says.

        Raises UserError for a payload that `write` did not make.
        """
        _check_length(payload, self.levels.size)
        reader = Reader(payload)
        changes = reader.read(self.differences.model, self.levels.size)
        levels = self.levels + changes - 2 * MOST
        if np.abs(levels).max() > MOST:
            raise UserError("file: holds a level that nothing wrote; get the file again")
        counts = groups_at(nominal, levels, self.dimensions)
        _check_length(payload, int(counts.sum()))
        numbers = read_numbers(reader, int(counts.sum()), self.lengths)
        self._learn(levels, changes, split_number(numbers)[0])
        return Sent(levels, np.split(numbers, np.cumsum(counts)[:-1]))

    def _learn(
        self,
        levels: Integer[np.ndarray, " n"],
        changes: Integer[np.ndarray, " n"],
        lengths: Integer[np.ndarray, " m"],
    ) -> None:
        self.levels = levels
        self.differences.add(changes)
        self.lengths.add(lengths)


def _check_length(payload: bytes, numbers: int) -> None:
    """Raises UserError for a payload that so many numbers do not fit into."""
    if numbers > max(SURE, 8 * len(payload)):
        raise UserError("file: holds too few bytes for what it claims; get the file again")
