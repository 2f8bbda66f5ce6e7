"""Pictures for the eye, of images of any values and channels."""

import dataclasses

import numpy as np

from ddpm_jax.config import Data
from ddpm_jax.data.images import to_uint8
from ddpm_jax.data.scaling import Scaling
from ddpm_jax.errors import UserError
from ddpm_jax.shapes import Array, Float, UInt8

DEVIATIONS = 3.0
"""How many deviations from the mean black and white are, where values have no bounds."""


@dataclasses.dataclass(frozen=True)
class View:
    """Makes uint8 pictures of images in the model's units.

    Raises UserError for a channel that the images do not have.
    """

    data: Data
    channels: tuple[int, ...] | None = None
    """The channels that are shown, counted from 1; None for all."""

    def __post_init__(self) -> None:
        there = self.data.image_shape[2]
        for channel in self.channels or ():
            if not 1 <= channel <= there:
                raise UserError(
                    f"channels: these images have the channels 1 to {there}, got {channel}"
                )

    def __call__(self, x: Float[Array, "*shape"]) -> UInt8[np.ndarray, "*picture"]:
        """The pictures of images x [...,H,W,C]. Those of 8-bit images are their own levels."""
        x = self.of_channels(np.asarray(x))
        return to_uint8(x if self.data.value_kind.bounded else x / DEVIATIONS)

    def of_channels(self, images: np.ndarray) -> np.ndarray:
        """Those channels of images [...,H,W,C] that are shown."""
        if self.channels is None:
            return images
        return images[..., np.array(self.channels) - 1]

    @property
    def words(self) -> str:
        """How the values became greys; empty for 8-bit images, whose levels are shown."""
        if self.data.value_kind.kind == "uint8":
            return ""
        scaling = Scaling(self.data)
        reach = 1.0 if self.data.value_kind.bounded else DEVIATIONS
        ends = scaling.offset + reach * scaling.scale * np.array([[-1.0], [1.0]])
        if ends.shape[1] > 1:
            ends = self.of_channels(ends)
        black, white = (", ".join(f"{each:.5g}" for each in row) for row in ends)
        return f"black is {black} and white {white}"
