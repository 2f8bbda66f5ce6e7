"""A model in one .safetensors file: its weights, its config, and where they come from."""

import json
from typing import Any

import jax
import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ddpm_jax.config import Config, from_dict, to_dict
from ddpm_jax.ddpm import DDPM
from ddpm_jax.errors import UserError
from ddpm_jax.shapes import PyTree
from ddpm_jax.storage.files import parse_json, path_of, refuse_pointer, write_file
from ddpm_jax.storage.measured import (
    NOTHING_MEASURED,
    PREFIX,
    Measured,
    identity_of,
    measured_of,
    parts_of,
)
from ddpm_jax.weights.names import flat_params, nested_params

PROVENANCE = {"weights": str, "step": int | None, "data_fingerprint": str | None}
"""What the metadata say of the weights at least."""


def write_single_file(
    path: epath.PathLike,
    config: Config,
    params: PyTree,
    about: dict[str, Any],
    measured: Measured = NOTHING_MEASURED,
) -> None:
    """Writes `params` to the .safetensors file `path`; its metadata hold `config` and `about`.

    `about` is the provenance. Tensors are named as in the network: down_0_0_block.conv_0.kernel.
    What was measured of the weights is beside them: tensors calibration.*, the rest in the
    metadata.
    """
    tensors = jax.tree.map(np.asarray, flat_params(params))
    described: dict[str, Any] = {"config": to_dict(config), "provenance": about}
    if measured != NOTHING_MEASURED:
        identity = identity_of(DDPM(config), params)
        of_measured, arrays = parts_of(measured, identity)
        described |= of_measured
        tensors |= {PREFIX + name: array for name, array in arrays.items()}
    # A single entry, because the library writes several in an order that varies.
    metadata = {"ddpm_jax": json.dumps(described)}
    write_file(path_of(path), save(tensors, metadata))


def read_single_file(path: epath.PathLike) -> tuple[Config, Any, dict[str, Any]]:
    """(config, params, provenance) of a file that `write_single_file` wrote, bit for bit.

    Raises UserError if the file is of another kind, or a tensor is missing, unexpected or of
    another shape or dtype.
    """
    return read_with_measured(path)[:3]


def read_with_measured(
    path: epath.PathLike,
) -> tuple[Config, Any, dict[str, Any], Measured]:
    """As `read_single_file`, with what was measured of the weights."""
    content = path_of(path).read_bytes()
    try:
        refuse_pointer(content)
        metadata = parse_json(_metadata(content)["ddpm_jax"].encode(errors="surrogatepass"))
        tensors = load(content)
        config = from_dict(metadata["config"])
        provenance = metadata["provenance"]
        about = provenance | {
            name: _of_kind(provenance[name], kind) for name, kind in PROVENANCE.items()
        }
        if about["weights"] not in ("ema", "raw", "unknown"):
            raise KeyError("weights")
        if config.model.num_classes == "auto":  # Of data that are not here.
            raise KeyError("num_classes")
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path}: does not describe its model, so it is not from ddpm-jax export; "
            "for a diffusers model, name its folder"
        ) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (SafetensorError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read as safetensors ({error}); copy or export it again"
        ) from error
    of_measured = {name: metadata[name] for name in ("calibration", "tuned") if name in metadata}
    arrays = {}
    if "calibration" in of_measured:
        names = [name for name in tensors if name.startswith(PREFIX)]
        arrays = {name.removeprefix(PREFIX): tensors.pop(name) for name in names}
    ddpm = DDPM(config)
    wanted = flat_params(ddpm.shapes)
    for name in sorted({*wanted, *tensors}):
        there = _describe(tensors.get(name))
        here = _describe(wanted.get(name))
        if there != here:
            raise UserError(
                f"{path}: tensor {name} is {there}, but must be {here} by the file's config; "
                "export it again"
            )
    params = nested_params(tensors)
    if not of_measured:
        return config, params, about, NOTHING_MEASURED
    identity = identity_of(ddpm, params)
    return config, params, about, measured_of(path, of_measured, arrays, ddpm, identity)


def _metadata(content: bytes) -> dict[str, str]:
    """The metadata in the header, which is 8 bytes for its length, then JSON."""
    length = int.from_bytes(content[:8], "little")
    if length > len(content) - 8:
        raise ValueError("the file is incomplete")
    return parse_json(content[8 : 8 + length])["__metadata__"]


def _of_kind(value, kind):
    """The value, or a TypeError."""
    if not isinstance(value, kind):
        raise TypeError(f"must be {kind}")
    return value


def _describe(leaf) -> str:
    return "absent" if leaf is None else f"{leaf.dtype} of shape {tuple(leaf.shape)}"
