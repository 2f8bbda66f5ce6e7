"""The reverse chain: one `lax.scan` over one pure step (Ho et al. 2020, Algorithm 2).

A sampler is a time grid, given as a `schedule.strided` chain, and a step. Every image has a key of
its own, and its noise at the original step t comes from fold_in(key, t) alone, so an image depends
neither on the batch it is drawn in nor on the number of devices.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion import (
    Clip,
    DenoiseFn,
    MeanVariance,
    Prediction,
    Variance,
    p_mean_variance,
)
from ddpm_jax.errors import UserError
from ddpm_jax.keys import START, gaussian_noise
from ddpm_jax.samplers.grids import Grid
from ddpm_jax.schedule import Schedule
from ddpm_jax.shapes import AnyKeys, Array, Float, Int


class Chain(NamedTuple):
    """A reverse chain as its steps see it; t is one index of `schedule` for the whole batch."""

    schedule: Schedule
    p: Callable[..., MeanVariance]
    """p(x_t [B,H,W,C], t): p(x_{t-1} | x_t), one call of the network."""
    noise: Callable[..., jax.Array]
    """noise(t): N(0, I) [B,H,W,C], each image's own."""
    tables: Any
    """What the method computed of the chain beforehand; None where it has no tables."""


Step = Callable[..., tuple[Array, tuple[Array, ...]]]
"""step(chain, x_t [B,H,W,C], t, memory, **options) -> (x_{t-1}, the new memory).

`memory` is a tuple of `Method.memory` arrays like x_t, zeros in the first step; options are
keywords.
"""


class State(NamedTuple):
    """What one step hands to the next."""

    x: Float[Array, "b h w c"]
    """x_t."""
    memory: tuple[Float[Array, "b h w c"], ...]
    """What the method keeps of earlier steps; zeros before the first."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to draw images, made of its step alone; calling it runs the whole chain."""

    step: Step
    grid: Grid = "linspace"
    """The time grid that it takes unless another is chosen."""
    memory: int = 0
    """How many arrays like x it keeps of earlier steps."""
    tables: Callable[..., Any] | None = None
    """tables(schedule, original, **options): a tree of float64 tables of the chain."""
    orders: tuple[int, ...] = ()
    """The values that its option `order` may have."""
    deterministic: bool = False
    """Whether the images follow from x_T alone, with the default options."""

    @property
    def options(self) -> list[str]:
        """The names of the method's own options."""
        parameters = inspect.signature(self.tables or self.step).parameters.values()
        return [each.name for each in parameters if each.kind == each.KEYWORD_ONLY]

    @property
    def defaults(self) -> dict[str, Any]:
        """The method's own options with their defaults."""
        parameters = inspect.signature(self.tables or self.step).parameters
        return {name: parameters[name].default for name in self.options}

    def check_order(self, order: int | None) -> None:
        """Raises UserError for an `order` that it does not take; None is its default."""
        if order is not None and order not in self.orders:
            allowed = " or ".join(map(str, self.orders)) or "none"
            raise UserError(f"order: this sampler takes {allowed}, got {order}")

    def __call__(
        self,
        schedule: Schedule,
        denoise_fn: DenoiseFn,
        keys: AnyKeys | None,
        image_shape: tuple[int, ...],
        *,
        prediction: Prediction,
        variance: Variance | Float[Array, " T"],
        clip: Clip = True,
        original: Schedule | None = None,
        x_T: Float[Array, "b h w c"] | None = None,
        trajectory: bool = False,
        **options: Any,
    ) -> Any:
        """Images x_0 [B,H,W,C] float32, one for each of `keys` [B].

        - `schedule`: the chain, strided or not; `denoise_fn` gets the original steps,
          schedule.timesteps
        - `image_shape`: (H, W, C)
        - `prediction`, `variance`, `clip`: as in `p_mean_variance`
        - `original`: the chain that `schedule` is a stride of, where it is one; multistep methods
          compute their tables from its betas
        - `x_T`: [B,H,W,C] to start from; None for N(0, I) of fold_in(key, START), however many
          steps follow
        - `trajectory`: return (x_0, xs) instead of x_0, xs [S,B,H,W,C] being x after each of the S
          steps; without it nothing of the chain is kept
        - `options`: the method's own, eta of ddim for example
        """
        next_state = self.bound_step(
            schedule,
            denoise_fn,
            keys,
            image_shape,
            prediction=prediction,
            variance=variance,
            clip=clip,
            original=original,
            **options,
        )

        def body(state, t):
            state = next_state(state, t)
            return state, state.x if trajectory else None

        steps = np.arange(schedule.num_timesteps, dtype=np.int32)[::-1]
        state, xs = jax.lax.scan(
            body, start_state(keys, image_shape, x_T, memory=self.memory), steps
        )
        return (state.x, xs) if trajectory else state.x

    def bound_step(
        self,
        schedule: Schedule,
        denoise_fn: DenoiseFn,
        keys: AnyKeys | None,
        image_shape: tuple[int, ...],
        *,
        prediction: Prediction,
        variance: Variance | Float[Array, " T"],
        clip: Clip = True,
        original: Schedule | None = None,
        tables: Any = None,
        **options: Any,
    ) -> Callable[[State, Int[Array, ""]], State]:
        """The step of one chain: (the State at t, t) -> the State at t - 1.

        The arguments are those of a call. The caller takes t = S - 1, ..., 0, in one loop or in
        parts of it. `tables` are the method's own of this chain, computed here unless given: they
        need a `schedule` that is not traced.
        """
        self.check_order(options.get("order"))
        if self.tables is not None:
            if tables is None:
                tables = self.tables(schedule, original or schedule, **options)
            tables = jax.tree.map(_as_constant, tables)
            options = {}

        def p(x_t, t):
            t_batch = jnp.full(x_t.shape[:1], t, jnp.int32)
            output = denoise_fn(x_t, schedule.timesteps[t_batch])
            return p_mean_variance(
                schedule, output, x_t, t_batch, prediction=prediction, variance=variance, clip=clip
            )

        def noise(t):
            # `keys` are None only where nothing is drawn.
            step = schedule.timesteps[t]
            return gaussian_noise(keys, step, image_shape)  # type: ignore[arg-type]

        chain = Chain(schedule, p, noise, tables)

        def next_state(state, t):
            return State(*self.step(chain, state.x, t, state.memory, **options))

        return next_state


