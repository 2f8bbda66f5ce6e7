"""Reads and writes the folders of the diffusers library, without the library.

pipeline   model_index.json, unet/, scheduler/
flat       config.json, diffusion_pytorch_model.safetensors and scheduler_config.json in one folder
U-Net      flat, but without scheduler_config.json
"""

import dataclasses
import json
import logging
from typing import Any

import numpy as np
from etils import epath
from safetensors.numpy import save

from ddpm_jax.config import Config, Model
from ddpm_jax.ddpm import DDPM
from ddpm_jax.errors import UserError, one_line
from ddpm_jax.shapes import PyTree
from ddpm_jax.storage.files import path_of, read_json, write_file
from ddpm_jax.storage.measured import NOTHING_MEASURED, Measured, files_of, identity_of
from ddpm_jax.weights.architecture import (
    NO_CLASS_ROW,
    SCHEDULERS,
    UNET,
    Fields,
    read_config,
    write_config,
)
from ddpm_jax.weights.tensors import from_params, read_tensors, to_params

log = logging.getLogger(__name__)

WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLE = "diffusion_pytorch_model.bin"
VALUES_FILE = "data_values.json"
VALUES = ("values", "per_channel", "nonfinite", "offset", "scale", "dtype")
"""The fields of the config's data that say how its values become the model's units."""
CONVERT = "python scripts/convert_bin.py FILE"


def is_diffusers(path: epath.PathLike) -> bool:
    """Whether `path` is a folder that the diffusers library wrote. A run directory is not."""
    folder = path_of(path)
    if (folder / "model_index.json").exists():
        return True
    try:
        values = read_json(folder / "config.json")
    except UserError:
        return False
    return isinstance(values, dict) and "_class_name" in values


def read_diffusers(path: epath.PathLike) -> tuple[Config, dict]:
    """(config, params) of the folder `path`.

    `params` is a tree like that of `DDPM(config).init`, as NumPy float32. A U-Net without a
    scheduler gets the paper's process, with a warning.

    Raises UserError naming the file, and the field, tensor or component that has no equivalent in
    this package.
    """
    folder = path_of(path)
    index = folder / "model_index.json"
    components = _read_json(index) if index.exists() else {}
    for name, component in components.items():
        if (
            not name.startswith("_")
            and name not in ("unet", "scheduler")
            and component not in (None, [None, None])
        ):
            raise UserError(
                f"{index}: {name} is not supported; use a pipeline of only unet and scheduler"
            )
    unet = folder
    scheduler_file = folder / "scheduler_config.json"
    if (folder / "unet").exists():
        unet = folder / "unet"
        scheduler_file = folder / "scheduler" / "scheduler_config.json"
    scheduler = None
    if index.exists() or scheduler_file.exists():
        scheduler = _read_scheduler(scheduler_file)
    else:
        log.warning(
            "%s: this U-Net has no scheduler; using the paper's: linear betas, fixed_large",
            folder,
        )
    known = {"UNet2DModel": UNET | {NO_CLASS_ROW: False}}
    config = read_config(_read_fields(unet / "config.json", known), scheduler)
    config = _with_values(config, folder / VALUES_FILE)
    return config, to_params(_read_weights(unet), DDPM(config).shapes, unet)


def write_diffusers(
    path: epath.PathLike,
    config: Config,
    params: PyTree,
    measured: Measured = NOTHING_MEASURED,
) -> None:
    """Writes a pipeline that diffusers' DDPMPipeline loads; weights are float32.

    What was measured of them lies in files of our own beside it, and what the data's values are,
    where they are not 8-bit levels.

    Settings that only matter for training (loss, data, optimiser) and model.dtype are not saved.
    For a model with classes a warning is logged: DDPMPipeline loads it, but calls the U-Net without
    labels, which the U-Net refuses.
    Raises UserError naming the field of `config` that has no equivalent in the library.
    """
    folder = path_of(path)
    unet, scheduler = write_config(config)
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", unet["_class_name"]],
    }
    write_file(folder / "unet" / WEIGHTS, save(from_params(params), {"format": "pt"}))
    write_file(folder / "unet" / "config.json", _json(unet))
    write_file(folder / "scheduler" / "scheduler_config.json", _json(scheduler))
    if config.data.value_kind.kind != "uint8":
        values = {name: getattr(config.data, name) for name in VALUES}
        write_file(folder / VALUES_FILE, _json(values))
    if measured != NOTHING_MEASURED:
        identity = identity_of(DDPM(_as_read(config)), params)
        for name, content in files_of(measured, identity).items():
            write_file(folder / name, content)
    # Last, because this file makes the folder a pipeline.
    write_file(folder / "model_index.json", _json(index))
    if config.model.num_classes:
        log.warning(
            "%s: diffusers' DDPMPipeline loads this but gives the U-Net no labels; call its unet "
            "with class_labels=%s",
            folder,
            _rows(config.model),
        )


