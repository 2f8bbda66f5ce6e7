"""Weights in and out: folders of the diffusers library, and names on huggingface.co."""

from ddpm_jax.interop.diffusers import is_diffusers, read_diffusers, write_diffusers
from ddpm_jax.interop.hub import download, is_hub_name

__all__ = ["download", "is_diffusers", "is_hub_name", "read_diffusers", "write_diffusers"]
