"""The command line: `ddpm-jax`."""

from ddpm_jax.cli.program import main

__all__ = ["main"]
