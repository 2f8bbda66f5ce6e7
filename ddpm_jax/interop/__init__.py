"""Weights in the formats of other programs."""

from ddpm_jax.interop.single_file import read_single_file, write_single_file

__all__ = ["read_single_file", "write_single_file"]
