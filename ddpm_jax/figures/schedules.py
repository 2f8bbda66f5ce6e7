"""Noise schedules side by side: the signal left at each step, and the bits it takes.

Needs no run.
"""

import dataclasses
import math
from typing import Any, ClassVar

import numpy as np
from etils import epath

from ddpm_jax.config import Beta, Diffusion, ScheduleName, Timesteps
from ddpm_jax.errors import UserError
from ddpm_jax.figures.base import Figure
from ddpm_jax.figures.panel import curves
from ddpm_jax.schedule import make_schedule

PIXEL_STD = 0.5


@dataclasses.dataclass(frozen=True)
class Schedules(Figure):
    """alphas_bar, signal-to-noise ratio and KL divergence at each step of one or more schedules."""

    schedules: tuple[ScheduleName, ...] = ("linear", "cosine")
    """Names of the schedules."""
    num_timesteps: Timesteps = 1000
    """T, the number of diffusion steps."""
    beta_start: Beta | None = None
    """First beta of every schedule; None for each schedule's own."""
    beta_end: Beta | None = None
    """Last beta of every schedule; None for each schedule's own."""

    name: ClassVar[str] = "schedule"

    def draw(self) -> epath.Path:
        """Writes schedule.png and .npz.

        The .npz holds NAME_alphas_bar, NAME_snr and NAME_kl (bits/dim, from t = 1 on), each [T].
        """
        self.path()  # Checked before the tables are computed.
        if not self.schedules:
            raise UserError("schedules: name at least one, for example --schedules linear")
        numbers = {}
        for name in self.schedules:
            parameters = Diffusion(
                name, self.num_timesteps, self.beta_start, self.beta_end
            ).schedule_parameters
            schedule = make_schedule(name, self.num_timesteps, **parameters)
            betas = np.asarray(schedule.betas, np.float64)
            for quantity, values in tables(betas).items():
                numbers[f"{name}_{quantity}"] = values
        panels: list[dict[str, Any]] = [
            {"ylabel": "alphas_bar", "quantity": "alphas_bar"},
            {"ylabel": "signal-to-noise ratio", "quantity": "snr", "yscale": "log"},
            {"ylabel": "KL divergence of a step (bits/dim)", "quantity": "kl", "yscale": "log"},
        ]
        for panel in panels:
            panel |= {
                "x": np.arange(1, self.num_timesteps + 1),
                "xlabel": "k: number of diffusion steps",
            }
            panel["lines"] = {
                name: numbers[f"{name}_{panel['quantity']}"] for name in self.schedules
            }
        picture = curves(
            panels,
            title=f"Noise schedules, T = {self.num_timesteps}",
            notes=[
                "alphas_bar: the fraction of an image's variance that is left. "
                "Signal-to-noise ratio: alphas_bar / (1 - alphas_bar).",
                "KL divergence: for independent Gaussian pixels of standard deviation "
                f"{PIXEL_STD}, their optimal denoiser and the posterior's variance; "
                "without the first step, which is the decoder's.",
            ],
        )
        return self.write(picture, numbers)


def tables(betas: np.ndarray, std: float = PIXEL_STD) -> dict[str, np.ndarray]:
    """alphas_bar, snr and kl [T] of `betas` [T] in float64.

    kl is E[L_{t-1}] of Eq. 5 in bits/dim for pixels N(0, std^2): half the SNR lost in the step,
    times the optimal denoiser's squared error. It is NaN at t = 0.
    """
    alphas_bar = np.cumprod(1 - betas)
    snr = alphas_bar / (1 - alphas_bar)
    error = std**2 * (1 - alphas_bar) / (alphas_bar * std**2 + 1 - alphas_bar)
    kl = 0.5 * (np.append(np.nan, snr[:-1]) - snr) * error / math.log(2)
    return {"alphas_bar": alphas_bar, "snr": snr, "kl": kl}
