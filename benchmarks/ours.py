"""This project's side of the comparison: calls that return when their work is done."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import DDPM
from ddpm_jax.calls import programs
from ddpm_jax.calls.conditions import Condition
from ddpm_jax.calls.ready import ready
from ddpm_jax.config import Config
from ddpm_jax.data import Batch, from_array
from ddpm_jax.devices.mesh import make_mesh, replicate
from ddpm_jax.models import init_params
from ddpm_jax.training.update import Update, init_state


def with_dtype(config: Config, dtype: str) -> Config:
    """The config, with a network that computes in `dtype`."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))


def parameters(config: Config):
    """Random parameters for both sides; unlike with fresh ones, no output is zero."""
    ddpm = DDPM(config)
    fresh = jax.jit(lambda key: init_params(ddpm.network, key, ddpm.image_shape))(jax.random.key(0))
    leaves, tree = jax.tree.flatten(fresh)
    rng = np.random.default_rng(0)
    noisy = []
    for leaf in leaves:
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        noisy.append(np.float32(leaf + 0.02 * noise))
    return jax.tree.unflatten(tree, noisy)


def forward(config: Config, params, x, t):
    """The network's output for x [B,H,W,C] and t [B]."""
    params = jax.device_put(params)
    denoise = jax.jit(DDPM(config).denoise)
    x = jnp.asarray(x)
    t = jnp.asarray(t)
    return lambda: np.asarray(denoise(params, x, t))


def training(config: Config, params, images, devices: int = 1):
    """One update on uint8 images [B,H,W,C], as in `ddpm-jax train`."""
    batch = len(images)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=batch))
    ddpm = DDPM(config)
    mesh = make_mesh(devices)
    update = Update(ddpm, mesh, _Same(images))
    state = replicate(init_state(ddpm, jax.tree.map(jnp.asarray, params)), mesh)
    step = 0

    def call():
        nonlocal state, step
        state, metrics = update(state, step)
        step += 1
        return jax.block_until_ready(metrics)

    return call


def reverse(config: Config, params, batch: int, steps: int):
    """`steps` steps of the reverse chain on `batch` images.

    What a chain computes once of its parameters is computed before.
    """
    ddpm = DDPM(config)
    params = ready(ddpm, jax.device_put(params))
    keys = jax.random.split(jax.random.key(0), batch)
    x = jax.random.normal(jax.random.key(1), (batch, *ddpm.image_shape))
    T = ddpm.schedule.num_timesteps
    args = (ddpm, params, Condition(None), keys, np.int32(T))
    return lambda: jax.block_until_ready(programs.reverse(*args, (x, x), 0, steps))[0][0]


def sample(config: Config, params, n: int, steps: int):
    """uint8 images [n,H,W,C] by DDIM."""
    from ddpm_jax import to_uint8

    ddpm = DDPM(config)
    params = jax.device_put(params)
    return lambda: to_uint8(
        ddpm.sample(params, jax.random.key(0), n, batch_size=n, sampler="ddim", steps=steps)
    )


class _Same:
    """Batches that are the same at every step."""

    def __init__(self, images):
        self.source = from_array(images, images.shape[1:])
        self.images = images

    def batch_at(self, step):
        return Batch(self.images)
