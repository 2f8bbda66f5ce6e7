"""Between the data's own numbers and the model's units: value = offset + scale * x."""

import dataclasses
from typing import NamedTuple

import numpy as np

from ddpm_jax.config import Data
from ddpm_jax.data.images import as_read, to_float
from ddpm_jax.errors import UserError
from ddpm_jax.shapes import Array, Float, Float32, Shaped


class Unit(NamedTuple):
    """What the errors of images are given in."""

    size: float
    """How large the model's unit is in it."""
    words: str
    """For example "of 255"."""


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How the numbers of images [...,H,W,C] become those that the model works with, and back.

    Raises UserError if `data` names statistics that were not measured yet.
    """

    data: Data

    def __post_init__(self) -> None:
        if self.data.value_kind.measured and not self.data.scale:
            raise UserError(
                f"data.values: where {self.data.values} puts the model's units is measured on the "
                "training images, which are not read here; give data.offset and data.scale"
            )

    @property
    def dtype(self) -> np.dtype:
        """The type of the data's numbers."""
        kind = self.data.value_kind
        return np.dtype(kind.kind if kind.levels else self.data.dtype or "float32")

    @property
    def offset(self) -> np.ndarray:
        """float64 [1 or C]: the value that is 0 to the model."""
        low, high = self._ends()
        return np.array(self.data.offset or [(low + high) / 2])

    @property
    def scale(self) -> np.ndarray:
        """float64 [1 or C]: how far from the offset the value lies that is 1 to the model."""
        low, high = self._ends()
        return np.array(self.data.scale or [(high - low) / 2])

    @property
    def unit(self) -> Unit:
        """That of errors: levels, or the data's own; where channels differ, the model's."""
        kind = self.data.value_kind
        if kind.levels:
            return Unit((kind.levels - 1) / 2, f"of {kind.levels - 1}")
        if len(self.scale) == 1:
            return Unit(float(self.scale[0]), "in the data's units")
        return Unit(1.0, "in the model's units")

    def _ends(self) -> tuple[float, float]:
        kind = self.data.value_kind
        if kind.levels:
            return 0.0, kind.levels - 1.0
        return kind.low or 0.0, kind.high or 0.0

    def from_data(self, values: Shaped[Array, "*shape"]) -> Float32[Array, "*shape"]:
        """Images [...,H,W,C] in the model's units: x = (value - offset) / scale.

        With quantiles they are cut off at -1 and 1. NaNs and infinities are replaced as
        data.nonfinite says. Raises UserError for values that are not finite, or lie outside the
        range.
        """
        kind = self.data.value_kind
        if kind.levels:
            return self._from_levels(values)
        found = np.asarray(values)
        if found.dtype.kind not in "buif":
            raise UserError(f"values: must be an array of numbers, got {found.dtype}")
        self._check_channels(found)
        x = (np.float64(found) - self.offset) / self.scale
        lost = ~np.isfinite(x)
        if lost.any():
            x = np.where(lost, self._replacement(int(lost.sum())), x)
        if kind.kind == "quantiles":
            x = np.clip(x, -1, 1)
        if kind.kind == "range" and x.size and np.abs(x).max() > 1 + 1e-6:
            raise UserError(
                outside(self.data, float(found[~lost].min()), float(found[~lost].max()))
            )
        return x.astype(np.float32)

    def _from_levels(self, values):
        dtype = getattr(values, "dtype", None)
        if dtype != self.dtype:
            raise UserError(
                f"values: must be an array of {self.dtype}, as data.values says, got {dtype}"
            )
        self._check_channels(values)
        return to_float(values)

    def _replacement(self, count: int) -> np.ndarray:
        """What stands for a number that is not finite, [1 or C]."""
        if self.data.nonfinite == "refuse":
            raise UserError(not_finite(count))
        if self.data.nonfinite == "zero":
            return -self.offset / self.scale
        return np.zeros(1)

    def _check_channels(self, values) -> None:
        channels = self.data.image_shape[2]
        if values.ndim and values.shape[-1] == channels:
            return
        raise UserError(
            f"values: must be [..., {channels}], the channels last, got {list(values.shape)}"
        )

    def to_data(self, x: Float[Array, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
        """Images [...,H,W,C] in the model's units as the data's own numbers, of the data's type.

        Whole numbers are rounded to the nearest, and cut off where their type ends. Raises
        UserError for images that are not finite.
        """
        x = np.asarray(x)
        if not np.isfinite(x).all():
            raise UserError("x: some numbers are not finite, so no value stands for them")
        if self.data.value_kind.levels:
            return as_read(x, self.data.value_kind.levels)
        self._check_channels(x)
        values = self.offset + self.scale * np.float64(x)
        if self.dtype == np.bool_:
            return values >= 0.5
        if self.dtype.kind in "iu":
            limits = np.iinfo(self.dtype)
            values = np.clip(np.rint(values), limits.min, limits.max)
        return values.astype(self.dtype)


def not_finite(count: int) -> str:
    """The complaint about `count` numbers that are NaN or infinite."""
    return (
        f"data: {count:,} numbers are NaN or infinite; repair them, or choose --data.nonfinite "
        "zero or centre"
    )


def outside(data: Data, low: float, high: float) -> str:
    """The complaint about values from `low` to `high`, which are not all in the range."""
    return (
        f"data: the values are from {low:g} to {high:g}, but data.values is {data.values}; "
        "widen the range, or choose quantiles, which cut values off"
    )
