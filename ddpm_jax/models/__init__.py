"""The networks: the only place that knows Flax."""

from ddpm_jax.models.unet import UNet

__all__ = ["UNet"]
