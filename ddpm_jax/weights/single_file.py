"""A model in one .safetensors file: its weights, its config, and where they come from."""

import json
from typing import Any

import jax
import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from ddpm_jax import config as configs
from ddpm_jax.config import Config
from ddpm_jax.ddpm import DDPM
from ddpm_jax.errors import UserError
from ddpm_jax.storage.files import path_of, write_file
from ddpm_jax.weights.names import flat_params, nested_params


def write_single_file(path: epath.PathLike, config: Config, params, about: dict[str, Any]) -> None:
    """Writes `params` to the .safetensors file `path`, with `config` and `about`, its provenance, in the metadata.

    Tensors are named as in the network: down_0_0_block.conv_0.kernel.
    """
    # One entry: the library writes several in an order that is another each time.
    metadata = {"ddpm_jax": json.dumps({"config": configs.to_dict(config), "provenance": about})}
    write_file(
        path_of(path), safetensors.save(jax.tree.map(np.asarray, flat_params(params)), metadata)
    )


def read_single_file(path: epath.PathLike) -> tuple[Config, Any, dict[str, Any]]:
    """(config, params, provenance) of a file that `write_single_file` wrote, bit for bit.

    Raises UserError if it is none, or a tensor is missing, left over or of another shape or dtype.
    """
    content = path_of(path).read_bytes()
    try:
        metadata = json.loads(_metadata(content)["ddpm_jax"])
        tensors = safetensors.load(content)
        config, provenance = configs.from_dict(metadata["config"]), metadata["provenance"]
        about = provenance | {
            name: provenance[name] for name in ("weights", "step", "data_fingerprint")
        }
    except (KeyError, TypeError):
        raise UserError(
            f"{path}: this file does not say what model it is of; it is not from ddpm-jax export. "
            "Of a diffusers model name the folder"
        ) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (SafetensorError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read as safetensors ({error}); copy or export it again"
        ) from error
    wanted = flat_params(jax.eval_shape(DDPM(config).init, jax.random.key(0)))
    for name in sorted({*wanted, *tensors}):
        there, here = (_describe(values.get(name)) for values in (tensors, wanted))
        if there != here:
            raise UserError(f"{path}: tensor {name} is {there}, and by the config in it {here}")
    return config, nested_params(tensors), about


def _metadata(content: bytes) -> dict[str, str]:
    """What the header holds beside the tensors: the format is 8 bytes of length, then JSON."""
    length = int.from_bytes(content[:8], "little")
    if length > len(content) - 8:
        raise ValueError("it ends too early")
    return json.loads(content[8 : 8 + length])["__metadata__"]


def _describe(leaf) -> str:
    return "not there" if leaf is None else f"{leaf.dtype} of shape {tuple(leaf.shape)}"
