"""DDPM: the schedule, the network and the image's shape bound together; what users call."""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import losses, samplers
from ddpm_jax.config import Config
from ddpm_jax.models import UNet, init_params
from ddpm_jax.parallel import batch_sharding, mesh_of
from ddpm_jax.schedule import Schedule, make_schedule

# What an example's key is folded with, so that its draws are independent of each other.
TIME, NOISE, DROPOUT, FLIP = range(4)


@dataclasses.dataclass(frozen=True)
class DDPM:
    """The model that `config` describes. Holds no weights; frozen and hashable, so jit takes it as static."""

    config: Config

    @functools.cached_property
    def schedule(self) -> Schedule:
        """The diffusion process."""
        diffusion = self.config.diffusion
        return make_schedule(diffusion.schedule, diffusion.num_timesteps, **diffusion.schedule_parameters)

    @functools.cached_property
    def network(self) -> UNet:
        """The Flax module."""
        model = self.config.model
        return UNet(
            out_channels=self.image_shape[-1],
            base_channels=model.base_channels,
            channel_multipliers=model.channel_multipliers,
            num_res_blocks=model.num_res_blocks,
            attention_resolutions=model.attention_resolutions,
            dropout=model.dropout,
            norm_groups=model.norm_groups,
            dtype=jnp.dtype(model.dtype),
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image."""
        return self.config.data.image_shape

    def init(self, rng):
        """Fresh parameters: a tree of float32 arrays."""
        return _init(self, rng)

    def denoise(self, params, x_t, t):
        """The network's output [B,H,W,C] for x_t [B,H,W,C] at the original 0-based steps t [B]; no dropout."""
        return self.network.apply({"params": params}, x_t, t)

    def loss(self, params, rng, x_0, *, train: bool = False):
        """Eq. 14 [B] of images x_0 [B,H,W,C] in [-1, 1], t uniform; with dropout only if `train`.

        Example i draws its t, noise and dropout from fold_in(rng, i). Raises TypeError for images
        that are not floats.
        """
        if not jnp.issubdtype(x_0.dtype, jnp.floating):
            raise TypeError(f"x_0: floats in [-1, 1] are needed, got {x_0.dtype}; use x / 127.5 - 1")
        keys = example_keys(rng, jnp.arange(len(x_0), dtype=jnp.uint32))
        t = jax.vmap(lambda key: jax.random.randint(key, (), 0, self.schedule.num_timesteps))(_fold(keys, TIME))
        noise = samplers.gaussian_noise(keys, NOISE, x_0.shape[1:])
        dropout_keys = _fold(keys, DROPOUT) if train else None

        def denoise_fn(x_t, timesteps):
            return self.network.apply({"params": params}, x_t, timesteps, dropout_keys)

        prediction = self.config.diffusion.prediction
        return losses.simple(self.schedule, denoise_fn, x_0, t, noise, prediction=prediction)

    def sample(self, params, rng, n: int, *, start: int = 0, batch_size: int | None = None) -> np.ndarray:
        """Algorithm 2: images start, ..., start + n - 1 of the key `rng`, float32 [n,H,W,C] in [-1, 1].

        Image i is made from fold_in(rng, i) alone: the same for any n, start, batch_size and number
        of devices. `batch_size` (default 64 a device) bounds the memory; the result lies on the
        host. Where params lie on a mesh of several devices, they share the work.
        Raises ValueError for a negative n or start, or a batch_size below 1.
        """
        if n < 0 or start < 0 or start + n > 2**32:
            raise ValueError(f"n and start: 0 <= start <= start + n <= 2**32 is needed, got {n} and {start}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size: must be at least 1, got {batch_size}")
        n = operator.index(n)
        mesh = mesh_of(params)
        devices = mesh.size if mesh else 1
        result = np.empty((n, *self.image_shape), np.float32)
        done = 0
        while done < n:
            # Powers of two up to batch_size: few programs to compile, whatever values n takes.
            size = min(batch_size or 64 * devices, 1 << (n - done - 1).bit_length())
            size = -(-size // devices) * devices
            indices = (start + done + np.arange(size, dtype=np.uint64)).astype(np.uint32)
            if mesh:
                indices = jax.device_put(indices, batch_sharding(mesh))
            count = min(size, n - done)
            result[done : done + count] = np.asarray(_sample(self, params, rng, indices))[:count]
            done += count
        return result


def seed_key(seed: int):
    """The key of `seed`, of the one implementation that runs are made with, whatever jax's default."""
    return jax.random.key(seed, impl="threefry2x32")


def example_keys(rng, indices):
    """fold_in(rng, i) for each of `indices` [B]: keys [B].

    Raises ValueError if `rng` is not a threefry key: what the others draw depends on the batch.
    """
    if "threefry" not in str(jax.random.key_impl(rng)):
        raise ValueError(f"rng: a threefry key is needed, got {jax.random.key_impl(rng)}; use jax.random.key(seed)")
    return jax.vmap(lambda i: jax.random.fold_in(rng, i))(indices)


def random_flip(keys, images):
    """Images [B,H,W,C], each mirrored left to right with probability 1/2 by its own key of `keys` [B]."""
    flip = jax.vmap(jax.random.bernoulli)(_fold(keys, FLIP))
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def _fold(keys, number: int):
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


@functools.partial(jax.jit, static_argnums=0)
def _init(ddpm: DDPM, rng):
    return init_params(ddpm.network, rng, ddpm.image_shape)


@functools.partial(jax.jit, static_argnums=0)
def _sample(ddpm: DDPM, params, rng, indices):
    diffusion = ddpm.config.diffusion
    x_0 = samplers.ancestral(
        ddpm.schedule,
        functools.partial(ddpm.denoise, params),
        example_keys(rng, indices),
        ddpm.image_shape,
        prediction=diffusion.prediction,
        variance=diffusion.variance,
    )
    # The mean is not clipped where the network predicts it.
    return jnp.clip(x_0, -1, 1)
