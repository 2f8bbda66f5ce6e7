"""Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel 2020) in JAX."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from ddpm_jax import config, likelihood, losses, samplers
    from ddpm_jax.config import Config, load_config
    from ddpm_jax.data.images import to_uint8
    from ddpm_jax.ddpm import DDPM
    from ddpm_jax.devices.runtime import configure_jax
    from ddpm_jax.diffusion import (
        decoder_log_likelihood,
        normal_kl,
        p_mean_variance,
        predict_x_0,
        q_posterior,
        q_sample,
    )
    from ddpm_jax.errors import UserError
    from ddpm_jax.sampler import Sampler
    from ddpm_jax.schedule import Schedule, make_schedule, strided
    from ddpm_jax.training.train import fit
    from ddpm_jax.weights.load import load

__version__ = "0.1.0"
__all__ = [
    "DDPM",
    "Config",
    "Sampler",
    "Schedule",
    "UserError",
    "config",
    "configure_jax",
    "decoder_log_likelihood",
    "fit",
    "likelihood",
    "load",
    "load_config",
    "losses",
    "make_schedule",
    "normal_kl",
    "p_mean_variance",
    "predict_x_0",
    "q_posterior",
    "q_sample",
    "samplers",
    "strided",
    "to_uint8",
]
