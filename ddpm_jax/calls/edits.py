"""Inpainting, variations and restoration of any number of images, by any network.

What `DDPM.inpaint`, `vary` and `restore` compute; the mathematics is in `editing`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ddpm_jax import editing
from ddpm_jax.calls import programs
from ddpm_jax.calls.batches import Drawing, batches, checked_start
from ddpm_jax.calls.conditions import Condition, conditions
from ddpm_jax.calls.inputs import check_concrete, check_key, checked_params
from ddpm_jax.calls.programs import Finite, Images, Index, chain_of
from ddpm_jax.calls.ready import ready
from ddpm_jax.devices.mesh import fetch, mesh_of, place
from ddpm_jax.devices.segments import are_finite, moving, watched
from ddpm_jax.errors import UserError, shown
from ddpm_jax.operators import ImageOperator, Operator, mask
from ddpm_jax.sampler import Sampler
from ddpm_jax.samplers import State, time_grid
from ddpm_jax.schedule import strided
from ddpm_jax.shapes import AnyKey, AnyKeys, Array, Bool, Float, PyTree


def inpaint(
    ddpm: Any,
    params: PyTree,
    rng: AnyKey,
    images: Any,
    known: Any,
    sampler: Sampler,
    passes: tuple[int, int],
    drawing: Drawing,
) -> np.ndarray:
    """As `DDPM.inpaint`; `passes` are (resample, jump), and `sampler` is resolved."""
    check_concrete("inpaint", images=images, mask=known)
    masks = _checked_mask(known, images.shape)
    timesteps = sampler.timesteps_of(ddpm.config.diffusion)
    walk = editing.inpaint_walk(len(timesteps), *passes)

    def edit(params, keys, state, condition, of_rows, move):
        args = (ddpm, sampler, passes, params, condition, keys, of_rows(images), of_rows(masks))
        return watched(_inpaint, args, state.x, timesteps[walk[:, 0]], move)

    drawn = _drawn(ddpm, params, rng, len(images), sampler, len(walk), edit, "inpainting", drawing)
    return np.where(masks, images, drawn)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _inpaint(
    ddpm: Any,
    sampler: Sampler,
    passes: tuple[int, int],
    params: PyTree,
    condition: Condition,
    keys: AnyKeys,
    known: Images,
    masks: Bool[Array, "b h w 1"],
    x: Images,
    first: Index,
    last: Index,
) -> tuple[Images, Finite]:
    """A part of `editing.inpaint`."""
    schedule, denoise_fn, options = chain_of(ddpm, sampler, params, condition)
    resample, jump = passes
    step = editing.inpaint_step(
        schedule,
        denoise_fn,
        keys,
        known,
        masks,
        resample=resample,
        jump=jump,
        **{name: options[name] for name in ("prediction", "variance", "clip")},
    )
    x = jax.lax.fori_loop(first, last, lambda position, x: step(x, position), x)
    return x, are_finite(x)


def _checked_mask(known: Any, shape: tuple[int, ...]) -> np.ndarray:
    """bool [N,H,W,1], True where pixels are known."""
    if not isinstance(known, Array):
        raise TypeError(f"mask: must be an array of jax or NumPy, got {type(known).__name__}")
    whole = np.asarray(mask(known).known)
    n, height, width, _ = shape
    if whole.shape[1:3] != (height, width) or whole.shape[0] not in (1, n):
        raise UserError(
            f"mask: must be [{height}, {width}], [{height}, {width}, 1] or [{n}, {height}, "
            f"{width}, 1], got {list(known.shape)}"
        )
    return np.broadcast_to(whole, (n, height, width, 1))


def vary(
    ddpm: Any,
    params: PyTree,
    rng: AnyKey,
    images: Any,
    strength: float,
    sampler: Sampler,
    drawing: Drawing,
) -> np.ndarray:
    """As `DDPM.vary`; `sampler` is resolved."""
    check_concrete("vary", images=images)
    timesteps = lowest_steps(ddpm, sampler, strength)

    def edit(params, keys, state, condition, of_rows, move):
        state = _diffuse(ddpm, timesteps, keys, of_rows(images), state)
        args = (ddpm, sampler, timesteps, params, condition, keys)
        return watched(chain_part, args, state, np.array(timesteps[::-1]), move).x

    return _drawn(ddpm, params, rng, len(images), sampler, len(timesteps), edit, "varying", drawing)


def lowest_steps(ddpm: Any, sampler: Sampler, strength: float) -> tuple[int, ...]:
    """The steps below `strength` of T that `sampler` takes; a number of steps lies among these."""
    if isinstance(strength, bool) or not 0 < strength <= 1:
        raise UserError(f"strength: must be above 0 and at most 1, got {shown(strength)}")
    k = max(1, round(strength * ddpm.schedule.num_timesteps))
    diffusion = ddpm.config.diffusion
    if sampler.timesteps is not None:
        below = tuple(t for t in sampler.timesteps if t < k)
        if not below:
            raise UserError(
                f"strength: {strength:g} goes up {k} steps, and the sampler takes none of these; "
                "choose a larger strength"
            )
        return below
    if not sampler.strides(diffusion):
        return tuple(range(k))
    steps = sampler.steps or k
    if steps > k:
        raise UserError(
            f"steps: strength {strength:g} goes up {k} steps, and {steps} are more; lower steps"
        )
    grid: Any = sampler.grid or sampler.method.grid  # None of those that are measured.
    return tuple(time_grid(k, steps, grid).tolist())


@functools.partial(jax.jit, static_argnums=(0, 1))
def _diffuse(
    ddpm: Any, timesteps: tuple[int, ...], keys: AnyKeys, images: Images, state: State
) -> State:
    """The State at the top of the chain of `timesteps`, from images."""
    schedule = strided(ddpm.schedule, np.array(timesteps))
    return State(editing.diffused(schedule, keys, images), state.memory)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def chain_part(
    ddpm: Any,
    sampler: Sampler,
    timesteps: tuple[int, ...],
    params: PyTree,
    condition: Condition,
    keys: AnyKeys,
    state: State,
    first: Index,
    last: Index,
) -> tuple[State, Finite]:
    """A part of the chain of `timesteps`, which take the place of those of `sampler`."""
    schedule, denoise_fn, options = chain_of(ddpm, sampler, params, condition, timesteps)
    return _part(ddpm, sampler, schedule, denoise_fn, keys, options, state, first, last)


def restore(
    ddpm: Any,
    params: PyTree,
    rng: AnyKey,
    y: Any,
    operator: Operator,
    noise: float,
    r2: Any,
    sampler: Sampler,
    drawing: Drawing,
) -> np.ndarray:
    """As `DDPM.restore`; `sampler` is resolved."""
    _check_damaged(ddpm, y, operator)
    check_concrete("restore", y=y, r2=r2)
    y = np.asarray(y, np.float32)
    timesteps = sampler.timesteps_of(ddpm.config.diffusion)
    r2 = None if r2 is None else np.asarray(r2, np.float32)
    noise = float(noise)

    def edit(params, keys, state, condition, of_rows, move):
        fixed, arrays = _split(operator, of_rows)
        args = (ddpm, sampler, noise, fixed, params, condition, keys, of_rows(y), arrays, r2)
        return watched(_restore, args, state, timesteps[::-1], move).x

    return _drawn(ddpm, params, rng, len(y), sampler, len(timesteps), edit, "restoring", drawing)


def _check_damaged(ddpm: Any, y: Any, operator: Operator) -> None:
    """Raises UserError unless `y` is a batch that the operator makes of the model's images."""
    if not isinstance(y, Array) or y.ndim != 4 or not jax.numpy.issubdtype(y.dtype, np.floating):
        found = f"{y.dtype} {list(y.shape)}" if isinstance(y, Array) else type(y).__name__
        raise UserError(f"y: must be an array of floats [N, h, w, c], got {found}")
    if not isinstance(operator, Operator):
        raise UserError(
            f"operator: {shown(operator)} has not the functions A, pinv and solve; make one with "
            "ddpm_jax.operators"
        )
    shape = jax.eval_shape(operator.pinv, jax.ShapeDtypeStruct(y.shape, np.float32)).shape
    if shape[1:] != ddpm.image_shape:
        raise UserError(
            f"y: of {list(y.shape[1:])} the operator makes images of {list(shape[1:])}, and this "
            f"model's are {list(ddpm.image_shape)}; give y another size, or choose another operator"
        )


