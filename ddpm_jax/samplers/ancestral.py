"""Ancestral sampling (Ho et al. 2020, Algorithm 2)."""

import jax.numpy as jnp

from ddpm_jax.diffusion import MeanVariance
from ddpm_jax.samplers.chain import Chain, Method
from ddpm_jax.shapes import Array, Float, Int


def ancestral_step(
    p: MeanVariance, t: Int[Array, ""] | int, noise: Float[Array, "b h w c"]
) -> Float[Array, "b h w c"]:
    """Algorithm 2, line 4: a draw of p(x_{t-1} | x_t) made from `noise`.

    `t` is one index for the whole batch. At t = 0 the mean is returned: no noise.
    """
    return p.mean + jnp.where(t > 0, 1.0, 0.0) * jnp.exp(0.5 * p.log_variance) * noise


def _step(chain: Chain, x_t, t, memory):
    p = chain.p(x_t, t)
    return ancestral_step(p, t, chain.noise(t)), memory


ancestral = Method(_step)
"""Algorithm 2."""
