"""Models that leave: programs that run without this package."""

from ddpm_jax.interop.stablehlo import write_stablehlo

__all__ = ["write_stablehlo"]