def _split(operator: Any, of_rows: Callable[[Any], Any]) -> tuple[Any, Any]:
    """The operator as (a static argument, an argument of arrays), one of which is None.

    One that jax knows as a tree of arrays is no reason to compile anew where these differ.
    """
    if isinstance(operator, ImageOperator):
        known = operator.known
        if known is not None and known.shape[0] > 1:
            operator = dataclasses.replace(operator, known=of_rows(known))
        return None, operator
    is_tree = all(leaf is not operator for leaf in jax.tree.leaves(operator))
    return (None, operator) if is_tree else (operator, None)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _restore(
    ddpm: Any,
    sampler: Sampler,
    noise: float,
    fixed: Any,
    params: PyTree,
    condition: Condition,
    keys: AnyKeys,
    y: Images,
    arrays: Any,
    r2: Float[Array, " T"] | None,
    state: State,
    first: Index,
    last: Index,
) -> tuple[State, Finite]:
    """A part of `editing.restore`."""
    schedule, denoise_fn, options = chain_of(ddpm, sampler, params, condition)
    operator = arrays if fixed is None else fixed
    prediction = options["prediction"]
    denoise_fn = editing.conditioned(
        ddpm.schedule, denoise_fn, y, operator, prediction=prediction, noise=noise, r2=r2
    )
    options["prediction"] = "x_0"
    return _part(ddpm, sampler, schedule, denoise_fn, keys, options, state, first, last)


