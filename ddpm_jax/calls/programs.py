"""The compiled programs that DDPM runs: a whole chain, or a part of one.

They take the DDPM, and a Sampler that it resolved, as static arguments. A program that runs a
part takes the steps number first, ..., last - 1 and returns the new state and which images are
finite. The bounds are arguments: one program for all parts.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import likelihood
from ddpm_jax.calibration import optimal_variance
from ddpm_jax.calls.conditions import Condition, denoise_fn_of
from ddpm_jax.calls.ready import ready
from ddpm_jax.config import Config
from ddpm_jax.devices.segments import are_finite
from ddpm_jax.diffusion import Clip, DenoiseFn, p_mean_variance, x_0_denoiser
from ddpm_jax.keys import example_keys, gaussian_noise
from ddpm_jax.models import init_params
from ddpm_jax.sampler import Sampler
from ddpm_jax.samplers import State, ancestral_step, ddim_encode_step, start_state
from ddpm_jax.schedule import Schedule, strided
from ddpm_jax.shapes import AnyKey, AnyKeys, Array, Bool, Float, Int, Integer, PyTree

Index = Int[Array, ""] | int
Images = Float[jax.Array, "b h w c"]
Finite = Bool[jax.Array, " b"]


@functools.partial(jax.jit, static_argnums=(0, 1))
def sample_batch(
    ddpm: Any,
    sampler: Sampler,
    params: PyTree,
    condition: Condition,
    rng: AnyKey,
    indices: Integer[Array, " b"],
) -> Images:
    """Images of the key `rng`, one for each of `indices`: all of `DDPM.sample` as one program."""
    params = ready(ddpm, params)
    schedule, denoise_fn, options = chain_of(ddpm, sampler, params, condition)
    keys = example_keys(rng, indices)
    x_0 = sampler.method(schedule, denoise_fn, keys, ddpm.image_shape, **options)
    return within_bounds(ddpm, x_0)


def within_bounds(ddpm: Any, x: Any) -> Any:
    """Finished images x clipped to [-1, 1] where the data have bounds; NumPy's in place.

    The mean is not clipped where the network predicts it, and nothing without diffusion.clip.
    """
    if not ddpm.config.data.value_kind.bounded:
        return x
    return np.clip(x, -1, 1, out=x) if isinstance(x, np.ndarray) else jnp.clip(x, -1, 1)


@functools.partial(jax.jit, static_argnums=0)
def init(ddpm: Any, rng: AnyKey) -> PyTree:
    """Fresh parameters."""
    return init_params(ddpm.network, rng, ddpm.image_shape)


@functools.partial(jax.jit, static_argnums=(0, 1))
def begin(
    ddpm: Any, sampler: Sampler, rng: AnyKey, indices: Integer[Array, " b"]
) -> tuple[AnyKeys, State]:
    """The keys of images and the State before their first step."""
    keys = example_keys(rng, indices)
    return keys, start_state(keys, ddpm.image_shape, memory=sampler.method.memory)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def advance(
    ddpm: Any,
    sampler: Sampler,
    clip: Clip,
    params: PyTree,
    condition: Condition,
    keys: AnyKeys | None,
    state: State,
    first: Index,
    last: Index,
) -> tuple[State, Finite]:
    """A part of the chain that `sampler` takes."""
    schedule, denoise_fn, options = chain_of(ddpm, sampler, params, condition)
    options["clip"] = clip
    step = sampler.method.bound_step(schedule, denoise_fn, keys, ddpm.image_shape, **options)
    S = schedule.num_timesteps
    state = jax.lax.fori_loop(first, last, lambda i, state: step(state, S - 1 - i), state)
    return state, are_finite(state.x)


class Grid(NamedTuple):
    """A strided chain as an argument of a program, its rows filled up to a length of all chains."""

    schedule: Schedule
    tables: PyTree
    """Those of the method; None where it has none."""
    variance: Float[Array, " rows"] | None
    """Of each ancestral step; None for other samplers."""


@functools.partial(jax.jit, static_argnums=(0, 1))
def advance_on(
    ddpm: Any,
    sampler: Sampler,
    params: PyTree,
    condition: Condition,
    grid: Grid,
    start: Index,
    keys: AnyKeys | None,
    state: State,
    first: Index,
    last: Index,
) -> tuple[State, Finite]:
    """A part of the chain on `grid` from its step `start` - 1 down, by one program for all grids.

    `sampler` says the method and its options, but not the steps.
    """
    channels = ddpm.image_shape[-1]
    whole = denoise_fn_of(ddpm, params, condition)

    def denoise_fn(x_t, t):
        return whole(x_t, t)[..., :channels]

    diffusion = ddpm.config.diffusion
    step = sampler.method.bound_step(
        grid.schedule,
        x_0_denoiser(ddpm.schedule, denoise_fn, prediction=diffusion.prediction),
        keys,
        ddpm.image_shape,
        prediction="x_0",
        variance="fixed_small" if grid.variance is None else grid.variance,
        clip=diffusion.clip,
        tables=grid.tables,
        **sampler.step_options,
    )
    state = jax.lax.fori_loop(first, last, lambda i, state: step(state, start - 1 - i), state)
    return state, are_finite(state.x)


@functools.partial(jax.jit, static_argnums=(0, 1))
def encode(
    ddpm: Any,
    sampler: Sampler,
    params: PyTree,
    condition: Condition,
    x: Images,
    first: Index,
    last: Index,
) -> tuple[Images, Finite]:
    """A part of `ddim_encode`."""
    schedule, denoise_fn, options = chain_of(ddpm, sampler, params, condition)
    taken = ("prediction", "variance")
    of_step = {name: options[name] for name in taken}

    def step(t, x):
        return ddim_encode_step(schedule, denoise_fn, x, t, **of_step)

    x = jax.lax.fori_loop(first, last, step, x)
    return x, are_finite(x)


@functools.partial(jax.jit, static_argnums=0)
def reverse(
    ddpm: Any,
    params: PyTree,
    condition: Condition,
    keys: AnyKeys,
    start: Index,
    state: tuple[Images, Images],
    first: Index,
    last: Index,
) -> tuple[tuple[Images, Images], Finite]:
    """A part of Algorithm 2 from step `start` - 1 down: (x, the predicted x_0)."""
    options = _of_one_step(ddpm.config)
    denoise_fn = denoise_fn_of(ddpm, params, condition)

    def step(i, state):
        x_t, _ = state
        t = start - 1 - i
        t_batch = jnp.full(x_t.shape[:1], t, jnp.int32)
        output = denoise_fn(x_t, t_batch)
        p = p_mean_variance(ddpm.schedule, output, x_t, t_batch, **options)
        return ancestral_step(p, t, gaussian_noise(keys, t, ddpm.image_shape)), p.x_0

    state = jax.lax.fori_loop(first, last, step, state)
    return state, are_finite(state[0])


Curves = tuple[Float[jax.Array, "b T ..."], ...]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def bounds(
    ddpm: Any,
    sampler: Sampler,
    cells: tuple[int, int] | None,
    params: PyTree,
    condition: Condition,
    rng: AnyKey,
    indices: Integer[Array, " b"],
    x_0: Images,
    state: Curves,
    first: Index,
    last: Index,
) -> tuple[Curves, Finite]:
    """A part of what `likelihood.bound_at` says of a chain's steps."""
    schedule, denoise_fn, options = chain_of(ddpm, sampler, params, condition)
    keys = example_keys(rng, indices)
    of_step = {name: options[name] for name in ("prediction", "variance")}
    clip = bool(options["clip"])

    def step(t, state):
        of_t = likelihood.bound_at(
            schedule,
            denoise_fn,
            keys,
            x_0,
            t,
            **of_step,
            clip=clip,
            levels=ddpm.levels,
            cells=cells,
        )
        return jax.tree.map(lambda all_t, one: all_t.at[:, t].set(one), state, of_t)

    state = jax.lax.fori_loop(first, last, step, state)
    return state, are_finite(state[0])


