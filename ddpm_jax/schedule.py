"""Noise schedules: the betas and every table derived from them (Ho et al. 2020, Sections 2 and 4).

`t` is 0-based throughout: t == 0 means "diffused for one step".
"""

import dataclasses
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from ddpm_jax.shapes import Float32, Float64, Int32

SMALLEST_BETA = 1e-11
"""The smallest beta: in float64, 1 - alphas_bar is then right to five digits."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The tables of one diffusion process, computed in float64.

    A strided chain is a Schedule too: it has fewer betas, and its `timesteps` are the steps of the
    original chain, which the network was trained on.
    """

    betas: Float32[jax.Array, " T"]
    """beta_t, the variance added at step t (Eq. 2)."""
    alphas_bar: Float32[jax.Array, " T"]
    """prod_{s<=t} (1 - beta_s) (Eq. 4)."""
    sqrt_alphas_bar: Float32[jax.Array, " T"]
    sqrt_one_minus_alphas_bar: Float32[jax.Array, " T"]
    sqrt_recip_alphas_bar: Float32[jax.Array, " T"]
    """sqrt(1 / alphas_bar), finite even where alphas_bar is 0."""
    sqrt_recipm1_alphas_bar: Float32[jax.Array, " T"]
    """sqrt(1 / alphas_bar - 1), finite even where alphas_bar is 0."""
    posterior_mean_coef_x_0: Float32[jax.Array, " T"]
    """Weight of x_0 in the mean of q(x_{t-1} | x_t, x_0) (Eq. 7)."""
    posterior_mean_coef_x_t: Float32[jax.Array, " T"]
    """Weight of x_t in the mean of q(x_{t-1} | x_t, x_0) (Eq. 7)."""
    posterior_variance: Float32[jax.Array, " T"]
    """Variance of q(x_{t-1} | x_t, x_0) (Eq. 7); 0 at t = 0."""
    posterior_log_variance: Float32[jax.Array, " T"]
    """log posterior_variance, but entry 0 is a copy of entry 1: log 0 would make L_0 infinite."""
    fixed_large_log_variance: Float32[jax.Array, " T"]
    """log beta_t, but with entry 0 of posterior_log_variance: for `variance="fixed_large"`."""
    timesteps: Int32[jax.Array, " T"]
    """The 0-based steps of the original chain that `denoise_fn` is called with."""

    @property
    def num_timesteps(self) -> int:
        """T, the number of steps of this chain."""
        return self.betas.shape[0]

    @classmethod
    def from_betas(cls, betas: ArrayLike, timesteps: ArrayLike | None = None) -> "Schedule":
        """The tables for `betas` [T], each in (0, 1]; `timesteps` [T] defaults to 0, 1, ..., T-1.

        Raises ValueError if a beta is outside (0, 1] or below SMALLEST_BETA, or the shapes differ.
        """
        betas = np.asarray(betas, np.float64)
        if betas.ndim != 1 or not betas.size or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError("betas: must be one-dimensional, not empty, and all in (0, 1]")
        # Half of it, since schedules round.
        if betas.min() < SMALLEST_BETA / 2:
            raise ValueError(
                f"betas: {betas.min()} is too small for float64's 1 - alphas_bar; choose "
                f"{SMALLEST_BETA} or more"
            )
        timesteps = np.arange(betas.size) if timesteps is None else np.asarray(timesteps)
        if timesteps.shape != betas.shape:
            raise ValueError(
                f"timesteps: must have the shape of betas, {betas.shape}, got {timesteps.shape}"
            )
        tables = {name: np.float32(table) for name, table in _tables(betas).items()}
        # Even if a schedule is made while a function is traced, its tables must not be tracers.
        with jax.ensure_compile_time_eval():
            arrays = {name: jnp.asarray(table) for name, table in tables.items()}
            return cls(**arrays, timesteps=jnp.asarray(timesteps, jnp.int32))


def _tables(betas: Float64[np.ndarray, " T"]) -> dict[str, Float64[np.ndarray, " T"]]:
    alphas_bar = np.cumprod(1 - betas)
    alphas_bar_prev = np.append(1.0, alphas_bar[:-1])
    # `jsd` ends at alphas_bar = 0, and long chains of large betas too. A huge but finite reciprocal
    # gives an x_0 that can be clipped; an infinite one would give NaN.
    recip = 1 / np.maximum(alphas_bar, np.finfo(np.float32).tiny)
    posterior_variance = betas * (1 - alphas_bar_prev) / (1 - alphas_bar)
    entry_0 = posterior_variance[1:2] if betas.size > 1 else betas
    return dict(
        betas=betas,
        alphas_bar=alphas_bar,
        sqrt_alphas_bar=np.sqrt(alphas_bar),
        sqrt_one_minus_alphas_bar=np.sqrt(1 - alphas_bar),
        sqrt_recip_alphas_bar=np.sqrt(recip),
        sqrt_recipm1_alphas_bar=np.sqrt(recip - 1),
        posterior_mean_coef_x_0=np.sqrt(alphas_bar_prev) * betas / (1 - alphas_bar),
        posterior_mean_coef_x_t=np.sqrt(1 - betas) * (1 - alphas_bar_prev) / (1 - alphas_bar),
        posterior_variance=posterior_variance,
        posterior_log_variance=np.log(np.append(entry_0, posterior_variance[1:])),
        fixed_large_log_variance=np.log(np.append(entry_0, betas[1:])),
    )


