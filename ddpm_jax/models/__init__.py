"""The networks: the only place that knows Flax."""

from ddpm_jax.models.inception import inception, preprocess
from ddpm_jax.models.inception_weights import load_inception
from ddpm_jax.models.unet import UNet, init_params

__all__ = ["UNet", "inception", "init_params", "load_inception", "preprocess"]
