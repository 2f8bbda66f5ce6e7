"""Exports the sampler and the denoiser as StableHLO programs.

They need neither this package nor a config, only jax, numpy and flatbuffers. The folder contains

  sampler.stablehlo    (params, key uint32 [2], indices uint32 [B])
                       -> images float32 [B,H,W,C] in [-1, 1]: entry i is image indices[i] of the
                       key, as `DDPM.sample` draws it; `key` is jax.random.key_data of a
                       threefry2x32 key
  denoiser.stablehlo   (params, x_t float32 [B,H,W,C], t int32 [B]) -> the network's output
  params.npz           the weights as named arrays, which both programs take as a dict
  calibration.npz      what was measured of the weights, where it was; tuned.json likewise
  about.json           inputs and outputs of the programs, the config, where the weights come from,
                       sha256 sums

For a model with classes, both programs take `labels` int32 [B] after these, and the sampler then
`guidance` float32 []. Labels are 0, ..., classes - 1, or -1 for no class; nothing checks them. The
sampler doubles the batch whatever the guidance is, 1 too: one program serves all. For a model that
knows no images without a class there is neither -1 nor guidance.

Each program runs on cpu, cuda and tpu and with any B. jax.export only guarantees that versions of
jax of the next six months can read it; the weights and the config have no such limit.
"""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import export

from ddpm_jax.calls.conditions import Condition
from ddpm_jax.calls.programs import sample_batch
from ddpm_jax.config import Model, to_dict
from ddpm_jax.ddpm import DDPM
from ddpm_jax.sampler import ANCESTRAL, Sampler
from ddpm_jax.shapes import PyTree
from ddpm_jax.storage.files import npz, path_of, write_file
from ddpm_jax.storage.measured import NOTHING_MEASURED, Measured, files_of, identity_of
from ddpm_jax.weights.names import flat_params, nested_params

PLATFORMS = ("cpu", "cuda", "tpu")


def write_stablehlo(
    folder: epath.PathLike,
    ddpm: DDPM,
    params: PyTree,
    about: dict,
    sampler: Sampler = ANCESTRAL,
    measured: Measured = NOTHING_MEASURED,
) -> None:
    """Writes the programs, which sample with `sampler`, and the weights into `folder`.

    What was `measured` of them lies beside them. `about` says where the weights come from; it must
    be valid JSON. Raises UserError if the sampler's options are invalid.
    """
    folder = path_of(folder)
    sampler = ddpm.resolve(sampler)
    weights = {name: np.asarray(leaf) for name, leaf in flat_params(params).items()}
    files = {
        "sampler.stablehlo": bytes(sampler_program(ddpm, params, sampler).serialize()),
        "denoiser.stablehlo": bytes(denoiser_program(ddpm, params).serialize()),
        "params.npz": npz(weights),
    }
    if measured != NOTHING_MEASURED:
        files |= files_of(measured, identity_of(ddpm, params))
    model = ddpm.config.model
    labels = ", labels int32 [B]" if model.num_classes else ""
    guidance = ", guidance float32 []" if _is_guided(model) else ""
    described = {
        "programs": {
            "sampler.stablehlo": f"(params, key uint32 [2], indices uint32 [B]{labels}{guidance})"
            " -> images float32 [B,H,W,C] in [-1, 1]",
            "denoiser.stablehlo": f"(params, x_t float32 [B,H,W,C], t int32 [B]{labels})"
            " -> float32 [B,H,W,C or 2C]",
        },
        **_about_classes(model),
        "image_shape": ddpm.image_shape,
        "platforms": PLATFORMS,
        "jax": jax.__version__,
        "sampler": sampler.recorded(ddpm.config.diffusion),
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        "config": to_dict(ddpm.config),
        "about": about,
    }
    for name, content in files.items():
        write_file(folder / name, content)
    write_file(folder / "about.json", json.dumps(described, indent=1).encode())


def _is_guided(model: Model) -> bool:
    """Whether the sampler takes a guidance."""
    return bool(model.num_classes) and model.no_class


def _about_classes(model: Model) -> dict:
    """What about.json says of labels and guidance; nothing without classes."""
    if not model.num_classes:
        return {}
    last = model.class_rows - 1 - model.no_class
    labels = f"the classes of the images, 0 to {last}"
    inputs = {"labels": labels}
    if model.no_class:
        inputs["labels"] = f"{labels}, or -1 for no class"
        inputs["guidance"] = (
            "1 for none; above, images move further towards their class; the batch of the network "
            "is doubled whatever it is"
        )
    return {"inputs": inputs, "classes": {"number": last + 1, "no_class": model.no_class}}


def sampler_program(ddpm: DDPM, params: PyTree, sampler: Sampler) -> export.Exported:
    """(params, key data uint32 [2], indices uint32 [B]) -> images float32 [B,H,W,C].

    `params` is a dict as `flat_params` makes it. With classes, it takes labels int32 [B], too, and
    the guidance float32 [] if the model knows images without a class.
    """

    def sample(flat, key, indices, labels=None, guidance=None):
        rng = jax.random.wrap_key_data(key, impl="threefry2x32")
        condition = Condition(labels, guidance)
        return sample_batch(ddpm, sampler, nested_params(flat), condition, rng, indices)

    scope = export.SymbolicScope()
    args = [jax.ShapeDtypeStruct((2,), jnp.uint32), _batch((), jnp.uint32, scope)]
    args += _labels(ddpm, scope)
    if _is_guided(ddpm.config.model):
        args.append(jax.ShapeDtypeStruct((), jnp.float32))
    return _export(sample, params, *args)


def denoiser_program(ddpm: DDPM, params: PyTree) -> export.Exported:
    """(params, x_t float32 [B,H,W,C], t int32 [B]) -> output float32 [B,H,W,C or 2C].

    `params` is a dict as `flat_params` makes it. With classes, it takes labels int32 [B], too.
    """

    def denoise(flat, x_t, t, labels=None):
        return ddpm.denoise(nested_params(flat), x_t, t, labels)

    # In the same scope, all B are the same size.
    scope = export.SymbolicScope()
    return _export(
        denoise,
        params,
        _batch(ddpm.image_shape, jnp.float32, scope),
        _batch((), jnp.int32, scope),
        *_labels(ddpm, scope),
    )


def _labels(ddpm: DDPM, scope: export.SymbolicScope) -> list[jax.ShapeDtypeStruct]:
    """The labels among the arguments: none without classes."""
    return [_batch((), jnp.int32, scope)] if ddpm.config.model.num_classes else []


def _export(function, params, *args) -> export.Exported:
    shapes = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in flat_params(params).items()
    }
    return export.export(jax.jit(function), platforms=PLATFORMS)(shapes, *args)


def _batch(shape, dtype, scope=None):
    (B,) = export.symbolic_shape("B", scope=scope)
    return jax.ShapeDtypeStruct((B, *shape), dtype)
