"""Whether a file is of this model, and this machine draws what the sender's drew."""

import struct
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.calibration import Calibration
from ddpm_jax.compression.format import DIGESTS, Head
from ddpm_jax.compression.gaussians import normals
from ddpm_jax.errors import UserError
from ddpm_jax.keys import CODEC, seed_key
from ddpm_jax.shapes import PyTree
from ddpm_jax.storage.run import digest

CHECKED = 64
"""Words and normals that are compared."""

SELF_CHECK = struct.Struct("<If")

SURE = 2**28
"""So many bytes of pictures a file without a layer is believed to hold."""

CLOSE = 1e-3
"""Sums of CHECKED normals differ by less on machines that draw the same."""


def calibration_of(ddpm: Any) -> Calibration:
    """The model's. Raises UserError if it has none."""
    if ddpm.levels != 256:
        raise UserError(
            "compression: is for 8-bit images, and this model's data.values are "
            f"{ddpm.config.data.values}; choose another model"
        )
    if ddpm.calibration is None:
        raise UserError(
            "compression: needs the model's calibration; make it with ddpm-jax calibrate RUN"
        )
    return ddpm.calibration


def digests_of(ddpm: Any, params: PyTree) -> dict[str, str]:
    """Hashes of the parameters, the process and the calibration."""
    calibration = calibration_of(ddpm)
    hashes = (digest(params), ddpm.process_digest, digest([calibration.mse, calibration.cells]))
    return dict(zip(DIGESTS, hashes, strict=True))


def generator_check(seed: int) -> bytes:
    """What the random generator draws from the key of `seed`: words, and the sum of normals."""
    key = jax.random.fold_in(seed_key(seed), CODEC)
    words = np.asarray(jax.random.bits(key, (CHECKED,), jnp.uint32)).astype("<u4")
    total = float(np.asarray(normals(key, CHECKED, 0), np.float64).sum())
    return SELF_CHECK.pack(zlib.crc32(words), total)


def check_head(head: Head, ddpm: Any, params: PyTree) -> None:
    """Raises UserError unless the file can be decoded by this model on this machine."""
    if head.image_shape != tuple(ddpm.image_shape):
        raise UserError(
            f"file: holds images of {list(head.image_shape)}, and this model's are "
            f"{list(ddpm.image_shape)}; name the model that compressed them"
        )
    for name, own in digests_of(ddpm, params).items():
        if head.digests[name] != own:
            raise UserError(
                f"file: was compressed by a model with another {WORDS[name]}; name that model"
            )
    _check_numbers(head, ddpm)
    words, total = SELF_CHECK.unpack(head.generator)
    own_words, own_total = SELF_CHECK.unpack(generator_check(head.seed))
    if words != own_words or not abs(total - own_total) < CLOSE:
        raise UserError(
            "file: the random generator here draws other numbers than the sender's; decode it "
            "with the version of jax that compressed it"
        )


def _check_numbers(head: Head, ddpm: Any) -> None:
    """Raises UserError for steps, groups or labels that this model has not."""
    labels = np.array(head.labels or (0,))
    for name, found, most in (
        ("steps", head.timesteps[-1], ddpm.schedule.num_timesteps - 1),
        ("groups of dimensions", max(head.groups), int(np.prod(head.image_shape))),
        ("labels", labels.max(), max(0, (ddpm.config.model.num_classes or 0) - 1)),
    ):
        if found > most:
            raise UserError(f"file: names {name} that this model has not; get the file again")


def check_claim(head: Head, layers: list[bytes]) -> None:
    """Raises UserError for a file that claims far more images than its bytes can tell of.

    A first layer takes more than a bit for each image.
    """
    told = 8 * len(layers[0]) if layers else 0
    if head.count * int(np.prod(head.image_shape)) > SURE and head.count > told:
        raise UserError(
            f"file: claims {head.count} images, and is too short for them; get more of it"
        )


WORDS = {
    "parameters": "weights",
    "process": "diffusion process",
    "calibration": "calibration",
}
"""What the digests are called in messages."""
