"""Images into a file whose every prefix decodes."""

from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax.calls.batches import batches
from ddpm_jax.calls.conditions import conditions
from ddpm_jax.calls.inputs import check_count, checked_params
from ddpm_jax.compression.checks import calibration_of, digests_of, generator_check
from ddpm_jax.compression.codec import Sent, Setting, send
from ddpm_jax.compression.format import MOST_IMAGES, Head, head_bytes, layer_bytes
from ddpm_jax.compression.layers import Layers
from ddpm_jax.compression.lossless import Pixels
from ddpm_jax.compression.network import Network, picture
from ddpm_jax.compression.numbers import Writer
from ddpm_jax.compression.plan import (
    TO_SPARE,
    Some,
    end_for_bits,
    end_for_lossless,
    end_for_rmse,
    expected_groups,
    paths,
    rmse_of,
    setting_of,
)
from ddpm_jax.data.images import to_float
from ddpm_jax.devices.mesh import mesh_of
from ddpm_jax.devices.segments import Progress, moving
from ddpm_jax.errors import UserError, shown
from ddpm_jax.shapes import Float64, PyTree, UInt8

GROUP_BITS = 12
"""Bits that a group shall hold."""

MORE_CANDIDATES = 6
"""A group of b bits is searched among 2^(b + MORE_CANDIDATES) candidates."""

LEAST_GROUP_BITS = 4
MOST_GROUP_BITS = 16


class Asked(NamedTuple):
    """What is asked of a file, as in `compress`."""

    labels: Any = None
    rmse: float | None = None
    bits_per_dim: float | None = None
    lossless: bool = False
    seed: int = 0
    group_bits: int = GROUP_BITS
    batch_size: int | None = None
    progress: Progress = False


class Compressed(NamedTuple):
    """A file, and what became of each image."""

    data: bytes
    bits: Float64[np.ndarray, " n"]
    """Of each image in all layers; the head, checksums and lengths of layers come on top."""
    rmse: Float64[np.ndarray, "l n"]
    """Of 255, of the picture x_0 that the head gives, and then that after each layer."""
    ends: tuple[int, ...]
    """Where the head ends, and then each layer, in bytes."""


def compress(
    ddpm: Any,
    params: PyTree,
    images: UInt8[np.ndarray, "n h w c"],
    *,
    labels: Any = None,
    rmse: float | None = None,
    bits_per_dim: float | None = None,
    lossless: bool = False,
    seed: int = 0,
    group_bits: int = GROUP_BITS,
    batch_size: int | None = None,
    progress: Progress = False,
) -> bytes:
    """A file of `images` uint8 [N,H,W,C], any prefix of which `decompress` makes pictures of.

    Algorithm 3 (Ho et al. 2020), with relative entropy coding; `ddpm` needs a calibration.

    - `labels`: the images' classes, as in `DDPM.sample`; they are kept in the file
    - `rmse`: the file ends where the mean error is about so many of 255 levels
    - `bits_per_dim`: ... where the file would have more bits for each dimension of the images
    - `lossless`: a last layer makes the images exact; without any of these the file ends where the
      process does
    - `group_bits`: bits that a number tells: more take longer and make smaller files, 4 to 16

    The other arguments are as in `DDPM.sample`. Raises UserError for what does not fit.
    """
    asked = Asked(labels, rmse, bits_per_dim, lossless, seed, group_bits, batch_size, progress)
    return compressed(ddpm, params, images, asked).data


def compressed(
    ddpm: Any, params: PyTree, images: UInt8[np.ndarray, "n h w c"], asked: Asked
) -> Compressed:
    """As `compress`, with what became of each image."""
    images = checked_pictures(images, ddpm.image_shape)
    _check(asked)
    params = checked_params(params, ddpm.shapes)
    mesh = mesh_of(params)
    network = Network(ddpm, params, mesh, conditions(ddpm.config.model, asked.labels, len(images)))
    head = _head(network, images, asked)
    setting = setting_of(head, ddpm.schedule, calibration_of(ddpm))
    todo = list(batches(len(images), asked.batch_size, mesh))
    with moving(asked.progress, len(todo) * (len(setting.steps) + 1), "compressing") as move:
        sent = _sent(network, setting, head, images, todo, asked.group_bits, move)
    most_bytes = None if asked.bits_per_dim is None else asked.bits_per_dim * images.size / 8
    return _written(head, sent, most_bytes)


class _Sent(NamedTuple):
    """What is known of all images once they are sent."""

    steps: list[Sent]
    rmse: Float64[np.ndarray, "s n"]
    """Of the picture after 0, 1, ... steps."""
    exact: bytes
    """The lossless layer."""
    exact_bits: Float64[np.ndarray, " n"]