def _with_values(config: Config, file: epath.Path) -> Config:
    """`config` with the values of the data that a file of ours names, if it is there."""
    if not file.exists():
        return config
    values = _read_json(file)
    if sorted(values) != sorted(VALUES):
        raise UserError(f"{file}: must have the fields {', '.join(VALUES)}; export the model again")
    given: dict[str, Any] = {
        name: tuple(each) if isinstance(each, list) else each for name, each in values.items()
    }
    try:
        return dataclasses.replace(config, data=dataclasses.replace(config.data, **given))
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _rows(model: Model) -> str:
    """The rows of the class embedding, in words."""
    classes = f"0 to {model.class_rows - 1 - model.no_class}"
    return f"{classes}, or {model.class_rows - 1} for no class" if model.no_class else classes


def _as_read(config: Config) -> Config:
    """`config` as the folder says it: model.dtype is not in it."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32"))


def _json(values: dict) -> bytes:
    return json.dumps(values, indent=2, sort_keys=True).encode()


def _read_json(file: epath.Path) -> dict:
    if not file.exists():
        raise UserError(f"{file}: is missing; download the whole folder")
    values = read_json(file)
    if not isinstance(values, dict):
        raise UserError(f"{file}: must be a JSON object; download it again")
    return values


def _read_fields(file: epath.Path, classes: dict[str, dict]) -> Fields:
    return _fields(file, _read_json(file), classes)


def _fields(file: epath.Path, values: dict, classes: dict[str, dict]) -> Fields:
    name = values.get("_class_name")
    if not isinstance(name, str) or name not in classes:
        raise UserError(
            f"{file}: _class_name is {json.dumps(name)}; it must be {' or '.join(classes)}"
        )
    return Fields(file, values, classes[name])


def _read_scheduler(file: epath.Path) -> Fields:
    """The fields that the scheduler's class takes; the library ignores all others, too."""
    values = _read_json(file)
    taken = SCHEDULERS.get(str(values.get("_class_name")), {})
    ignored = [
        name
        for name, value in values.items()
        if name not in taken and not name.startswith("_") and value is not None
    ]
    if taken and ignored:
        log.warning(
            "%s: %s does not take %s; ignored, as diffusers does",
            file,
            values["_class_name"],
            one_line(", ".join(ignored), 300),
        )
        values = {name: value for name, value in values.items() if name not in ignored}
    return _fields(file, values, SCHEDULERS)


def _read_weights(folder: epath.Path) -> dict:
    """The tensors of one safetensors file, or of all the files that an index names."""
    if (folder / WEIGHTS).exists():
        return read_tensors(folder / WEIGHTS)
    index = folder / f"{WEIGHTS}.index.json"
    if not index.exists():
        raise UserError(f"{folder / WEIGHTS}: is missing{_instead(folder)}")
    of_tensors = _read_json(index).get("weight_map")
    if not isinstance(of_tensors, dict) or not all(
        isinstance(file, str) for file in of_tensors.values()
    ):
        raise UserError(
            f"{index}: its weight_map must name the file of each tensor; download it again"
        )
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(set(of_tensors.values())):
        if "/" in name or not name.endswith(".safetensors"):
            raise UserError(
                f"{index}: {name!r} is not a safetensors file in the same folder; download it again"
            )
        of_file = read_tensors(folder / name)
        twice = sorted(of_file.keys() & tensors.keys())
        if twice:
            raise UserError(
                f"{folder / name}: {twice[0]} is also in another file; download the whole folder"
            )
        tensors |= of_file
    return tensors


def _instead(folder: epath.Path) -> str:
    """The remedy when the weights are missing but files of other kinds exist."""
    if (folder / PICKLE).exists() or (folder / f"{PICKLE}.index.json").exists():
        return (
            f", and {PICKLE} is a pickle, which can run any program and is not read; convert it "
            f"with `{CONVERT}` (needs torch), where FILE is {folder / PICKLE}"
        )
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if others:
        return f"; rename {others[0]} if these are the weights"
    return "; download the whole folder"
