"""DDPM: the schedule, the network and the image's shape bound together; what users call."""

import dataclasses
import functools
import hashlib
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import likelihood, losses
from ddpm_jax.config import Config, SamplerName, names_where, value_of
from ddpm_jax.data.images import warn_of_range
from ddpm_jax.devices.mesh import fetch, mesh_of, place
from ddpm_jax.devices.rows import full_batches
from ddpm_jax.diffusion import p_mean_variance, x_0_denoiser
from ddpm_jax.keys import DROPOUT, NOISE, example_keys, fold, gaussian_noise, random_times
from ddpm_jax.likelihood import BitsPerDim
from ddpm_jax.models import UNet, init_params
from ddpm_jax.sampler import Sampler, as_sampler
from ddpm_jax.samplers import ancestral_step, ddim, ddim_encode
from ddpm_jax.schedule import Schedule, make_schedule, strided
from ddpm_jax.shapes import AnyKey, AnyKeys, Array, Float, Int, Integer, PyTree

# The order in which the first digests hashed these fields; saved files compare them.
HASHED_FIRST = (
    "diffusion.prediction",
    "diffusion.variance",
    "diffusion.clip",
    "model.norm_groups",
    "model.dtype",
    "data.image_shape",
)


@dataclasses.dataclass(frozen=True)
class DDPM:
    """The model that `config` describes.

    Holds no weights; frozen and hashable, so jit takes it as static.
    """

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
        first = tuple(value_of(self.config, name) for name in HASHED_FIRST)
        hashed = hashlib.blake2b(repr(first).encode(), digest_size=8)
        hashed.update(np.asarray(self.schedule.betas))
        default = Config()
        for name in names_where(Config, lambda field: field.images and not field.through_betas):
            value = value_of(self.config, name)
            # A default leaves the digest as it was before there was such a field.
            if name not in HASHED_FIRST and value != value_of(default, name):
                hashed.update(f"{name} {value!r}".encode())
        return hashed.hexdigest()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image."""
        return self.config.data.image_shape

    def init(self, rng: AnyKey) -> PyTree:
        """Fresh parameters: a tree of float32 arrays."""
        return _init(self, rng)

    def denoise(
        self, params: PyTree, x_t: Float[Array, "b h w c"], t: Int[Array, " b"]
    ) -> Float[jax.Array, "b h w outputs"]:
        """The network's output for x_t at the original 0-based steps t; no dropout.

        It has 2 C channels where the variance is learned.
        """
        return jnp.asarray(self.network.apply({"params": params}, x_t, t))

    def loss(
        self,
        params: PyTree,
        rng: AnyKey,
        x_0: Float[Array, "b h w c"],
        *,
        rows: Integer[Array, " b"] | None = None,
        train: bool = False,
    ) -> Float[jax.Array, " b"]:
        """config.diffusion.loss of images x_0 in [-1, 1], t uniform.

        Dropout is on only if `train`. Example i draws its t, noise and dropout from
        fold_in(rng, rows[i]); `rows` are 0, ..., B - 1 unless x_0 is a part of a batch.
        Raises TypeError for images that are not floats.
        """
        rows = jnp.arange(len(x_0), dtype=jnp.uint32) if rows is None else rows
        return self.loss_of_examples(params, example_keys(rng, rows), x_0, train=train)

    def loss_of_examples(
        self,
        params: PyTree,
        keys: AnyKeys,
        x_0: Float[Array, "b h w c"],
        *,
        train: bool = False,
    ) -> Float[jax.Array, " b"]:
        """As `loss`, with the key of each example."""
        _check_images(x_0)
        diffusion = self.config.diffusion
        t = random_times(keys, self.schedule.num_timesteps)
        noise = gaussian_noise(keys, NOISE, x_0.shape[1:])
        dropout_keys = fold(keys, DROPOUT) if train else None

        def denoise_fn(x_t, timesteps):
            return self.network.apply({"params": params}, x_t, timesteps, dropout_keys)

        return losses.training_loss(
            diffusion.loss,
            self.schedule,
            denoise_fn,
            x_0,
            t,
            noise,
            prediction=diffusion.prediction,
            variance=diffusion.variance,
            weight=losses.weight_of(diffusion.weighting, diffusion.min_snr_gamma),
        )

    def sample(
        self,
        params: PyTree,
        rng: AnyKey,
        n: int,
        *,
        start: int = 0,
        batch_size: int | None = None,
        sampler: Sampler | SamplerName = "ancestral",
        **options: Any,
    ) -> np.ndarray:
        """Images start, ..., start + n - 1 of the key `rng`, float32 [n,H,W,C] in [-1, 1].

        `sampler` is a Sampler, or the name of one with its fields as `options`: `steps` of the T
        (default all) on the `grid` of `samplers.time_grid`, `eta` of ddim (default 0). For
        example sampler="ddim", steps=50.
        Image i is made from fold_in(rng, i) alone: the same for any n, start, batch_size and
        number of devices. `batch_size` (default 64 a device) bounds the memory; the result is in
        the host's memory. Where params are on a mesh of several devices, these share the work.
        Raises ValueError for a negative n or start, a batch_size below 1, or a sampler that does
        not fit the model.
        """
        if n < 0 or start < 0 or start + n > 2**32:
            raise ValueError(
                "n and start: must satisfy 0 <= start <= start + n <= 2**32, "
                f"got n {n} and start {start}"
            )
        chosen = as_sampler(sampler, **options)
        chosen.check(self.config.diffusion)
        n = operator.index(n)
        mesh = mesh_of(params)
        result = np.empty((n, *self.image_shape), np.float32)
        for rows, count in _batches(n, batch_size, mesh):
            indices = (start + rows).astype(np.uint32)
            images = sample_batch(self, chosen, params, rng, place(indices, mesh))
            result[rows[:count]] = fetch(images)[:count]
        return result

    def reverse(
        self,
        params: PyTree,
        keys: AnyKeys,
        x: Float[Array, "b h w c"],
        start: int,
        stop: int = 0,
    ) -> tuple[Float[jax.Array, "b h w c"], Float[jax.Array, "b h w c"]]:
        """Algorithm 2 between any two steps: (x, x_0).

        x was diffused `start` times (T is pure noise, k is q_sample at t = k - 1), the
        x that is returned `stop` times (0 is an image); x_0 is the prediction of the last step.
        Row i's noise at step t comes from fold_in(keys[i], t).
        Raises ValueError unless 0 <= stop < start <= T.
        """
        T = self.schedule.num_timesteps
        if not 0 <= stop < start <= T:
            raise ValueError(
                f"start and stop: must satisfy 0 <= stop < start <= {T}, got {start} and {stop}"
            )
        return _share_rows(
            lambda keys, x: _reverse(self, params, keys, x, start, stop), params, keys, x
        )

    def encode(
        self, params: PyTree, x_0: Float[Array, "b h w c"], *, steps: int | None = None
    ) -> Float[jax.Array, "b h w c"]:
        """The DDIM latents x_T of images x_0 in [-1, 1].

        `steps` as in `sample`; `decode` with as many steps takes them back to about x_0. Raises
        TypeError for images that are not floats.
        """
        _check_images(x_0)
        sampler = self._ddim(steps)
        return _share_rows(lambda x_0: _encode(self, sampler, params, x_0), params, x_0)

    def decode(
        self, params: PyTree, x_T: Float[Array, "b h w c"], *, steps: int | None = None
    ) -> Float[jax.Array, "b h w c"]:
        """Images x_0 of latents x_T: DDIM with eta = 0, nothing clipped."""
        sampler = self._ddim(steps)
        return _share_rows(lambda x_T: _decode(self, sampler, params, x_T), params, x_T)

    def _ddim(self, steps: int | None) -> Sampler:
        sampler = Sampler("ddim", steps)
        sampler.check(self.config.diffusion)
        return sampler

    def bits_per_dim(
        self,
        params: PyTree,
        rng: AnyKey,
        x_0: Float[Array, "b h w c"],
        *,
        start: int = 0,
        batch_size: int | None = None,
    ) -> BitsPerDim:
        """The bound on -log2 p of images x_0 and its parts, as NumPy arrays.

        See `likelihood.bits_per_dim`. Images are those of uint8, x / 127.5 - 1. Image i is diffused
        with noise of fold_in(rng, start + i). `batch_size` and devices as in `sample`.
        Raises TypeError for images that are not floats, ValueError for a negative start.
        """
        _check_images(x_0)
        if start < 0 or start + len(x_0) > 2**32:
            raise ValueError(
                f"start: must satisfy 0 <= start <= start + images <= 2**32, got {start}"
            )
        n = len(x_0)
        T = self.schedule.num_timesteps
        mesh = mesh_of(params)
        result = BitsPerDim(
            total=np.empty(n, np.float32),
            prior=np.empty(n, np.float32),
            terms=np.empty((n, T), np.float32),
            mse=np.empty((n, T), np.float32),
        )
        for rows, count in _batches(n, batch_size, mesh):
            first = np.uint32(start + rows[0])
            bits = _bits_per_dim(self, params, rng, place(x_0[rows], mesh), first)
            for field, of_batch in zip(result, fetch(bits), strict=True):
                field[rows[:count]] = of_batch[:count]
        return result


@functools.partial(jax.jit, static_argnums=(0, 1))
def sample_batch(
    ddpm: DDPM,
    sampler: Sampler,
    params: PyTree,
    rng: AnyKey,
    indices: Integer[Array, " b"],
) -> Float[jax.Array, "b h w c"]:
    """Images of the key `rng`, one for each of `indices`."""
    schedule, denoise_fn, options = _chain(ddpm, sampler, params)
    x_0 = sampler.method(
        schedule,
        denoise_fn,
        example_keys(rng, indices),
        ddpm.image_shape,
        clip=ddpm.config.diffusion.clip,
        **options,
        **sampler.step_options,
    )
    # The mean is not clipped where the network predicts it, and nothing without diffusion.clip.
    return jnp.clip(x_0, -1, 1)


@functools.partial(jax.jit, static_argnums=0)
def _init(ddpm: DDPM, rng):
    return init_params(ddpm.network, rng, ddpm.image_shape)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(ddpm: DDPM, sampler: Sampler, params, x_0):
    schedule, denoise_fn, options = _chain(ddpm, sampler, params)
    return ddim_encode(schedule, denoise_fn, x_0, **options)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(ddpm: DDPM, sampler: Sampler, params, x_T):
    schedule, denoise_fn, options = _chain(ddpm, sampler, params)
    return ddim(schedule, denoise_fn, None, ddpm.image_shape, x_T=x_T, clip=False, **options)


def _chain(ddpm: DDPM, sampler: Sampler, params):
    """(schedule, denoise_fn, {prediction, variance}) of the steps that `sampler` takes."""
    diffusion = ddpm.config.diffusion
    schedule = ddpm.schedule
    prediction = diffusion.prediction
    variance = sampler.variance(diffusion)
    channels = ddpm.image_shape[-1]

    def denoise_fn(x_t, t):
        output = ddpm.denoise(params, x_t, t)
        return output if variance == diffusion.variance else output[..., :channels]

    if sampler.strides(diffusion):
        denoise_fn = x_0_denoiser(schedule, denoise_fn, prediction=prediction)
        prediction = "x_0"
        schedule = strided(schedule, sampler.timesteps(diffusion))
    return schedule, denoise_fn, {"prediction": prediction, "variance": variance}


@functools.partial(jax.jit, static_argnums=0)
def _reverse(ddpm: DDPM, params, keys, x, start, stop):
    options = _of_one_step(ddpm.config)

    def step(i, carry):
        x_t, _ = carry
        t = start - 1 - i
        t_batch = jnp.full(x_t.shape[:1], t, jnp.int32)
        output = ddpm.denoise(params, x_t, t_batch)
        p = p_mean_variance(ddpm.schedule, output, x_t, t_batch, **options)
        return ancestral_step(p, t, gaussian_noise(keys, t, ddpm.image_shape)), p.x_0

    # Bounds that are not part of the program: one to compile, whatever the steps.
    return jax.lax.fori_loop(0, start - stop, step, (x, x))


@functools.partial(jax.jit, static_argnums=0)
def _bits_per_dim(ddpm: DDPM, params, rng, x_0, start):
    denoise_fn = functools.partial(ddpm.denoise, params)
    options = _of_one_step(ddpm.config)
    return likelihood.bits_per_dim(ddpm.schedule, denoise_fn, rng, x_0, start=start, **options)


def _of_one_step(config: Config) -> dict:
    """The options of `p_mean_variance` on the whole chain."""
    diffusion = config.diffusion
    return {
        "prediction": diffusion.prediction,
        "variance": diffusion.variance,
        "clip": diffusion.clip,
    }


def _batches(n: int, batch_size: int | None, mesh):
    """Batches of at most `batch_size`, 64 a device by default; see `full_batches`."""
    devices = mesh.size if mesh else 1
    size = 64 * devices if batch_size is None else batch_size
    return full_batches(n, size, shrink=True, multiple=devices)


def _share_rows(call, params, *batched):
    """call(*batched), by all devices where params are on a mesh of several."""
    mesh = mesh_of(params)
    if mesh is None:
        return call(*batched)
    n = len(batched[0])
    ((rows, _),) = full_batches(n, n, multiple=mesh.size)
    result = call(*(place(array[rows], mesh) for array in batched))
    return jax.tree.map(lambda array: array[:n], fetch(result))


def _check_images(x_0) -> None:
    if not jnp.issubdtype(x_0.dtype, jnp.floating):
        raise TypeError(f"x_0: must be floats in [-1, 1], got {x_0.dtype}; use x / 127.5 - 1")
    warn_of_range(x_0)