def strided(schedule: Schedule, timesteps: ArrayLike) -> Schedule:
    """The chain that visits only the steps `timesteps` of `schedule`, with new betas.

    `timesteps` are ascending indices of `schedule`. The new betas are
    beta_i = 1 - alphas_bar[timesteps[i]] / alphas_bar[timesteps[i - 1]], so that alphas_bar at the
    visited steps stays the same (Nichol & Dhariwal 2021, Eq. 19). If every step is visited,
    `schedule` itself is returned. Cannot be traced: the tables are computed again in float64.

    Raises ValueError if `timesteps` are not ascending within 0, ..., T-1.
    """
    timesteps = np.asarray(timesteps)
    T = schedule.num_timesteps
    if timesteps.ndim != 1 or not timesteps.size or timesteps[0] < 0 or timesteps[-1] >= T:
        raise ValueError(
            f"timesteps: must be one or more numbers from 0 to {T - 1}, got {timesteps}"
        )
    if (np.diff(timesteps) <= 0).any():
        raise ValueError(f"timesteps: must be in ascending order, got {timesteps}")
    if timesteps.size == T:
        return schedule
    with np.errstate(divide="ignore"):  # log(0), from a beta of 1, is meant to be -inf.
        log_alphas = np.log1p(-np.asarray(schedule.betas, np.float64))[: timesteps[-1] + 1]
    # From sums of logarithms: 1 - a / b would round away the small beta of a short stride.
    betas = -np.expm1(np.add.reduceat(log_alphas, np.append(0, timesteps[:-1] + 1)))
    return Schedule.from_betas(betas, np.asarray(schedule.timesteps)[timesteps])


Betas = Callable[..., Float64[np.ndarray, " T"]]
"""betas(T, **parameters) -> one number in (0, 1] for each of T steps."""

SCHEDULES: dict[str, Betas] = {}
"""All noise schedules by name: the functions below that are marked `@named`."""


def named(betas: Betas) -> Betas:
    """Adds a function to `SCHEDULES` under its own name. A new schedule needs nothing else."""
    SCHEDULES[betas.__name__] = betas
    return betas


def make_schedule(name: str = "linear", num_timesteps: int = 1000, **parameters: float) -> Schedule:
    """The Schedule named `name`, one of `SCHEDULES`, with T = `num_timesteps` steps.

    `parameters` go to the function of that name below, for example beta_start and beta_end.
    `linear` keeps both at any T, so a longer chain destroys more of the image and a shorter one
    less. For a chain that ends as noisy as the paper's, scale both by 1000 / T:
    make_schedule("linear", T, beta_start=0.1 / T, beta_end=20 / T).

    Raises ValueError for an unknown name or parameter, T < 1, or a beta outside (0, 1] or below
    SMALLEST_BETA.
    """
    return Schedule.from_betas(betas_of(name, num_timesteps, **parameters))


def betas_of(
    name: str, num_timesteps: int, **parameters: float
) -> Float64[np.ndarray, "{num_timesteps}"]:
    """The betas [T] of `make_schedule` without their tables. Raises ValueError as it does."""
    if name not in SCHEDULES:
        raise ValueError(f"schedule: {name!r} is not one of {', '.join(SCHEDULES)}")
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps: must be at least 1, got {num_timesteps}")
    accepted = schedule_parameters(name)
    for parameter in parameters:
        if parameter not in accepted:
            raise ValueError(
                f"schedule {name!r} has no parameter {parameter!r}; "
                f"it takes {', '.join(accepted) or 'none'}"
            )
    return SCHEDULES[name](num_timesteps, **parameters)


def schedule_parameters(name: str) -> list[str]:
    """The names of the parameters that schedule `name` takes."""
    return list(inspect.signature(SCHEDULES[name]).parameters)[1:]


@named
def linear(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Float64[np.ndarray, "{T}"]:
    """Betas from beta_start to beta_end in equal steps (Section 4)."""
    return np.linspace(beta_start, beta_end, T)


@named
def cosine(T: int, s: float = 0.008, max_beta: float = 0.999) -> Float64[np.ndarray, "{T}"]:
    """Betas of at most max_beta; alphas_bar follows cos^2 (Nichol & Dhariwal 2021, Eq. 17)."""
    f = np.cos((np.arange(T + 1) / T + s) / (1 + s) * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], max_beta)


@named
def quad(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Float64[np.ndarray, "{T}"]:
    """Betas whose square roots increase in equal steps."""
    return np.linspace(beta_start**0.5, beta_end**0.5, T) ** 2


@named
def const(T: int, beta_end: float = 0.02) -> Float64[np.ndarray, "{T}"]:
    """Betas, all beta_end."""
    return np.full(T, beta_end)


@named
def jsd(T: int) -> Float64[np.ndarray, "{T}"]:
    """Betas 1/T, 1/(T-1), ..., 1: at the end, nothing is left of the image."""
    return 1 / np.arange(T, 0, -1)


@named
def warmup10(
    T: int, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Float64[np.ndarray, "{T}"]:
    """Betas, linear over the first 10 % of the steps, then beta_end."""
    return _warmup(T, beta_start, beta_end, T // 10)


@named
def warmup50(
    T: int, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Float64[np.ndarray, "{T}"]:
    """Betas, linear over the first half of the steps, then beta_end."""
    return _warmup(T, beta_start, beta_end, T // 2)


@named
def raised_cosine(
    T: int, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Float64[np.ndarray, "{T}"]:
    """Betas beta_start + (beta_end - beta_start) sin^2(u), u from 0 to pi/2.

    Often called "cosine" too, but different from `cosine`.
    """
    return beta_start + (beta_end - beta_start) * np.sin(np.linspace(0, np.pi / 2, T)) ** 2


def _warmup(T: int, beta_start: float, beta_end: float, ramp: int) -> Float64[np.ndarray, "{T}"]:
    return np.append(np.linspace(beta_start, beta_end, ramp), np.full(T - ramp, beta_end))
