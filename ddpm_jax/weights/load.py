"""Trained weights from wherever they are: a run, a file of `export`, a diffusers folder, the Hugging Face hub."""

import logging
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ddpm_jax.config import flatten, to_dict
from ddpm_jax.ddpm import DDPM
from ddpm_jax.devices.mesh import replicate
from ddpm_jax.errors import UserError
from ddpm_jax.storage.files import path_of
from ddpm_jax.storage.run import Weights, data_fingerprint, digest, is_run, load_checkpoint
from ddpm_jax.weights.diffusers import is_diffusers, read_diffusers
from ddpm_jax.weights.hub import download, is_hub_name
from ddpm_jax.weights.single_file import read_single_file

log = logging.getLogger(__name__)

Kind = Literal["ema", "raw", "unknown"]

# The fields that decide what network there is, and what its output stands for.
FITS = (
    *(
        f"model.{name}"
        for name in (
            "base_channels",
            "channel_multipliers",
            "num_res_blocks",
            "attention_resolutions",
        )
    ),
    *("model.norm_groups", "data.image_shape", "diffusion.prediction", "diffusion.variance"),
)


class Loaded(NamedTuple):
    """A model with its weights."""

    ddpm: DDPM
    params: Any
    kind: Kind
    """Whether they are the averaged weights; unknown where the file does not say."""
    step: int | None
    """Updates that made them, or None where that is not known."""
    data_fingerprint: str | None
    """Of the images they were trained on, or None where that is not known."""

    @property
    def words(self) -> str:
        """As `words_of` says it."""
        return words_of(self.kind, self.step)

    @property
    def label(self) -> dict[str, Any]:
        """What tells this model from others, for files that say what they were made with."""
        hashes = {"parameters": digest(self.params), "process": self.ddpm.process_digest}
        return {**hashes, "weights": self.kind, "step": self.step}


def words_of(kind: Kind, step: int | None) -> str:
    """For example "ema weights of step 5000"."""
    words = "weights that may be averaged or not" if kind == "unknown" else f"{kind} weights"
    return words if step is None else f"{words} of step {step}"


def load(path: epath.PathLike, *, weights: Weights | None = None, step: int | None = None):
    """(ddpm, params) of `path`; params lie on the default device.

    `path` is a run directory, of whose newest checkpoint (or that of `step`) the averaged weights are taken
    (or the `raw` ones); a .safetensors file of `ddpm-jax export`; a folder of the diffusers library; or the name
    of one on huggingface.co, such as google/ddpm-cifar10-32. Raises UserError if it is none of these, the network
    cannot be what it describes, or the weights are not those asked for.
    """
    loaded = load_weights(path, weights=weights, step=step)
    return loaded.ddpm, loaded.params


def load_weights(
    path: epath.PathLike,
    *,
    weights: Weights | None = None,
    step: int | None = None,
    mesh: Mesh | None = None,
) -> Loaded:
    """As `load`, with what is known of the weights; params lie on each device of `mesh`, if one is given."""
    if weights not in (None, "ema", "raw"):
        raise UserError(f"weights: {weights!r} is neither ema nor raw")
    if is_run(path):
        kind = weights or "ema"
        step, ddpm, params = load_checkpoint(path, weights=kind, step=step, mesh=mesh)
        return Loaded(ddpm, params, kind, step, data_fingerprint(path))
    config, params, about = _read(path)
    if step not in (None, about["step"]):
        raise UserError(
            f"step: {path} holds one set of weights, of step {about['step'] or 'unknown'}; leave it out"
        )
    if weights not in (None, about["weights"]):
        known = (
            "does not say whether its weights are averaged"
            if about["weights"] == "unknown"
            else "holds others"
        )
        raise UserError(f"weights: {path} {known}; leave --weights {weights} out")
    params = replicate(params, mesh) if mesh else jax.device_put(params, jax.local_devices()[0])
    return Loaded(DDPM(config), params, about["weights"], about["step"], about["data_fingerprint"])


def weights_for(ddpm: DDPM, path: epath.PathLike, mesh: Mesh) -> Loaded:
    """The weights of `path`, as `load` finds them, to train `ddpm` from; on each device of `mesh`.

    Raises UserError naming the fields by which its network is another or predicts something else.
    """
    loaded = load_weights(path, mesh=mesh)
    there, here = _network(loaded.ddpm), _network(ddpm)
    if there != here:
        before, now = (flatten(to_dict(model.config)) for model in (loaded.ddpm, ddpm))
        differences = [
            f"{name} {now[name]!r}, there {before[name]!r}"
            for name in FITS
            if before[name] != now[name]
        ]
        raise UserError(f"--init-from: {path} is of another network: {', '.join(differences)}")
    if not np.array_equal(loaded.ddpm.schedule.betas, ddpm.schedule.betas):
        log.warning(
            "--init-from: %s was trained with other betas than this config's diffusion.schedule",
            path,
        )
    return loaded


def _network(ddpm: DDPM):
    """What two models have in common where the weights of one fit the other."""
    shapes = jax.eval_shape(ddpm.init, jax.random.key(0))
    diffusion = ddpm.config.diffusion
    learned = diffusion.variance if diffusion.learns_variance else None
    return (
        jax.tree.map(lambda leaf: leaf.shape, shapes),
        ddpm.config.model.norm_groups,
        diffusion.prediction,
        learned,
    )


def home(path: epath.PathLike) -> epath.Path:
    """The run directory `path`, where what is made of a run goes. Raises UserError if it is no run."""
    if not is_run(path):
        raise UserError(
            f"{path}: this is not a run directory, which has a place for this; say where with --out"
        )
    return path_of(path)


def _read(path: epath.PathLike):
    """(config, params, {weights, step, data_fingerprint}) of what is no run."""
    local = path_of(path)
    if local.suffix == ".safetensors" and local.is_file():
        return read_single_file(local)
    mistyped = local.suffix == ".safetensors" or local.parent.exists()
    if not local.exists() and not mistyped and is_hub_name(str(path)):
        log.info("%s: no such folder here, looking on huggingface.co", path)
        local = download(str(path))
    if is_diffusers(local):
        return *read_diffusers(local), {
            "weights": "unknown",
            "step": None,
            "data_fingerprint": None,
        }
    if not local.exists():
        raise UserError(
            f"{path}: there is none; name a run directory, a .safetensors file or a diffusers folder"
        )
    if local.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise UserError(
            f"{path}: a pickle can run any program and is not read; of a diffusers model name the folder"
        )
    raise UserError(
        f"{path}: this is not a run directory, a .safetensors file, or a folder of the diffusers library"
    )