def _part(ddpm, sampler, schedule, denoise_fn, keys, options, state, first, last):
    """The steps number first, ..., last - 1 of a chain."""
    step = sampler.method.bound_step(schedule, denoise_fn, keys, ddpm.image_shape, **options)
    S = schedule.num_timesteps
    state = jax.lax.fori_loop(first, last, lambda i, state: step(state, S - 1 - i), state)
    return state, are_finite(state.x)


def _drawn(
    ddpm: Any,
    params: PyTree,
    rng: AnyKey,
    n: int,
    sampler: Sampler,
    steps: int,
    edit: Callable[..., Any],
    doing: str,
    drawing: Drawing,
) -> np.ndarray:
    """The edited images float32 [N,H,W,C] in [-1, 1], a batch at a time.

    edit(params, keys, state, condition, of_rows, move) edits a batch; of_rows(array) are the rows
    of an array that belong to it, and `state` is that before the first step of `sampler`.
    """
    check_concrete(doing, params=params, rng=rng, labels=drawing.labels)
    params = ready(ddpm, checked_params(params, ddpm.shapes))
    check_key(rng)
    start = checked_start(drawing.start, n)
    condition = conditions(
        ddpm.config.model, drawing.labels, n, drawing.guidance, drawing.guidance_interval
    )
    mesh = mesh_of(params)
    result = np.empty((n, *ddpm.image_shape), np.float32)
    todo = list(batches(n, drawing.batch_size, mesh))
    with moving(drawing.progress, len(todo) * steps, doing) as move:
        for rows, count in todo:
            indices = place((start + rows).astype(np.uint32), mesh)
            keys, state = programs.begin(ddpm, sampler, rng, indices)
            of_batch = condition.of(rows, mesh)

            def of_rows(array, rows=rows):
                return place(np.asarray(array)[rows], mesh)

            x = edit(params, keys, state, of_batch, of_rows, move)
            result[rows[:count]] = fetch(x)[:count]
    return programs.within_bounds(ddpm, result)
