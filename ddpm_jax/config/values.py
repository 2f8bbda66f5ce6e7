"""The words of `data.values`: which numbers the data hold, and how they become the model's."""

import math
from typing import NamedTuple

from ddpm_jax.errors import UserError, shown

LEVELS = {"uint8": 256, "uint16": 65_536}
"""Values with a fixed number of levels."""

WITH_ENDS = ("range", "quantiles")
"""Values that are named with two numbers."""

STANDARDISE = "standardise"

CHOICES = "uint8, uint16, range LOW HIGH, quantiles LOW HIGH or standardise"


class Values(NamedTuple):
    """What `data.values` says."""

    kind: str
    """uint8, uint16, range, quantiles or standardise."""
    low: float | None = None
    """Of a range or of quantiles."""
    high: float | None = None

    @property
    def levels(self) -> int | None:
        """How many levels there are; None for continuous values."""
        return LEVELS.get(self.kind)

    @property
    def bounded(self) -> bool:
        """Whether the values lie in [-1, 1] in the model's units."""
        return self.kind != STANDARDISE

    @property
    def measured(self) -> bool:
        """Whether the training images say where the model's units lie."""
        return self.kind in ("quantiles", STANDARDISE)


def parse_values(text: str) -> Values:
    """The Values of "uint8", "range 0 1.5" or the like. Raises UserError for other words."""
    kind, *words = text.split() or [""]
    wanted = 2 if kind in WITH_ENDS else 0
    known = kind in LEVELS or kind in WITH_ENDS or kind == STANDARDISE
    if not known or len(words) != wanted:
        raise UserError(f"data.values: must be {CHOICES}, got {shown(text)}")
    if not words:
        return Values(kind)
    low, high = _numbers(kind, words)
    if not low < high:
        raise UserError(f"data.values: {kind} needs LOW below HIGH, got {low:g} and {high:g}")
    if kind == "quantiles" and not 0 <= low < high <= 1:
        raise UserError(
            f"data.values: quantiles are from 0 to 1, got {low:g} and {high:g}; for values between "
            "two numbers choose range"
        )
    return Values(kind, low, high)


def _numbers(kind: str, words: list[str]) -> list[float]:
    try:
        numbers = [float(word) for word in words]
    except ValueError as error:
        raise UserError(
            f"data.values: {kind} needs two numbers, got {shown(' '.join(words))}"
        ) from error
    if not all(math.isfinite(number) for number in numbers):
        raise UserError(f"data.values: {kind} needs two finite numbers, got {' '.join(words)}")
    return numbers
