"""A source whose images are in the model's units."""

import dataclasses
import hashlib
from collections.abc import Callable

import numpy as np

from ddpm_jax.config import Data
from ddpm_jax.data.scaling import Scaling
from ddpm_jax.data.sources import Source


def scaled(source: Source, data: Data) -> Source:
    """`source` with its values as the model takes them, float32; levels stay as they are.

    `data` says how (see `Scaling`). Reading raises UserError for values that it does not allow.
    """
    if data.value_kind.levels:
        return source
    words = f"{data.values} {data.offset} {data.scale} {data.nonfinite}"
    units = hashlib.blake2b(words.encode(), digest_size=8).hexdigest()
    return dataclasses.replace(source, read=_Scaled(source.read, Scaling(data)), units=units)


def as_source(values: np.ndarray, data: Data) -> np.ndarray:
    """Images of the data's own values [...,H,W,C] as a scaled Source reads them."""
    return values if data.value_kind.levels else np.asarray(Scaling(data).from_data(values))


@dataclasses.dataclass(frozen=True)
class _Scaled:
    """Maps indices to images in the model's units. It can be sent to other processes."""

    read: Callable[[np.ndarray], np.ndarray]
    scaling: Scaling

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        return np.asarray(self.scaling.from_data(self.read(indices)))
