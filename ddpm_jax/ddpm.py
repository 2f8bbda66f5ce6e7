"""DDPM: the schedule, the network and the image's shape bound together; what users call."""

import dataclasses
import functools
import hashlib
import logging
import operator
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import likelihood, losses, samplers
from ddpm_jax.config import Config, Diffusion
from ddpm_jax.devices.mesh import fetch, mesh_of, place
from ddpm_jax.diffusion import Variance, p_mean_variance, x_0_denoiser
from ddpm_jax.errors import UserError
from ddpm_jax.likelihood import BitsPerDim
from ddpm_jax.models import UNet, init_params
from ddpm_jax.samplers import Grid, example_keys, gaussian_noise
from ddpm_jax.schedule import Schedule, make_schedule, strided

log = logging.getLogger(__name__)

SamplerName = Literal["ancestral", "ddim", "dpm-solver++"]

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
        return make_schedule(
            diffusion.schedule, diffusion.num_timesteps, **diffusion.schedule_parameters
        )

    @functools.cached_property
    def network(self) -> UNet:
        """The Flax module."""
        model = self.config.model
        return UNet(
            out_channels=self.image_shape[-1] * (2 if self.config.diffusion.learns_variance else 1),
            base_channels=model.base_channels,
            channel_multipliers=model.channel_multipliers,
            num_res_blocks=model.num_res_blocks,
            attention_resolutions=model.attention_resolutions,
            dropout=model.dropout,
            norm_groups=model.norm_groups,
            dtype=jnp.dtype(model.dtype),
            remat=model.remat,
        )

    @functools.cached_property
    def process_digest(self) -> str:
        """A hash of all that, beside the parameters, decides which image a key gives."""
        model, diffusion = self.config.model, self.config.diffusion
        choices = (
            diffusion.prediction,
            diffusion.variance,
            diffusion.clip,
            model.norm_groups,
            model.dtype,
        )
        hashed = hashlib.blake2b(repr((*choices, self.image_shape)).encode(), digest_size=8)
        hashed.update(np.asarray(self.schedule.betas))
        return hashed.hexdigest()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image."""
        return self.config.data.image_shape

    def init(self, rng):
        """Fresh parameters: a tree of float32 arrays."""
        return _init(self, rng)

    def denoise(self, params, x_t, t):
        """The network's output for x_t [B,H,W,C] at the original 0-based steps t [B]; no dropout.

        [B,H,W,C], or [B,H,W,2C] where the variance is learned.
        """
        return self.network.apply({"params": params}, x_t, t)

    def loss(self, params, rng, x_0, *, rows=None, train: bool = False):
        """config.diffusion.loss [B] of images x_0 [B,H,W,C] in [-1, 1], t uniform; with dropout only if `train`.

        Example i draws its t, noise and dropout from fold_in(rng, rows[i]); `rows` [B] are 0, ..., B - 1
        unless x_0 is a part of a batch. Raises TypeError for images that are not floats.
        """
        _check_images(x_0)
        keys = example_keys(rng, jnp.arange(len(x_0), dtype=jnp.uint32) if rows is None else rows)
        t = jax.vmap(lambda key: jax.random.randint(key, (), 0, self.schedule.num_timesteps))(
            _fold(keys, TIME)
        )
        noise = gaussian_noise(keys, NOISE, x_0.shape[1:])
        dropout_keys = _fold(keys, DROPOUT) if train else None

        def denoise_fn(x_t, timesteps):
            return self.network.apply({"params": params}, x_t, timesteps, dropout_keys)

        diffusion = self.config.diffusion
        learned, weighted = (
            {"variance": diffusion.variance},
            {"min_snr_gamma": diffusion.min_snr_gamma},
        )
        loss, options = {
            "simple": (losses.simple, weighted),
            "vlb": (losses.vlb, learned),
            "hybrid": (losses.hybrid, learned | weighted),
        }[diffusion.loss]
        return loss(
            self.schedule, denoise_fn, x_0, t, noise, prediction=diffusion.prediction, **options
        )

    def sample(
        self,
        params,
        rng,
        n: int,
        *,
        start: int = 0,
        batch_size: int | None = None,
        sampler: SamplerName = "ancestral",
        steps: int | None = None,
        eta: float | None = None,
        grid: Grid | None = None,
    ) -> np.ndarray:
        """Images start, ..., start + n - 1 of the key `rng`, float32 [n,H,W,C] in [-1, 1].

        `sampler` is ancestral (Algorithm 2), ddim with its `eta` (default 0), or dpm-solver++; `steps` of
        the T are taken (default all), on the `grid` of `samplers.time_grid` (default linspace, and
        trailing for dpm-solver++).
        Image i is made from fold_in(rng, i) alone: the same for any n, start, batch_size and number
        of devices. `batch_size` (default 64 a device) bounds the memory; the result lies on the
        host. Where params lie on a mesh of several devices, they share the work.
        Raises ValueError for a negative n or start, a batch_size below 1, or a sampler that cannot be.
        """
        if n < 0 or start < 0 or start + n > 2**32:
            raise ValueError(
                f"n and start: 0 <= start <= start + n <= 2**32 is needed, got {n} and {start}"
            )
        chosen = Sampler(sampler, steps, eta, grid)
        chosen.check(self.config)
        n, mesh = operator.index(n), mesh_of(params)
        result = np.empty((n, *self.image_shape), np.float32)
        for done, count, size in _batches(n, batch_size, mesh):
            indices = (start + done + np.arange(size, dtype=np.uint64)).astype(np.uint32)
            images = sample_batch(self, chosen, params, rng, place(indices, mesh))
            result[done : done + count] = fetch(images)[:count]
        return result

    def reverse(self, params, keys, x, start: int, stop: int = 0):
        """Algorithm 2 between any two steps: (x, x_0), each [B,H,W,C].

        x [B,H,W,C] was diffused `start` times (T is pure noise, k is q_sample at t = k - 1), the x that is
        returned `stop` times (0 is an image); x_0 is what was predicted in the last step. Row i's noise
        at step t comes from fold_in(keys[i], t), keys [B]. Raises ValueError unless 0 <= stop < start <= T.
        """
        if not 0 <= stop < start <= self.schedule.num_timesteps:
            raise ValueError(
                f"start and stop: 0 <= {stop} < {start} <= {self.schedule.num_timesteps} must hold"
            )
        return _share_rows(
            lambda keys, x: _reverse(self, params, keys, x, start, stop), params, keys, x
        )

    def encode(self, params, x_0, *, steps: int | None = None):
        """The DDIM latents x_T [B,H,W,C] of images x_0 [B,H,W,C] in [-1, 1]; `steps` as in `sample`.

        `decode` with as many steps takes them back to about x_0. Raises TypeError for images that are not floats.
        """
        _check_images(x_0)
        sampler = self._ddim(steps)
        return _share_rows(lambda x_0: _encode(self, sampler, params, x_0), params, x_0)

    def decode(self, params, x_T, *, steps: int | None = None):
        """Images x_0 [B,H,W,C] of the latents x_T [B,H,W,C]: DDIM with eta = 0, nothing clipped."""
        sampler = self._ddim(steps)
        return _share_rows(lambda x_T: _decode(self, sampler, params, x_T), params, x_T)

    def _ddim(self, steps):
        sampler = Sampler("ddim", steps)
        sampler.check(self.config)
        return sampler

    def bits_per_dim(
        self, params, rng, x_0, *, start: int = 0, batch_size: int | None = None
    ) -> BitsPerDim:
        """The bound on -log2 p of images x_0 [B,H,W,C] and its parts: NumPy arrays, see `likelihood.bits_per_dim`.

        Images are those of uint8, x / 127.5 - 1. Image i is diffused with noise of fold_in(rng, start + i).
        `batch_size` and devices as in `sample`. Raises TypeError for images that are not floats,
        ValueError for a negative start.
        """
        _check_images(x_0)
        if start < 0 or start + len(x_0) > 2**32:
            raise ValueError(f"start: 0 <= start <= start + images <= 2**32 is needed, got {start}")
        n, T, mesh = len(x_0), self.schedule.num_timesteps, mesh_of(params)
        result = BitsPerDim(
            *(np.empty(shape, np.float32) for shape in ((n,), (n,), (n, T), (n, T)))
        )
        for done, count, size in _batches(n, batch_size, mesh):
            # A batch is filled up with the last image again, which does not count.
            images = x_0[np.minimum(done + np.arange(size), n - 1)]
            bits = _bits_per_dim(self, params, rng, place(images, mesh), np.uint32(start + done))
            for field, of_batch in zip(result, fetch(bits), strict=True):
                field[done : done + count] = of_batch[:count]
        return result


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How images are drawn; None for each one's default."""

    name: SamplerName = "ancestral"
    steps: int | None = None
    eta: float | None = None
    grid: Grid | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `DDPM.sample` that choose it."""
        return {"sampler": self.name, "steps": self.steps, "eta": self.eta, "grid": self.grid}

    def check(self, config: Config) -> None:
        """Raises UserError for what does not fit together, and says which variance a shortened chain takes."""
        if self.name not in get_args(SamplerName):
            raise UserError(
                f"sampler: {self.name!r} is not one of {', '.join(get_args(SamplerName))}"
            )
        if self.steps is None and self.grid is not None:
            raise UserError(
                f"grid: {self.grid} is for a number of steps; give one, or leave it out"
            )
        try:
            self.timesteps(config.diffusion)
        except ValueError as error:
            raise UserError(str(error)) from None
        if self.eta is not None and self.name != "ddim":
            raise UserError(f"eta: {self.name} has none; choose ddim, or leave it out")
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise UserError(f"eta: must be from 0 to 1, got {self.eta}")
        _say_which_variance(self, config.diffusion)

    def timesteps(self, diffusion: Diffusion) -> np.ndarray:
        """The steps it takes, ascending [S]."""
        T = diffusion.num_timesteps
        # linspace would have dpm-solver++ extrapolate over its widest step, the one down to t = 0.
        grid = self.grid or ("trailing" if self.name == "dpm-solver++" else "linspace")
        return samplers.time_grid(T, T if self.steps is None else self.steps, grid)

    def strides(self, diffusion: Diffusion) -> bool:
        """Whether it leaves steps out."""
        return self.steps not in (None, diffusion.num_timesteps)

    def variance(self, diffusion: Diffusion) -> Variance:
        """What a reverse step's variance is taken from.

        beta of a longer stride is far above what the reverse step needs, and a log-variance that was
        learned belongs to steps of length one: a shortened chain takes the posterior's in their place.
        """
        of_one_step = diffusion.variance in ("fixed_large", "learned")
        return "fixed_small" if of_one_step and self.strides(diffusion) else diffusion.variance


ANCESTRAL = Sampler()
"""Algorithm 2 with all T steps."""


@functools.cache
def _say_which_variance(sampler: Sampler, diffusion: Diffusion) -> None:
    if sampler.name == "ancestral" and sampler.variance(diffusion) != diffusion.variance:
        log.warning(
            "%d of %d steps: sampling with the posterior's variance (fixed_small), since %s is for single steps",
            *(sampler.steps, diffusion.num_timesteps, diffusion.variance),
        )


def seed_key(seed: int):
    """The key of `seed`, of the one implementation that runs are made with, whatever jax's default.

    Raises UserError unless 0 <= seed < 2**32.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"seed: must be at least 0 and below 2**32, got {seed}")
    return jax.random.key(seed, impl="threefry2x32")


