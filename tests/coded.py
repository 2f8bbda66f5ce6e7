"""A model that needs no compiling to speak of, its images, and files of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from conftest import with_
from gaussian import Chain

from ddpm_jax import DDPM
from ddpm_jax.calibration import Calibration

SHAPE = (8, 8, 1)
CENTRES = np.array([-0.3, 0.4, 0.0])
"""The mean pixels of the two classes, and of no class."""

SPREAD = 0.2
LABELS = (0, 1, 1, -1, 0)
T = 30


@dataclasses.dataclass(frozen=True)
class Near(DDPM):
    """Nearly the best denoiser of independent Gaussian pixels, plus `off` or minus it."""

    off: float = 0.0

    @functools.cached_property
    def shapes(self):
        return {"spread": jax.ShapeDtypeStruct((), jnp.float32)}

    def denoise(self, params, x_t, t, labels=None):
        a = self.schedule.alphas_bar[t].reshape(-1, 1, 1, 1)
        rows = jnp.full(len(x_t), 2) if labels is None else jnp.asarray(labels) % 3
        mean = jnp.float32(CENTRES)[rows].reshape(-1, 1, 1, 1)
        variance = jnp.square(params["spread"])
        gain = jnp.sqrt(a) * variance / (a * variance + 1 - a)
        x_0 = mean + gain * (x_t - jnp.sqrt(a) * mean) + 0.02 * jnp.sin(5 * x_t)
        noise = (x_t - jnp.sqrt(a) * x_0) / jnp.sqrt(1 - a)
        return noise + self.off * jnp.sign(jnp.sin(1000 * x_t))


def model(tiny, **fields):
    """(ddpm, params) of two classes, with a calibration."""
    diffusion = {"num_timesteps": T, "beta_start": 0.002, "beta_end": 0.4, "clip": True}
    config = with_(tiny, model={"num_classes": 2}, diffusion=diffusion)
    a = Chain(np.float64(DDPM(config).schedule.betas)).a
    mse = SPREAD**2 * (1 - a) / (a * SPREAD**2 + 1 - a) + 1e-4
    cells = np.tile(mse.astype(np.float32)[:, None, None, None], (1, *SHAPE))
    calibration = Calibration(mse, 0 * mse, cells, 0 * cells, 1)
    return Near(config, calibration, **fields), {"spread": jnp.float32(SPREAD)}


def images(labels=LABELS, seed=0):
    """uint8 [N,8,8,1] of these classes."""
    rng = np.random.default_rng(seed)
    means = CENTRES[np.array(labels)].reshape(-1, 1, 1, 1)
    x_0 = rng.normal(means, SPREAD, (len(labels), *SHAPE))
    return np.rint(np.clip(x_0, -1, 1) * 127.5 + 127.5).astype(np.uint8)
