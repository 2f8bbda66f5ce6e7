"""A trained model into the formats of other programs."""

import dataclasses
import logging
from typing import Literal

from etils import epath

from ddpm_jax.config import Config
from ddpm_jax.ddpm import ANCESTRAL, DDPM, Sampler
from ddpm_jax.devices.mesh import fetch
from ddpm_jax.errors import UserError
from ddpm_jax.storage.files import path_of
from ddpm_jax.storage.run import Weights, versions
from ddpm_jax.weights.diffusers import write_diffusers
from ddpm_jax.weights.load import load_weights
from ddpm_jax.weights.single_file import write_single_file
from ddpm_jax.weights.stablehlo import write_stablehlo

log = logging.getLogger(__name__)

Format = Literal["safetensors", "diffusers", "stablehlo"]


def export(
    run: epath.PathLike,
    format: Format,
    out: epath.PathLike,
    weights: Weights | None = None,
    step: int | None = None,
    sampler: Sampler = ANCESTRAL,
) -> None:
    """Writes the model `run` to `out`, where nothing is yet: a .safetensors file, for the other formats a folder.

    safetensors is what `load` takes back, diffusers what that library's DDPMPipeline loads, stablehlo the sampler
    (drawing with `sampler`, which is of no use to the others) and the denoiser as programs that need jax
    alone. Raises UserError if `out` is there or has another kind of name, or the format cannot hold the model.
    """
    path = path_of(out)
    if (format == "safetensors") != (path.suffix == ".safetensors"):
        kind = (
            "a file, --out NAME.safetensors" if format == "safetensors" else "a folder, --out NAME"
        )
        raise UserError(f"out: {format} is written to {kind}; {out} is none")
    if path.exists() and not (
        path.is_dir() and not any(path.iterdir()) and format != "safetensors"
    ):
        raise UserError(f"out: {out} is there already; choose another --out or move it away")
    if format != "stablehlo" and sampler != ANCESTRAL:
        raise UserError(
            f"sampler: {format} holds weights alone; leave it, steps, eta and grid out or choose stablehlo"
        )
    model = load_weights(run, weights=weights, step=step)
    sampler.check(model.ddpm.config)
    ddpm, params = DDPM(_without_paths(model.ddpm.config)), fetch(model.params)
    about = {
        **{"weights": model.kind, "step": model.step, "parameters": model.label["parameters"]},
        **{"data_fingerprint": model.data_fingerprint, "versions": versions()},
    }
    if format == "safetensors":
        write_single_file(path, ddpm.config, params, about)
    elif format == "diffusers":
        write_diffusers(path, ddpm.config, params)
    else:
        write_stablehlo(path, ddpm, params, about, sampler)
    log.info("%s: %s (%s)", path, format, model.words)


def _without_paths(config: Config) -> Config:
    """Where the images lie on this machine is nobody else's business; their fingerprint goes along."""

    def name_of(source):
        return source if source in (None, "digits") or source.startswith("tfds:") else "array"

    test = config.data.test and name_of(config.data.test)
    data = dataclasses.replace(
        config.data,
        **{"source": name_of(config.data.source), "test": None if test == "array" else test},
        **{"dir": None, "manual_dir": None},
    )
    return dataclasses.replace(config, data=data)
