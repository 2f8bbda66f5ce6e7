"""Relative entropy coding: a sample of one Gaussian, sent to who only knows another one.

Both sides draw the same candidates z_0, ..., z_{N-1} ~ N(0, I) from one key. The sender picks the
number of one that is distributed as N(d, I), and the receiver looks it up: about KL = |d|^2 / 2
nats tell it. This is the Poisson functional representation (Li & El Gamal 2018; Theis & Yosri
2022): of candidates that arrive one after another, the least arrival time over weight q(z) / p(z).

The weight has no bound here, so the exact search would not end: it ends after N candidates, and the
law of the choice is that of this truncated search.

Candidates are windows row[i : i + g] of one long row of normals, as long as a group of g dimensions
needs. Windows overlap, so N candidates cost N + g normals in place of N g, and all groups of all
images share them. Candidate j of a group is the window i = offset + j STRIDE modulo N: those that
overlap have numbers far from each other, or the choice between the first few would not be one
between independent ones. Every group has its own offset, and its dimensions have random signs.
So is one Poisson process shared, and every group takes its arrivals from a place of its own: if all
took them from the first on, one that came early by chance would be chosen in all groups at once.
After the last arrival the first ones follow, with the times between them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.shapes import AnyKey, Array, Float, Float32, Int, Int32

BLOCK = 2**22
"""Numbers of the windows that are weighed at a time, which bounds the memory."""

STRIDE = 2654435761
"""From the window of one candidate to that of the next: odd, and 2^32 over the golden ratio."""

BACK = pow(STRIDE, -1, 2**32)
"""BACK STRIDE is 1 modulo 2^32, and so modulo every smaller power of two."""

PLACES = 1024
"""Arrivals of the Poisson process that groups may begin with: later ones are less exact."""

GROUPS = 256
"""Groups whose numbers are found at a time."""

LEAST_GROUPS = 8
LEAST_WIDTH = 16
"""Groups and their dimensions are filled up to these numbers, or twice, four times as many, ..."""


@functools.partial(jax.jit, static_argnums=(1, 2))
def normals(key: AnyKey, candidates: int, dimensions: int) -> Float32[jax.Array, " n"]:
    """The row whose windows are the candidates for groups of at most so many dimensions."""
    return jax.random.normal(key, (candidates + dimensions,), jnp.float32)


@functools.partial(jax.jit, static_argnums=1)
def arrival_times(key: AnyKey, candidates: int) -> Float32[jax.Array, " N"]:
    """The arrival times of a Poisson process of rate 1."""
    return jnp.cumsum(jax.random.exponential(key, (candidates,), jnp.float32))


def choose(
    row: Float32[Array, " n"],
    times: Float32[Array, " N"],
    shifts: list[Float32[np.ndarray, " g"]],
    offsets: Int[np.ndarray, " M"],
) -> Int32[np.ndarray, " M"]:
    """The number of the candidate for each group, from 0 to N - 1: the sender's search.

    row       `normals`
    times     `arrival_times`
    shifts    the vector d of each group
    offsets   the window that is a group's candidate 0; its arrivals' place follows from that, too
    """
    numbers = np.empty(len(shifts), np.int32)
    widest = row.shape[0] - times.shape[0]  # That of an image.
    widths = np.array([min(_filled_up(d.size, LEAST_WIDTH), widest) for d in shifts], np.int32)
    for width in np.unique(widths):
        of_width = np.flatnonzero(widths == width)
        for start in range(0, of_width.size, GROUPS):
            some = of_width[start : start + GROUPS]
            d = np.zeros((_filled_up(some.size, LEAST_GROUPS), width), np.float32)
            for place, group in enumerate(some):
                d[place, : shifts[group].size] = shifts[group]
            first = np.zeros(len(d), np.int32)
            first[: some.size] = offsets[some]
            numbers[some] = np.asarray(_search(row, times, d, first))[: some.size]
    return numbers


def candidate(
    row: Float32[np.ndarray, " n"], candidates: int, offset: int, number: int, width: int
) -> Float32[np.ndarray, " g"]:
    """The normals of one candidate, of `candidates` in all: what the receiver looks up.

    `candidates` is a power of two.
    """
    first = (offset + number * STRIDE) % candidates
    return row[first : first + width]


def _filled_up(size: int, least: int) -> int:
    """The power of two from `least` on that holds `size`: every other size is a program more."""
    return max(least, 1 << (size - 1).bit_length())


@jax.jit
def _search(
    row: Float32[Array, " n"],
    times: Float32[Array, " N"],
    d: Float[Array, "M g"],
    offsets: Int[Array, " M"],
) -> Int32[jax.Array, " M"]:
    """The candidates of the least arrival time over weight, a block of windows at a time."""
    N = times.shape[0]
    width = d.shape[1]
    block = min(N, 1 << (max(1, BLOCK // width).bit_length() - 1))
    within = jnp.arange(block)[:, None] + jnp.arange(width)[None]
    # Dimensions that fill a group up have d = 0, and may look beyond the row's end.
    row = jnp.pad(row, (0, width))
    begin = offsets.astype(jnp.uint32) % min(PLACES, N)
    before = jnp.where(begin > 0, times[begin - 1], 0.0)[:, None]
    # The arrivals by their windows, for a group whose first arrival is of window 0.
    places = jnp.arange(N + block, dtype=jnp.uint32)
    of_windows = times[places * np.uint32(BACK) % N]
    zero = (offsets.astype(jnp.uint32) - begin * np.uint32(STRIDE)) % N

    def weigh(best, first):
        windows = jax.lax.dynamic_slice(row, (first,), (block + width,))[within]
        # log of q(z) / p(z), without its constant -|d|^2 / 2.
        log_weights = jnp.matmul(d, windows.T, precision="highest")
        begins = (first.astype(jnp.uint32) - zero) % N
        slices = jax.vmap(lambda at: jax.lax.dynamic_slice(of_windows, (at,), (block,)))(begins)
        since = slices - before
        scores = jnp.log(jnp.where(since > 0, since, since + times[-1])) - log_weights
        least = scores.min(axis=1)
        score, window = best
        better = least < score
        at = first + scores.argmin(axis=1).astype(jnp.int32)
        return (jnp.where(better, least, score), jnp.where(better, at, window)), None

    none = (jnp.full(d.shape[0], jnp.inf), jnp.zeros(d.shape[0], jnp.int32))
    (_, window), _ = jax.lax.scan(weigh, none, jnp.arange(0, N, block))
    number = (window - offsets).astype(jnp.uint32) * np.uint32(BACK) % N
    return number.astype(jnp.int32)