def random_flip(keys, images):
    """Images [B,H,W,C], each mirrored left to right with probability 1/2 by its own key of `keys` [B]."""
    flip = jax.vmap(jax.random.bernoulli)(_fold(keys, FLIP))
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def _fold(keys, number: int):
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


@functools.partial(jax.jit, static_argnums=0)
def _init(ddpm: DDPM, rng):
    return init_params(ddpm.network, rng, ddpm.image_shape)


@functools.partial(jax.jit, static_argnums=(0, 1))
def sample_batch(ddpm: DDPM, sampler: Sampler, params, rng, indices):
    """Images [B,H,W,C] of the key `rng`, one for each of `indices` uint32 [B]: a batch of `DDPM.sample`."""
    draw = {
        "ancestral": samplers.ancestral,
        "ddim": functools.partial(samplers.ddim, eta=sampler.eta or 0.0),
        "dpm-solver++": samplers.dpm_solver,
    }[sampler.name]
    schedule, denoise_fn, options = _chain(ddpm, sampler, params)
    options["clip"] = ddpm.config.diffusion.clip
    x_0 = draw(schedule, denoise_fn, example_keys(rng, indices), ddpm.image_shape, **options)
    # The mean is not clipped where the network predicts it, and nothing without diffusion.clip.
    return jnp.clip(x_0, -1, 1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(ddpm: DDPM, sampler: Sampler, params, x_0):
    schedule, denoise_fn, options = _chain(ddpm, sampler, params)
    return samplers.ddim_encode(schedule, denoise_fn, x_0, **options)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(ddpm: DDPM, sampler: Sampler, params, x_T):
    schedule, denoise_fn, options = _chain(ddpm, sampler, params)
    return samplers.ddim(
        schedule, denoise_fn, None, ddpm.image_shape, x_T=x_T, clip=False, **options
    )


def _chain(ddpm: DDPM, sampler: Sampler, params):
    """(schedule, denoise_fn, {prediction, variance}) of the steps that `sampler` takes."""
    diffusion, schedule, prediction = (
        ddpm.config.diffusion,
        ddpm.schedule,
        ddpm.config.diffusion.prediction,
    )
    variance, channels = sampler.variance(diffusion), ddpm.image_shape[-1]

    def denoise_fn(x_t, t):
        output = ddpm.denoise(params, x_t, t)
        return output if variance == diffusion.variance else output[..., :channels]

    if sampler.strides(diffusion):
        denoise_fn, prediction = x_0_denoiser(schedule, denoise_fn, prediction=prediction), "x_0"
        schedule = strided(schedule, sampler.timesteps(diffusion))
    return schedule, denoise_fn, {"prediction": prediction, "variance": variance}


@functools.partial(jax.jit, static_argnums=0)
def _reverse(ddpm: DDPM, params, keys, x, start, stop):
    options = _of_one_step(ddpm.config.diffusion)

    def step(i, carry):
        x_t, t = carry[0], start - 1 - i
        t_batch = jnp.full(x_t.shape[:1], t, jnp.int32)
        output = ddpm.denoise(params, x_t, t_batch)
        p = p_mean_variance(ddpm.schedule, output, x_t, t_batch, **options)
        return samplers.ancestral_step(p, t, gaussian_noise(keys, t, ddpm.image_shape)), p.x_0

    # Bounds that are not part of the program: one to compile, whatever the steps.
    return jax.lax.fori_loop(0, start - stop, step, (x, x))


@functools.partial(jax.jit, static_argnums=0)
def _bits_per_dim(ddpm: DDPM, params, rng, x_0, start):
    denoise_fn = functools.partial(ddpm.denoise, params)
    options = _of_one_step(ddpm.config.diffusion)
    return likelihood.bits_per_dim(ddpm.schedule, denoise_fn, rng, x_0, start=start, **options)


def _of_one_step(diffusion: Diffusion) -> dict:
    """The options of `p_mean_variance` on the whole chain."""
    return dict(prediction=diffusion.prediction, variance=diffusion.variance, clip=diffusion.clip)


def _share_rows(call, params, *batched):
    """call(*batched), by all devices where params lie on a mesh of several; arrays with as many rows."""
    mesh, n = mesh_of(params), len(batched[0])
    if mesh is None:
        return call(*batched)
    # Filled up with the last row again, which does not count.
    rows = np.minimum(np.arange(-(-n // mesh.size) * mesh.size), n - 1)
    result = call(*(place(array[rows], mesh) for array in batched))
    return jax.tree.map(lambda array: array[:n], fetch(result))


def _batches(n: int, batch_size: int | None, mesh):
    """Yields (done, count, size): `count` images to make after `done`, in a batch of `size`.

    Sizes are powers of two up to batch_size: few programs to compile, whatever values n takes.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: must be at least 1, got {batch_size}")
    devices = mesh.size if mesh else 1
    done = 0
    while done < n:
        size = min(batch_size or 64 * devices, 1 << (n - done - 1).bit_length())
        size = -(-size // devices) * devices
        count = min(size, n - done)
        yield done, count, size
        done += count


def _check_images(x_0):
    if not jnp.issubdtype(x_0.dtype, jnp.floating):
        raise TypeError(f"x_0: floats in [-1, 1] are needed, got {x_0.dtype}; use x / 127.5 - 1")