def _sent(network, setting: Setting, head: Head, images, todo, group_bits, move) -> _Sent:
    """Sends the images, a batch at a time."""
    S = len(setting.steps)
    levels: list[list[np.ndarray]] = [[] for _ in range(S)]
    numbers: list[list[np.ndarray]] = [[] for _ in range(S)]
    rmse = np.empty((S + 1, len(images)))
    writer = Writer()
    pixels = Pixels()
    exact_bits = np.zeros(len(images))
    for rows, count in todo:
        predict = network.of(rows).predictor(head.timesteps)
        batch = images[rows]
        kept = rows[:count]
        sending = send(setting, predict, rows, np.asarray(to_float(batch)), group_bits)
        for number, (predicted, of_step) in enumerate(sending):
            rmse[number, kept] = rmse_of(picture(predicted), batch)[:count]
            if of_step is not None:
                levels[number].append(of_step.levels[:count])
                numbers[number] += of_step.numbers[:count]
            elif head.lossless:
                for row, image, mean in zip(kept, batch, predicted, strict=False):
                    before = writer.bits
                    pixels.write(writer, image, mean)
                    exact_bits[row] = writer.bits - before
            move(1)
    steps = [Sent(np.concatenate(levels[i]), numbers[i]) for i in range(S)]
    return _Sent(steps, rmse, writer.bytes(), exact_bits)


def _written(head: Head, sent: _Sent, most_bytes: float | None) -> Compressed:
    """The file, of at most so many bytes."""
    data = head_bytes(head)
    ends = [len(data)]
    if most_bytes is not None and len(data) > most_bytes:
        raise UserError(
            f"bits_per_dim: the file's head alone takes {len(data)} bytes; choose more, or "
            "compress more images at once"
        )
    count = len(sent.rmse[0])
    coding = Layers(count, head.candidates, int(np.prod(head.image_shape)))
    bits = np.zeros(count)
    for of_step in sent.steps:
        payload, of_images = coding.write(of_step)
        layer = layer_bytes(payload)
        if most_bytes is not None and len(data) + len(layer) > most_bytes:
            return Compressed(data, bits, sent.rmse[: len(ends)], tuple(ends))
        data += layer
        ends.append(len(data))
        bits += of_images
    rmse = sent.rmse
    if head.lossless:
        data += layer_bytes(sent.exact)
        ends.append(len(data))
        bits += sent.exact_bits
        rmse = np.concatenate([rmse, np.zeros((1, count))])
    return Compressed(data, bits, rmse, tuple(ends))


def _head(network: Network, images, asked: Asked) -> Head:
    """What the file begins with: the chain that fits what is asked for."""
    ddpm = network.ddpm
    calibration = calibration_of(ddpm)
    shape = ddpm.image_shape
    found = paths(ddpm.schedule, calibration, shape, len(images), asked.group_bits)
    end = 0
    if asked.rmse is not None:
        end = end_for_rmse(Some(network, images, asked.batch_size), asked.rmse)
    elif asked.bits_per_dim is not None:
        end = end_for_bits(found, TO_SPARE * asked.bits_per_dim * np.prod(shape))
    elif asked.lossless:
        end = end_for_lossless(Some(network, images, asked.batch_size), found)
    timesteps = found.to(end)
    labels = network.condition.labels
    return Head(
        digests=digests_of(ddpm, network.params),
        generator=generator_check(asked.seed),
        image_shape=shape,
        count=len(images),
        seed=asked.seed,
        candidates=asked.group_bits + MORE_CANDIDATES,
        timesteps=timesteps,
        groups=expected_groups(ddpm.schedule, calibration, timesteps, shape, asked.group_bits),
        labels=None if labels is None else tuple(np.asarray(labels).tolist()),
        lossless=asked.lossless,
    )


def _check(asked: Asked) -> None:
    given = [asked.rmse is not None, asked.bits_per_dim is not None, bool(asked.lossless)]
    if sum(given) > 1:
        raise UserError("rmse, bits_per_dim, lossless: exclude each other; give one of them")
    for name, value in (("rmse", asked.rmse), ("bits_per_dim", asked.bits_per_dim)):
        if value is not None and not (isinstance(value, Real) and 0 < value < np.inf):
            raise UserError(f"{name}: must be above 0 and finite, got {shown(value)}")
    check_count("seed", asked.seed)
    whole = check_count("group_bits", asked.group_bits)
    if not LEAST_GROUP_BITS <= whole <= MOST_GROUP_BITS:
        raise UserError(
            f"group_bits: must be from {LEAST_GROUP_BITS} to {MOST_GROUP_BITS}, got {whole}"
        )


def checked_pictures(images: Any, image_shape: tuple[int, int, int]) -> np.ndarray:
    """`images` as uint8 [N,H,W,C] of a model's shape. Raises UserError if they are not."""
    array = np.asarray(images)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != tuple(image_shape):
        raise UserError(
            f"images: must be uint8 [N, {', '.join(map(str, image_shape))}], got {array.dtype} "
            f"{list(array.shape)}"
        )
    if not 1 <= len(array) <= MOST_IMAGES:
        raise UserError(f"images: must be from 1 to {MOST_IMAGES}, got {len(array)}")
    return array
