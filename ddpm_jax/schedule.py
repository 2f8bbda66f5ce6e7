"""Noise schedules: the betas and every table derived from them (Ho et al. 2020, Sections 2 and 4).

`t` is 0-based throughout: t == 0 means "diffused for one step".
"""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The tables of one diffusion process, each [T] float32 and computed in float64.

    A strided chain is a Schedule too: fewer betas, and `timesteps` naming the steps of the
    original chain that the network was trained on.
    """

    betas: jax.Array
    """beta_t, the variance added at step t (Eq. 2)."""
    alphas_bar: jax.Array
    """prod_{s<=t} (1 - beta_s) (Eq. 4)."""
    sqrt_alphas_bar: jax.Array
    sqrt_one_minus_alphas_bar: jax.Array
    sqrt_recip_alphas_bar: jax.Array
    """sqrt(1 / alphas_bar), finite also where alphas_bar is 0."""
    sqrt_recipm1_alphas_bar: jax.Array
    """sqrt(1 / alphas_bar - 1), finite likewise."""
    posterior_mean_coef_x_0: jax.Array
    """Weight of x_0 in the mean of q(x_{t-1} | x_t, x_0) (Eq. 7)."""
    posterior_mean_coef_x_t: jax.Array
    """Weight of x_t in the same mean (Eq. 7)."""
    posterior_variance: jax.Array
    """Variance of q(x_{t-1} | x_t, x_0) (Eq. 7); 0 at t = 0."""
    posterior_log_variance: jax.Array
    """Its logarithm, with entry 0 replaced by entry 1: log 0 would make the bound's L_0 infinite."""
    fixed_large_log_variance: jax.Array
    """log beta_t, with the same entry 0: what `variance="fixed_large"` uses."""
    timesteps: jax.Array
    """[T] int32: the original 0-based step that `denoise_fn` is called with."""

    @property
    def num_timesteps(self) -> int:
        """T, the number of steps of this chain."""
        return self.betas.shape[0]

    @classmethod
    def from_betas(cls, betas, timesteps=None) -> "Schedule":
        """The tables for `betas` [T], each in (0, 1]; `timesteps` [T] defaults to 0, 1, ..., T-1.

        Raises ValueError if a beta lies outside (0, 1] or the shapes disagree.
        """
        betas = np.asarray(betas, np.float64)
        if betas.ndim != 1 or not betas.size or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError("betas: one or more numbers in (0, 1] in one dimension are needed")
        timesteps = np.arange(betas.size) if timesteps is None else np.asarray(timesteps)
        if timesteps.shape != betas.shape:
            raise ValueError(f"timesteps: {timesteps.shape} does not match betas {betas.shape}")
        tables = {name: np.float32(table) for name, table in _tables(betas).items()}
        # A schedule may be made while a function is traced; its tables must not become tracers.
        with jax.ensure_compile_time_eval():
            arrays = {name: jnp.asarray(table) for name, table in tables.items()}
            return cls(**arrays, timesteps=jnp.asarray(timesteps, jnp.int32))


def _tables(betas: np.ndarray) -> dict[str, np.ndarray]:
    alphas_bar = np.cumprod(1 - betas)
    alphas_bar_prev = np.append(1.0, alphas_bar[:-1])
    # `jsd` ends at alphas_bar = 0: a huge finite reciprocal leaves a number to clip, infinity a NaN.
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


