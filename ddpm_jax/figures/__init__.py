"""The paper's figures, one file each. A figure writes a picture and the numbers behind it."""

from ddpm_jax.figures.codec import Codec
from ddpm_jax.figures.interpolate import Interpolate
from ddpm_jax.figures.neighbours import Neighbours
from ddpm_jax.figures.progressive import Progressive
from ddpm_jax.figures.rate_distortion import RateDistortion
from ddpm_jax.figures.schedules import Schedules
from ddpm_jax.figures.shared_latent import SharedLatent
from ddpm_jax.figures.steps import Steps

__all__ = [
    "Codec",
    "Interpolate",
    "Neighbours",
    "Progressive",
    "RateDistortion",
    "Schedules",
    "SharedLatent",
    "Steps",
]
