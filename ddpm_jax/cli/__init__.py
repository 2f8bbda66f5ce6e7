"""The command line: `ddpm-jax`."""

from ddpm_jax.cli.commands import main

__all__ = ["main"]
