"""How many groups each image's step is divided into: little side information, kept rarely changed.

An image may be harder or easier than the calibration's mean. Its level says by how many half
octaves, and is sent for each step as the difference to the step before.
"""

import numpy as np

from ddpm_jax.compression.numbers import Counts
from ddpm_jax.shapes import Float, Integer

MOST = 16
"""Levels are from -MOST to MOST: from a 256th of the expected number of groups to 256 times."""

RATIOS = np.rint(2.0 ** (np.arange(-MOST, MOST + 1) / 2) * 2**16).astype(np.int64)
"""Of each level, in units of 2^-16."""

STAYS = 16
"""How many times likelier than others the difference 0 is taken to be before any is seen."""

HIGH = 1.25
LOW = 0.5
"""A level stays while its groups have between LOW and HIGH times the bits that they should."""


def groups_at(
    nominal: int, levels: Integer[np.ndarray, " b"], dimensions: int
) -> Integer[np.ndarray, " b"]:
    """The number of groups [B] at these levels, where `nominal` are expected."""
    groups = (nominal * RATIOS[levels + MOST] + 2**15) >> 16
    return np.clip(groups, 1, dimensions)


def next_levels(
    bits: Float[np.ndarray, " b"],
    nominal: int,
    group_bits: float,
    before: Integer[np.ndarray, " b"],
    dimensions: int,
) -> Integer[np.ndarray, " b"]:
    """The levels of images whose KL divergences in this step are `bits`."""
    of_each = bits / groups_at(nominal, before, dimensions)
    stays = (of_each <= HIGH * group_bits) & (of_each >= LOW * group_bits)
    wanted = np.maximum(bits / group_bits, 1e-9)
    nearest = np.rint(2 * np.log2(wanted / nominal))
    nearest = np.clip(nearest, -MOST, MOST).astype(np.int64)
    # Where there is one group anyway, another level would say nothing.
    idle = groups_at(nominal, before, dimensions) == groups_at(nominal, nearest, dimensions)
    return np.where(stays | idle, before, nearest)


def differences() -> Counts:
    """What the differences of levels are coded with, which are 0, ..., 4 MOST after `coded`."""
    first = np.ones(4 * MOST + 1, np.int64)
    first[2 * MOST] = STAYS
    first[2 * MOST - 1] = STAYS // 4
    first[2 * MOST + 1] = STAYS // 4
    return Counts(first)
