"""The chain that a sender chooses for what is asked of it."""

from typing import NamedTuple

import numpy as np

from ddpm_jax.calibration import Calibration
from ddpm_jax.calls.batches import batches
from ddpm_jax.compression.chain import groups_for, path, path_costs, steps_of
from ddpm_jax.compression.codec import Setting
from ddpm_jax.compression.draws import starts
from ddpm_jax.compression.format import Head
from ddpm_jax.compression.lossless import Pixels
from ddpm_jax.compression.network import Network, picture
from ddpm_jax.compression.numbers import Writer
from ddpm_jax.data.images import to_float
from ddpm_jax.errors import UserError
from ddpm_jax.samplers import time_grid
from ddpm_jax.schedule import Schedule
from ddpm_jax.shapes import Float32, Float64, Int32, UInt8

MOST_ASKED = 64
"""So many images say at which step the asked error is reached."""

TRIED = 16
"""Steps that the lossless layer is tried from."""

TO_SPARE = 1.2
"""The chain for a number of bits is planned for so many times as many, and then cut off."""

LAYER_BITS = 32.0
"""About what the length, the checksum and the end of a layer take."""

IMAGE_BITS = 0.5
"""About what an image's level takes in one step."""


class Paths(NamedTuple):
    """The cheapest chains to every step."""

    bits: Float64[np.ndarray, " T"]
    """Expected bits of an image."""
    before: Int32[np.ndarray, " T"]

    def to(self, end: int) -> tuple[int, ...]:
        """The chain that ends at the step `end`, or one before T - 1."""
        end = min(end, len(self.before) - 2)
        return tuple(path(self.before, end).tolist())


def paths(
    schedule: Schedule,
    calibration: Calibration,
    image_shape: tuple[int, int, int],
    images: int,
    group_bits: float,
) -> Paths:
    """The cheapest chains for so many images. Raises UserError for a process of one step."""
    if schedule.num_timesteps < 2:
        raise UserError("compression: needs a model of two or more steps, and this one has one")
    dimensions = int(np.prod(image_shape))
    step_bits = IMAGE_BITS + LAYER_BITS / images
    return Paths(*path_costs(schedule, calibration.mse, dimensions, group_bits, step_bits))


class Some:
    """A few of the images, by which the sender finds out where to end."""

    def __init__(
        self, network: Network, images: UInt8[np.ndarray, "n h w c"], batch_size: int | None
    ):
        """The first MOST_ASKED of `images`, or as many as a batch holds."""
        n = min(len(images), MOST_ASKED)
        rows, self.count = next(batches(n, batch_size, network.mesh))
        self.schedule = network.ddpm.schedule
        self.batch = images[rows]
        self.noise = starts(0, rows, network.ddpm.image_shape)
        self.predict = network.of(rows).predictor(tuple(range(self.schedule.num_timesteps)))

    @property
    def images(self) -> UInt8[np.ndarray, "n h w c"]:
        """These images."""
        return self.batch[: self.count]

    def predicted(self, t: int) -> Float32[np.ndarray, "n h w c"]:
        """The x_0 that is predicted from the images with noise of step t (Eq. 4)."""
        of_x_0 = np.float32(self.schedule.sqrt_alphas_bar[t])
        of_noise = np.float32(self.schedule.sqrt_one_minus_alphas_bar[t])
        x_t = of_x_0 * np.asarray(to_float(self.batch)) + of_noise * self.noise
        return self.predict(x_t, t)[: self.count]


def end_for_rmse(some: Some, rmse: float) -> int:
    """The highest step whose predicted x_0 is within `rmse` of 255 of the images.

    Found by halving. Raises UserError if even step 0 is not.
    """

    def error_at(t: int) -> float:
        errors = rmse_of(picture(some.predicted(t)), some.images)
        return float(np.sqrt(np.square(errors).mean()))

    if error_at(0) > rmse:
        raise UserError(
            f"rmse: this model comes to {error_at(0):.2f} at its last step; choose more, or take "
            "lossless"
        )
    low = 0
    high = some.schedule.num_timesteps - 1
    while low < high:
        middle = (low + high + 1) // 2
        if error_at(middle) <= rmse:
            low = middle
        else:
            high = middle - 1
    return low


def end_for_bits(found: Paths, bits: float) -> int:
    """The lowest step that so many bits an image suffice for."""
    return int(np.argmax(found.bits <= bits))


def end_for_lossless(some: Some, found: Paths) -> int:
    """The step from which the lossless layer takes over at the fewest bits in all.

    Tried are TRIED steps of the chain to step 0, each with a lossless layer of these images.
    """
    chain = np.array(found.to(0))
    tried = chain[time_grid(len(chain), min(TRIED, len(chain)))]

    def bits_at(t: int) -> float:
        writer = Writer()
        pixels = Pixels()
        for image, mean in zip(some.images, some.predicted(t), strict=True):
            pixels.write(writer, image, mean)
        return float(found.bits[t] + writer.bits / some.count)

    return int(min(tried, key=bits_at))


def setting_of(head: Head, schedule: Schedule, calibration: Calibration) -> Setting:
    """What both sides know from the head and the calibration."""
    steps = steps_of(schedule, calibration, np.array(head.timesteps), head.image_shape)
    return Setting(head.image_shape, head.seed, 2**head.candidates, tuple(steps), head.groups)


def expected_groups(
    schedule: Schedule,
    calibration: Calibration,
    timesteps: tuple[int, ...],
    image_shape: tuple[int, int, int],
    group_bits: float,
) -> tuple[int, ...]:
    """Of each step, from noise to the image."""
    steps = steps_of(schedule, calibration, np.array(timesteps), image_shape)
    return tuple(int(groups_for(np.array(step.bits), group_bits)) for step in steps)


def rmse_of(
    pictures: UInt8[np.ndarray, "n h w c"], images: UInt8[np.ndarray, "n h w c"]
) -> Float64[np.ndarray, " n"]:
    """The root mean squared error of each image, of 255."""
    errors = np.square(pictures.astype(np.float64) - images)
    return np.sqrt(errors.mean(axis=(1, 2, 3)))
