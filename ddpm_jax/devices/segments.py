"""A long loop on the device, run as segments: it can be watched, and Ctrl-C ends it soon.

A compiled loop says nothing until it ends, and Python cannot interrupt it. So a chain's steps run
as segments of about half a second, all by one program that takes its bounds as arguments. The
bits do not depend on where the cuts are.
"""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ddpm_jax.devices.mesh import fetch
from ddpm_jax.devices.processes import agreed
from ddpm_jax.devices.progress import progress_bar
from ddpm_jax.errors import NonFiniteSamples
from ddpm_jax.shapes import Array, Bool, Float, PyTree

log = logging.getLogger(__name__)

SECONDS = 0.5
"""About how long one segment takes; a single step may take longer."""

Progress: TypeAlias = bool | tqdm
"""True for a bar of the steps, False for none, or the caller's tqdm, which is updated."""

Tag = TypeVar("Tag")


def segments(steps: int) -> Iterator[tuple[int, int]]:
    """Cuts `steps` into (first, last), each to be run before the next is asked for.

    The first is one step: it may have to be compiled. The later ones are as long as the speed so
    far makes them last `SECONDS`. All processes get the same cuts, those of process 0.
    """
    first = 0
    length = 1
    while first < steps:
        last = min(first + length, steps)
        begin = time.perf_counter()
        yield first, last
        seconds = time.perf_counter() - begin
        if last < steps:
            length = int(agreed(next_length(last - first, seconds)))
        first = last


def next_length(length: int, seconds: float) -> int:
    """The steps of the next segment, where `length` steps took `seconds`; at most 8 times more."""
    if seconds * 8 <= SECONDS:
        return 8 * length
    return max(1, int(length * SECONDS / seconds))


@contextlib.contextmanager
def moving(progress: Progress, total: int, desc: str) -> Iterator[Callable[[int], Any]]:
    """A function that moves `progress` on by a number of steps."""
    if not isinstance(progress, bool):
        yield progress.update
    elif progress:
        with progress_bar(total=total, desc=desc, unit="step", always=True) as bar:
            yield bar.update
    else:
        yield lambda steps: None


def are_finite(x: Float[Array, "b *shape"]) -> Bool[jax.Array, " b"]:
    """Which of a batch hold finite numbers alone."""
    return jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))


def watched(
    program: Any, args: tuple, state: PyTree, steps: np.ndarray, move: Callable[[int], Any]
) -> PyTree:
    """`state` after all `steps` of a chain, which `program` runs in segments.

    program(*args, state, first, last) is jitted and returns the state after the steps number first,
    ..., last - 1, and which images of it are finite. Its bounds are arrays: one program for all.
    `steps` are the original steps t in the order of the chain. Calls `move` after each segment with
    its number of steps. Raises NonFiniteSamples, which names the step, if the state does not stay
    finite.
    """
    if _is_traced(args, state):  # Within a user's own jit or grad: one loop.
        return program.__wrapped__(*args, state, 0, len(steps))[0]
    *_, state = _parts(program, args, state, steps, move)
    return state


def watched_each(
    program: Any,
    batches: Iterable[tuple[Tag, tuple, PyTree]],
    steps: np.ndarray,
    move: Callable[[int], Any],
) -> Iterator[tuple[Tag, PyTree]]:
    """As `watched`, for one batch (tag, args, state) after another: yields (tag, its last state).

    The first segment of a batch is dispatched before the batch before it is waited for: the device
    has work while the host fetches what is finished. There is at least one step.
    """
    last: tuple[Tag, Iterator[PyTree]] | None = None
    for tag, args, state in batches:
        parts = _parts(program, args, state, steps, move)
        next(parts)  # The first segment is dispatched.
        if last is not None:
            yield last[0], next(last[1])
        next(parts)  # And now the last.
        last = tag, parts
    if last is not None:
        yield last[0], next(last[1])


def _parts(program, args, state, steps, move) -> Iterator[PyTree]:
    """Runs a chain; yields when its first segment is dispatched, when its last is, and its end."""
    _announce(program, args[0], len(jax.tree.leaves(state)[0]))
    state = placed(state)
    for first, last in segments(len(steps)):
        after, finite = program(*args, state, np.int32(first), np.int32(last))
        if first == 0:
            yield state
        if last == len(steps):
            yield state
        if not fetch(finite).all():
            _raise_not_finite(program, args, state, steps, first, last)
        state = placed_as(after, state)
        move(last - first)
    yield state


def placed(state: PyTree) -> PyTree:
    """`state`, its arrays bound to where they are: jax makes a program anew where one is not."""
    return jax.tree.map(lambda x: jax.device_put(x, jnp.asarray(x).sharding), state)


def placed_as(after: PyTree, before: PyTree) -> PyTree:
    """`after`, its arrays placed as those of `before`: elsewhere jax makes the program anew."""

    def placed_alike(x: jax.Array, like: jax.Array) -> jax.Array:
        return x if x.sharding == like.sharding else jax.device_put(x, like.sharding)

    return jax.tree.map(placed_alike, after, before)


def _raise_not_finite(program, args, state, steps, first, last):
    """Repeats a segment that went wrong, step by step, to find out where."""
    for i in range(first, last):
        state, finite = program(*args, state, np.int32(i), np.int32(i + 1))
        bad = np.sum(~fetch(finite))
        if bad:
            break
    raise NonFiniteSamples(
        f"samples: {bad or 'some'} of {len(finite)} images are not finite from step "
        f"t = {steps[i]} on, the chain's step {i + 1} of {len(steps)}; the weights may have "
        "diverged (take an earlier checkpoint), or model.dtype overflows (take float32)"
    )


def _is_traced(*trees) -> bool:
    """Whether jax is tracing: some array stands for its values only, or a new one would."""
    leaves = jax.tree.leaves((trees, jnp.zeros(())))
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


@functools.cache
def _announce(program, model: Any, size: int) -> None:
    log.info("compiling for batches of %d; the first step takes longer", size)
