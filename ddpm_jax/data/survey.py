"""Looks through all values once: where the model's units lie, and whether the values are usable."""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from ddpm_jax.config import Data
from ddpm_jax.data.order_statistics import quantiles_of
from ddpm_jax.data.scaling import not_finite, outside
from ddpm_jax.data.sources import Source
from ddpm_jax.data.view import View
from ddpm_jax.errors import UserError

log = logging.getLogger(__name__)

BLOCK = 2**24
"""Bytes of images that are looked at together."""

DIGITS = 8
"""Significant digits of the statistics: sums differ in the last ones from machine to machine."""


def with_units(data: Data, source: Source, train: np.ndarray) -> Data:
    """`data` with its offset, scale and dtype, as found in the values of `source`.

    Statistics are those of the images `train` [M], over the finite values; each channel's own with
    data.per_channel. Values of a fixed number of levels need none, and nothing is read. Raises
    UserError for values that are not finite (see data.nonfinite), lie outside the range, or are all
    the same.
    """
    kind = data.value_kind
    if kind.levels:
        return data
    found = _look(data, source, train)
    if found.lost and data.nonfinite == "refuse":
        raise UserError(not_finite(found.lost))
    if found.lost:
        log.warning(
            "data: %s numbers are NaN or infinite; replaced as data.nonfinite %s says",
            f"{found.lost:,}",
            data.nonfinite,
        )
    if kind.kind == "range" and found.low <= found.high:
        assert kind.low is not None and kind.high is not None
        if found.low < kind.low or found.high > kind.high:
            raise UserError(outside(data, found.low, found.high))
    dtype: Any = data.dtype or str(source.read(train[:1]).dtype)
    if not kind.measured or data.scale:
        return dataclasses.replace(data, dtype=dtype)
    if kind.kind == "quantiles":
        low, high = _quantiles(data, source, train)
        offset = (low + high) / 2
        scale = (high - low) / 2
    else:
        offset = found.mean
        scale = found.deviation
    _check_varies(offset, scale)
    return dataclasses.replace(data, offset=_rounded(offset), scale=_rounded(scale), dtype=dtype)


def log_units(data: Data) -> None:
    """Says where the model's units lie, and how pictures of the values are made."""
    words = View(data).words
    if words:
        log.info("data: values %s; in pictures, %s", data.values, words)
    if data.value_kind.measured:
        log.info(
            "data: a value is %s + %s x for the model's x",
            _words(data.offset),
            _words(data.scale),
        )


@dataclasses.dataclass
class _Found:
    """What was seen of the values."""

    lost: int = 0
    """Numbers that are not finite."""
    low: float = np.inf
    high: float = -np.inf
    count: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(1))
    """[1 or C] of the training images' finite values: their number, mean and summed squares."""
    mean: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(1))
    squares: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(1))

    @property
    def deviation(self) -> np.ndarray:
        """[1 or C]: the standard deviation."""
        return np.sqrt(self.squares / np.maximum(self.count, 1))

    def add(self, rows: np.ndarray) -> None:
        """Adds values [M, 1 or C] to the moments, by the formula of Chan et al. (1979)."""
        finite = np.isfinite(rows)
        count = finite.sum(axis=0)
        known = np.where(finite, rows, 0.0)
        mean = known.sum(axis=0) / np.maximum(count, 1)
        squares = np.where(finite, np.square(known - mean), 0.0).sum(axis=0)
        both = np.maximum(self.count + count, 1)
        apart = mean - self.mean
        self.squares = self.squares + squares + np.square(apart) * self.count * count / both
        self.mean = self.mean + apart * count / both
        self.count = self.count + count


def _look(data: Data, source: Source, train: np.ndarray) -> _Found:
    """One look at all images, in their order."""
    found = _Found()
    of_train = np.zeros(len(source), bool)
    of_train[train] = True
    for places in _blocks(source):
        values = source.read(places)
        finite = np.isfinite(values)
        found.lost += int(values.size - finite.sum())
        if finite.any():
            known = values if finite.all() else values[finite]
            found.low = min(found.low, float(known.min()))
            found.high = max(found.high, float(known.max()))
        if data.value_kind.measured and not data.scale:
            found.add(_rows(data, values[of_train[places]]))
    return found


def _rows(data: Data, values: np.ndarray) -> np.ndarray:
    """Values [n,H,W,C] as float64 [M, 1 or C], a column for each thing that is measured."""
    columns = values.shape[-1] if data.per_channel else 1
    return np.float64(values).reshape(-1, columns)


def _blocks(source: Source, among: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """The places of images, or those of `among`, ascending, so many at a time as BLOCK says."""
    places = np.arange(len(source)) if among is None else np.sort(among)
    size = max(1, BLOCK // max(1, source.read(places[:1]).nbytes))
    for start in range(0, len(places), size):
        yield places[start : start + size]


def _quantiles(data: Data, source: Source, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values at the two quantiles, [1 or C] each."""
    kind = data.value_kind
    assert kind.low is not None and kind.high is not None

    def pieces() -> Iterator[np.ndarray]:
        for places in _blocks(source, train):
            yield _rows(data, source.read(places)).astype(np.float32)

    low, high = quantiles_of(pieces, [kind.low, kind.high])
    return low, high


def _check_varies(offset: np.ndarray, scale: np.ndarray) -> None:
    """Raises UserError for channels without two values."""
    for channel, (middle, width) in enumerate(zip(offset, scale, strict=True)):
        if np.isfinite(width) and width > 1e-7 * abs(middle) and width > 0:
            continue
        which = f"channel {channel + 1} is" if len(scale) > 1 else "they are"
        raise UserError(
            f"data.values: {which} {middle:g} everywhere, or nearly so, so there is nothing to "
            "scale; leave that out, or give data.offset and data.scale"
        )


def _rounded(numbers: np.ndarray) -> tuple[float, ...]:
    return tuple(float(f"{number:.{DIGITS}g}") for number in numbers)


def _words(numbers: tuple[float, ...]) -> str:
    """For example "3.5" or "[3.5, 7]"."""
    words = ", ".join(f"{number:g}" for number in numbers)
    return words if len(numbers) == 1 else f"[{words}]"