def start_state(
    keys: AnyKeys | None,
    image_shape: tuple[int, ...],
    x_T: Float[Array, "b h w c"] | None = None,
    *,
    memory: int = 0,
) -> State:
    """The State before the first step: x_T, or N(0, I) of each key's fold_in(key, START).

    `memory` is that of the Method.
    """
    if x_T is None:
        x_T = gaussian_noise(keys, START, image_shape)  # type: ignore[arg-type]
    x_T = jnp.asarray(x_T, jnp.float32)
    return State(x_T, (jnp.zeros_like(x_T),) * memory)


def _as_constant(table: Any) -> jax.Array:
    """A float64 table as the program holds it."""
    return jnp.asarray(table, jnp.float32)


def previous(
    schedule: Schedule, t: Int[Array, ""] | int
) -> tuple[Float[jax.Array, ""], Float[jax.Array, ""]]:
    """(sqrt(alphas_bar), sqrt(1 - alphas_bar)) one step before t; (1, 0) before the first."""
    before = jnp.maximum(t - 1, 0)
    alpha = jnp.where(t == 0, 1.0, schedule.sqrt_alphas_bar[before])
    return alpha, jnp.where(t == 0, 0.0, schedule.sqrt_one_minus_alphas_bar[before])


def eps_of(
    schedule: Schedule,
    x_0: Float[Array, "b h w c"],
    x_t: Float[Array, "b h w c"],
    t: Int[Array, ""] | int,
) -> Float[Array, "b h w c"]:
    """The eps that leads from x_0 to x_t (Eq. 4 solved for it)."""
    return (x_t - schedule.sqrt_alphas_bar[t] * x_0) / schedule.sqrt_one_minus_alphas_bar[t]
