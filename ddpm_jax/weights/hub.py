"""Downloads models from huggingface.co with its own client."""

import re
from pathlib import Path

from ddpm_jax.errors import UserError
from ddpm_jax.storage.measured import CALIBRATION, TUNED

# The files of a diffusers folder that `load` reads, in either layout. None of them is a pickle.
FILES = (
    "model_index.json",
    "config.json",
    "scheduler_config.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model-*-of-*.safetensors",
    CALIBRATION,
    TUNED,
)
FOLDERS = ("", "unet/", "scheduler/")

# What is known of the published weights beyond their files, which do not say it. The CIFAR10 model
# is reported to hold the raw weights: users measured FID 12.4 with it; 12.14 of raw and 3.21 of
# averaged weights were measured again, and the paper's 3.17 is of averaged ones. Those with ema in
# their names are averaged by that name. Of the same names without ema nothing is known.
KINDS = {
    "google/ddpm-cifar10-32": "raw",
    "google/ddpm-ema-bedroom-256": "ema",
    "google/ddpm-ema-cat-256": "ema",
    "google/ddpm-ema-celebahq-256": "ema",
    "google/ddpm-ema-church-256": "ema",
}


def is_hub_name(name: str) -> bool:
    """Whether `name` looks like OWNER/MODEL (google/ddpm-cifar10-32), as many paths do too."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def download(name: str) -> Path:
    """The folder, in the client's cache, with the JSON and safetensors files of the model `name`.

    Downloads files that are not there yet. Raises UserError if the client is not installed or
    cannot download them.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{name}: no such path; "
            "to download the model from huggingface.co, pip install 'ddpm-jax[hub]'"
        ) from None
    patterns = [folder + file for folder in FOLDERS for file in FILES]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    # The client, its HTTP library and the system raise errors without a common base class.
    except Exception as error:
        words = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{name}: no such path, and it cannot be downloaded from huggingface.co "
            f"({words[:300]}); check the name"
        ) from error
