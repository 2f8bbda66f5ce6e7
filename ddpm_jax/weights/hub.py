"""Models by their names on huggingface.co, fetched by its own client."""

import re
from pathlib import Path

from ddpm_jax.errors import UserError

# What `read_diffusers` reads, in either layout, and nothing that is a pickle.
FILES = (
    "model_index.json",
    "config.json",
    "scheduler_config.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model-*-of-*.safetensors",
)
FOLDERS = ("", "unet/", "scheduler/")


def is_hub_name(name: str) -> bool:
    """Whether `name` looks like google/ddpm-cifar10-32, OWNER/MODEL; so does many a path."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def download(name: str) -> Path:
    """The folder, in the client's cache, of the model `name`: its JSON and safetensors files.

    Fetches what is not there yet. Raises UserError if the client is not installed or cannot give it.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{name}: no such folder here; to look for the name on huggingface.co, pip install 'ddpm-jax[hub]'"
        ) from None
    patterns = [folder + file for folder in FOLDERS for file in FILES]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # Of its own, of its HTTP library's and of the system: no base class is common to all.
        words = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{name}: no such folder here, and huggingface.co did not give it: {words[:300]}"
        ) from error
