"""A trained model into the formats of other programs."""

import dataclasses
import logging

from etils import epath

from ddpm_jax.config import Config, Format, from_dict, names_where, to_dict
from ddpm_jax.devices.mesh import fetch
from ddpm_jax.errors import UserError
from ddpm_jax.sampler import ANCESTRAL, Sampler
from ddpm_jax.storage.files import check_writable, path_of
from ddpm_jax.storage.run import versions
from ddpm_jax.weights.diffusers import write_diffusers
from ddpm_jax.weights.load import Loaded
from ddpm_jax.weights.single_file import write_single_file
from ddpm_jax.weights.stablehlo import write_stablehlo

log = logging.getLogger(__name__)


def new_path(out: epath.PathLike, format: Format) -> epath.Path:
    """Where `format` is written: a new .safetensors file, or for the other formats a new folder.

    Raises UserError if `out` exists already, cannot be written, or has another kind of name.
    """
    path = path_of(out)
    single_file = format == "safetensors"
    if single_file != (path.suffix == ".safetensors"):
        kind = "a file, --out NAME.safetensors" if single_file else "a folder, --out NAME"
        raise UserError(f"out: {format} is written to {kind}, not to {out}")
    is_empty_folder = path.is_dir() and not any(path.iterdir())
    if path.exists() and (single_file or not is_empty_folder):
        raise UserError(f"out: {out} exists already; choose another --out or move it away")
    check_writable(path)
    return path


def export(path: epath.Path, model: Loaded, format: Format, sampler: Sampler = ANCESTRAL) -> None:
    """Writes `model` to `path`, a `new_path`.

    safetensors is the file that `load` reads, diffusers the folder that the library's
    DDPMPipeline loads, stablehlo the sampler and the denoiser as programs that run without
    ddpm_jax. What was measured of the weights goes along. Only stablehlo draws, by `sampler`.
    Raises UserError if the format cannot hold the model.
    """
    if format != "stablehlo" and sampler != ANCESTRAL:
        raise UserError(
            f"sampler: {format} holds only weights; leave out the sampler and its options, such as "
            "--steps, or choose --format stablehlo"
        )
    sampler = model.ddpm.resolve(sampler)
    ddpm = dataclasses.replace(model.ddpm, config=_without_places(model.ddpm.config))
    params = fetch(model.params)
    about = {
        "weights": model.kind,
        "step": model.step,
        "parameters": model.label["parameters"],
        "data_fingerprint": model.data_fingerprint,
        "versions": versions(),
    }
    if format == "safetensors":
        write_single_file(path, ddpm.config, params, about, model.measured)
    elif format == "diffusers":
        write_diffusers(path, ddpm.config, params, model.measured)
    else:
        write_stablehlo(path, ddpm, params, about, sampler, model.measured)
    log.info("%s: %s (%s)", path, format, model.words)


def _without_places(config: Config) -> Config:
    """The config without paths of this machine; the images stay known by their fingerprint."""
    values = to_dict(config)
    for name in names_where(Config, lambda field: field.place):
        group, _, field = name.partition(".")
        value = values[group][field]
        if value in (None, "digits") or value.startswith("tfds:"):
            continue
        values[group][field] = "array" if name == "data.source" else None
    return from_dict(values)
