"""Models in the formats of other programs: .safetensors, diffusers folders, StableHLO, names on huggingface.co."""

from ddpm_jax.interop.diffusers import is_diffusers, read_diffusers, write_diffusers
from ddpm_jax.interop.hub import download, is_hub_name
from ddpm_jax.interop.names import flat_params, nested_params
from ddpm_jax.interop.single_file import read_single_file, write_single_file
from ddpm_jax.interop.stablehlo import write_stablehlo

__all__ = [
    "download",
    "flat_params",
    "is_diffusers",
    "is_hub_name",
    "nested_params",
    "read_diffusers",
    "read_single_file",
    "write_diffusers",
    "write_single_file",
    "write_stablehlo",
]
