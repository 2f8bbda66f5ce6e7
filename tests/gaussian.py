"""Data with known statistics: independent pixels x_0 ~ N(M, S^2), and their optimal denoiser."""

import jax.numpy as jnp
import numpy as np
from scipy import stats

from ddpm_jax.diffusion import target

M, S = 0.1, 0.2


def gain(a):
    """E[x_0 | x_t] = M + gain (x_t - sqrt(a) M), a being alphas_bar."""
    return np.sqrt(a) * S**2 / (a * S**2 + 1 - a)


def mmse(a):
    """Its mean squared error."""
    return S**2 * (1 - a) / (a * S**2 + 1 - a)


def denoiser(schedule, prediction, extra=None):
    """The optimal network for `prediction`, E[target | x_t].

    `extra(t)` [B] is its output for the variance.
    """

    def denoise_fn(x_t, timesteps):
        t = jnp.searchsorted(schedule.timesteps, timesteps)
        a = schedule.alphas_bar[t].reshape(-1, 1, 1, 1)
        one_minus_a = jnp.square(schedule.sqrt_one_minus_alphas_bar[t]).reshape(-1, 1, 1, 1)
        x_0 = M + jnp.sqrt(a) * S**2 / (a * S**2 + one_minus_a) * (x_t - jnp.sqrt(a) * M)
        noise = (x_t - jnp.sqrt(a) * x_0) / jnp.sqrt(one_minus_a)
        output = target(schedule, x_0, x_t, t, noise, prediction=prediction)
        if extra is None:
            return output
        return jnp.concatenate(
            [output, jnp.broadcast_to(extra(t).reshape(-1, 1, 1, 1), output.shape)], axis=-1
        )

    return denoise_fn


def images_and_noise(n=64):
    """x_0 and noise [1,n,n,1]: every pair of n quantiles of each.

    The first and second moments are then exact.
    """
    z = stats.norm.ppf((np.arange(n) + 0.5) / n)
    z /= z.std()
    x_0, noise = np.meshgrid(M + S * z, z, indexing="ij")
    return jnp.float32(x_0)[None, ..., None], jnp.float32(noise)[None, ..., None]


class Chain:
    """The tables of betas [T] in NumPy, from their definitions."""

    def __init__(self, betas):
        self.betas = np.asarray(betas, np.float64)
        self.a = np.cumprod(1 - self.betas)
        self.a_prev = np.append(1, self.a[:-1])
        self.posterior = self.betas * (1 - self.a_prev) / (1 - self.a)
        self.c_0 = np.sqrt(self.a_prev) * self.betas / (1 - self.a)

    def variance(self, name):
        """The reverse step's variance [T], entry 0 being that of entry 1 of the posterior."""
        table = {"fixed_small": self.posterior, "fixed_large": self.betas}[name].copy()
        table[0] = self.posterior[1]
        return table

    def terms(self, variance):
        """E[L_t] [T] in bits/dim for reverse steps of that variance [T].

        L_0 assumes bins far narrower than sigma.
        """
        error = self.c_0**2 * mmse(self.a)
        with np.errstate(divide="ignore", invalid="ignore"):
            kl = 0.5 * (np.log(variance / self.posterior) - 1 + (self.posterior + error) / variance)
            kl[0] = (
                np.log(255 / 2)
                + 0.5 * np.log(2 * np.pi * variance[0])
                + mmse(self.a[0]) / (2 * variance[0])
            )
        return kl / np.log(2)

    def prior(self):
        """E[L_T] in bits/dim."""
        a = self.a[-1]
        return 0.5 * (a * (M**2 + S**2) + 1 - a - 1 - np.log(1 - a)) / np.log(2)
