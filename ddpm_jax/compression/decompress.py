"""Pictures from a file, or from any prefix of it."""

from typing import Any, Literal, get_args

import numpy as np

from ddpm_jax.calls.batches import batches
from ddpm_jax.calls.conditions import conditions
from ddpm_jax.calls.inputs import checked_params
from ddpm_jax.compression.checks import calibration_of, check_claim, check_head
from ddpm_jax.compression.codec import Sent, receive
from ddpm_jax.compression.format import Head, read_head, read_layers
from ddpm_jax.compression.layers import Layers
from ddpm_jax.compression.lossless import Pixels
from ddpm_jax.compression.network import Network
from ddpm_jax.compression.network import picture as as_picture
from ddpm_jax.compression.numbers import Reader
from ddpm_jax.compression.plan import setting_of
from ddpm_jax.devices.mesh import mesh_of
from ddpm_jax.devices.segments import Progress, moving
from ddpm_jax.diffusion import unknown
from ddpm_jax.errors import UserError
from ddpm_jax.shapes import PyTree, UInt8

Picture = Literal["x_0", "flow"]
"""x_0 has the least squared error; flow looks like an image of the data."""


def decompress(
    ddpm: Any,
    params: PyTree,
    data: bytes,
    *,
    picture: Picture = "x_0",
    batch_size: int | None = None,
    progress: Progress = False,
) -> UInt8[np.ndarray, "n h w c"]:
    """The images uint8 [N,H,W,C] of a file of `compress`, or of a prefix that holds its head.

    Algorithm 4 (Ho et al. 2020). `picture` is what is made of x_t where the file ends: the
    predicted x_0 (Eq. 15), or what DDIM draws from there; where a lossless layer is whole, the
    exact images. The other arguments are as in `DDPM.sample`. Raises UserError for a file that is
    damaged, or of another model, before any work.
    """
    if picture not in get_args(Picture):
        raise unknown("picture", picture, Picture)
    params = checked_params(params, ddpm.shapes)
    if not isinstance(data, bytes | bytearray):
        raise UserError(f"data: must be the bytes of a file, got {type(data).__name__}")
    data = bytes(data)
    head, start = read_head(data)
    check_head(head, ddpm, params)
    layers = read_layers(data, start, head.num_layers)
    check_claim(head, layers)
    mesh = mesh_of(params)
    network = Network(ddpm, params, mesh, conditions(ddpm.config.model, head.labels, head.count))
    setting = setting_of(head, ddpm.schedule, calibration_of(ddpm))
    steps = read_steps(head, layers[: len(head.groups)])
    exact = layers[len(head.groups) :]
    images = np.empty((head.count, *head.image_shape), np.uint8)
    todo = list(batches(head.count, batch_size, mesh))
    pixels = Pixels()
    reader = Reader(exact[0]) if exact else None
    with moving(progress, len(todo) * (len(steps) + 1), "decompressing") as move:
        for rows, count in todo:
            some = network.of(rows)
            of_rows = [
                Sent(sent.levels[rows], [sent.numbers[row] for row in rows]) for sent in steps
            ]
            predict = some.predictor(head.timesteps)
            x_t = receive(setting, predict, rows, of_rows, move)
            index = len(head.groups) - len(steps)
            if reader is not None:
                means = predict(x_t, index)
                for row, mean in zip(rows[:count], means, strict=False):
                    images[row] = pixels.read(reader, mean)
            else:
                images[rows[:count]] = _pictures(some, head, predict, picture, x_t, index)[:count]
            move(1)
    return images


def _pictures(network, head, predict, kind, x_t, index) -> np.ndarray:
    if kind == "x_0":
        return as_picture(predict(x_t, index))
    return as_picture(network.flow(x_t, head.timesteps[index]))


def read_steps(head: Head, layers: list[bytes]) -> list[Sent]:
    """What the layers of steps say. Raises UserError for one that `compress` did not write."""
    coding = Layers(head.count, head.candidates, int(np.prod(head.image_shape)))
    return [coding.read(layer, groups) for layer, groups in zip(layers, head.groups, strict=False)]