@functools.partial(jax.jit, static_argnums=0)
def decoder_bits(
    ddpm: Any,
    params: PyTree,
    condition: Condition,
    rng: AnyKey,
    indices: Integer[Array, " b"],
    x_0: Images,
    variances: Float[Array, " V"],
) -> Float[jax.Array, "b V"]:
    """L_0 of images with each of the variances."""
    options = _of_one_step(ddpm.config)
    options["clip"] = bool(options["clip"])
    options["levels"] = ddpm.levels
    denoise_fn = denoise_fn_of(ddpm, params, condition)
    keys = example_keys(rng, indices)
    return likelihood.decoder_bits(ddpm.schedule, denoise_fn, keys, x_0, variances, **options)


@functools.partial(jax.jit, static_argnums=(0, 1))
def whole_bound(
    ddpm: Any, sampler: Sampler, x_0: Images, parts: Curves
) -> likelihood.BitsPerDim | likelihood.BitsAndCells:
    """The bound, put together."""
    schedule = strided(ddpm.schedule, sampler.timesteps_of(ddpm.config.diffusion))
    return likelihood.whole_bound(schedule, x_0, *parts)


def chain_of(
    ddpm: Any,
    sampler: Sampler,
    params: PyTree,
    condition: Condition,
    steps: tuple[int, ...] | None = None,
) -> tuple[Schedule, DenoiseFn, dict[str, Any]]:
    """(schedule, denoise_fn, the method's options) of the chain that `sampler` takes.

    `steps` are those of the T that it takes, where they are not the sampler's own.
    """
    diffusion = ddpm.config.diffusion
    prediction = diffusion.prediction
    variance = sampler.variance_of(diffusion)
    channels = ddpm.image_shape[-1]
    whole = denoise_fn_of(ddpm, params, condition)

    def denoise_fn(x_t, t):
        output = whole(x_t, t)
        return output if variance == diffusion.variance else output[..., :channels]

    measured = variance == "optimal"
    if measured or sampler.strides(diffusion):
        denoise_fn = x_0_denoiser(ddpm.schedule, denoise_fn, prediction=prediction)
        prediction = "x_0"
    taken = sampler.timesteps_of(diffusion) if steps is None else np.array(steps)
    schedule = strided(ddpm.schedule, taken)
    options = {
        "prediction": prediction,
        "variance": _best_variance(ddpm, schedule) if measured else variance,
        "clip": diffusion.clip,
        "original": ddpm.schedule,
    }
    return schedule, denoise_fn, {**options, **sampler.step_options}


def _best_variance(ddpm: Any, schedule: Schedule):
    calibration = ddpm.calibration
    return optimal_variance(schedule, calibration.mse, calibration.decoder)


def _of_one_step(config: Config) -> dict:
    """The options of `p_mean_variance` on the whole chain."""
    diffusion = config.diffusion
    return {
        "prediction": diffusion.prediction,
        "variance": diffusion.variance,
        "clip": diffusion.clip,
    }
