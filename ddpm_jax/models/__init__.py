"""The networks: the only place that knows Flax."""

from ddpm_jax.models.unet import UNet, init_params

__all__ = ["UNet", "init_params"]