def strided(schedule: Schedule, timesteps) -> Schedule:
    """The chain that visits only `timesteps` of `schedule`, ascending indices [S] of it, with betas of its own.

    beta_i = 1 - alphas_bar[timesteps[i]] / alphas_bar[timesteps[i - 1]], so that alphas_bar is the
    original's where it is visited (Nichol & Dhariwal 2021, Eq. 19). All of 0, ..., T-1 give `schedule`
    back. Not to be traced: the tables are made anew in float64.

    Raises ValueError if `timesteps` do not ascend within 0, ..., T-1.
    """
    timesteps = np.asarray(timesteps)
    T = schedule.num_timesteps
    if timesteps.ndim != 1 or not timesteps.size or timesteps[0] < 0 or timesteps[-1] >= T:
        raise ValueError(
            f"timesteps: one or more numbers from 0 to {T - 1} are needed, got {timesteps}"
        )
    if (np.diff(timesteps) <= 0).any():
        raise ValueError(f"timesteps: must ascend, got {timesteps}")
    if timesteps.size == T:
        return schedule
    with np.errstate(divide="ignore"):  # A beta of 1 leaves nothing of the image.
        log_alphas = np.log1p(-np.asarray(schedule.betas, np.float64))[: timesteps[-1] + 1]
    # Sums of logarithms: the small beta of a short stride would drown in 1 - a / b.
    betas = -np.expm1(np.add.reduceat(log_alphas, np.append(0, timesteps[:-1] + 1)))
    return Schedule.from_betas(betas, np.asarray(schedule.timesteps)[timesteps])


def make_schedule(name: str = "linear", num_timesteps: int = 1000, **parameters) -> Schedule:
    """The Schedule called `name` with T = `num_timesteps` steps.

    Names and their parameters:
      linear        beta from beta_start=1e-4 to beta_end=0.02 (Section 4)
      quad          sqrt(beta) linear between the same ends
      const         beta_end=0.02 at every step
      warmup10, warmup50   linear from beta_start to beta_end over the first 10 % (50 %), then const
      jsd           1/T, 1/(T-1), ..., 1
      cosine        alphas_bar follows cos^2, s=0.008, beta at most max_beta=0.999
                    (Nichol & Dhariwal 2021, Eq. 17)
      raised_cosine beta_start + (beta_end - beta_start) sin^2(u), u from 0 to pi/2: often called
                    "cosine" too, and not the same thing

    `linear` keeps beta_start and beta_end at any T, so a chain of another length destroys more or
    less of the image. To keep the end of the chain as noisy as the paper's, scale both by
    1000 / T: make_schedule("linear", T, beta_start=0.1 / T, beta_end=20 / T).

    Raises ValueError for an unknown name or parameter, T < 1, or a beta outside (0, 1].
    """
    if name not in _BETAS:
        raise ValueError(f"schedule: {name!r} is not one of {', '.join(_BETAS)}")
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps: must be at least 1, got {num_timesteps}")
    accepted = schedule_parameters(name)
    for parameter in parameters:
        if parameter not in accepted:
            raise ValueError(
                f"schedule {name!r} has no {parameter!r}; it takes {accepted or 'nothing'}"
            )
    return Schedule.from_betas(_BETAS[name](num_timesteps, **parameters))


def schedule_parameters(name: str) -> list[str]:
    """The names of the parameters that schedule `name` takes."""
    return list(inspect.signature(_BETAS[name]).parameters)[1:]


def _linear(T, beta_start=1e-4, beta_end=0.02):
    return np.linspace(beta_start, beta_end, T)


def _quad(T, beta_start=1e-4, beta_end=0.02):
    return np.linspace(beta_start**0.5, beta_end**0.5, T) ** 2


def _const(T, beta_end=0.02):
    return np.full(T, beta_end)


def _warmup10(T, beta_start=1e-4, beta_end=0.02):
    return _warmup(T, beta_start, beta_end, T // 10)


def _warmup50(T, beta_start=1e-4, beta_end=0.02):
    return _warmup(T, beta_start, beta_end, T // 2)


def _warmup(T, beta_start, beta_end, ramp):
    return np.append(np.linspace(beta_start, beta_end, ramp), np.full(T - ramp, beta_end))


def _jsd(T):
    return 1 / np.arange(T, 0, -1)


def _cosine(T, s=0.008, max_beta=0.999):
    f = np.cos((np.arange(T + 1) / T + s) / (1 + s) * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], max_beta)


def _raised_cosine(T, beta_start=1e-4, beta_end=0.02):
    return beta_start + (beta_end - beta_start) * np.sin(np.linspace(0, np.pi / 2, T)) ** 2


_BETAS = {
    "linear": _linear,
    "cosine": _cosine,
    "quad": _quad,
    "const": _const,
    "jsd": _jsd,
    "warmup10": _warmup10,
    "warmup50": _warmup50,
    "raised_cosine": _raised_cosine,
}
