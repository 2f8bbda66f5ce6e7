"""What a measurement of the bound is of: its label, and the folder that it has in a run."""

import hashlib
import json

from etils import epath

from ddpm_jax.config import Config, names_where, to_dict
from ddpm_jax.evaluation.splits import Images
from ddpm_jax.sampler import ANCESTRAL, Sampler
from ddpm_jax.storage.measured import digest_of_errors
from ddpm_jax.weights.load import Loaded


def label_of(
    model: Loaded,
    images: Images,
    seed: int,
    sampler: Sampler = ANCESTRAL,
    conditional: bool = False,
) -> dict:
    """The description of the parts; only parts with the same label are combined."""
    label = {
        **model.label,
        "split": images.split,
        "seed": seed,
        "data_fingerprint": images.source.fingerprint,
        "images": len(images.indices),
        "chain": chain_of(model, sampler),
        "model": {},
        "diffusion": {},
    }
    config = to_dict(model.ddpm.config)
    for name in names_where(Config, lambda field: field.network or field.images):
        group, _, field = name.partition(".")
        if group in label:
            label[group][field] = config[group][field]
    if model.ddpm.config.model.num_classes:
        label["conditional"] = conditional
    return label


def label_of_today(label: dict, model: Loaded) -> dict:
    """The label of a folder that was begun when there was the whole chain alone."""
    return {"chain": chain_of(model, ANCESTRAL), **label}


def chain_of(model: Loaded, sampler: Sampler) -> dict:
    """What a resolved sampler measures; `timesteps` None is all of them."""
    diffusion = model.ddpm.config.diffusion
    return {
        "timesteps": sampler.timesteps_of(diffusion).tolist()
        if sampler.strides(diffusion)
        else None,
        "variance": sampler.variance_of(diffusion),
        "calibration": digest_of_errors(model.ddpm, sampler),
    }


def folder_of(
    model: Loaded,
    images: Images,
    seed: int,
    sampler: Sampler = ANCESTRAL,
    first: int | None = None,
    conditional: bool = False,
) -> epath.Path:
    """The folder of a measurement in the run's likelihood/, by default of the whole chain."""
    split: str = images.split
    if split == "test":
        split = f"test-{images.source.fingerprint[:8]}"
    name = f"{split}-{model.step:08d}-{model.kind}-seed{seed}"
    if first is not None:
        name += f"-first{first}"
    chain = chain_of(model, sampler)
    if chain != chain_of(model, ANCESTRAL):
        steps = chain["timesteps"]
        hashed = hashlib.blake2b(json.dumps(chain).encode(), digest_size=4).hexdigest()
        name += f"-{'all' if steps is None else len(steps)}-{chain['variance']}-{hashed}"
    if model.ddpm.config.model.num_classes and not conditional:
        name += "-no-class"
    return model.home / "likelihood" / name
