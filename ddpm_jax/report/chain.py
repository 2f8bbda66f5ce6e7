"""The chain of a few samples, every step of it kept."""

from typing import NamedTuple

import jax
import numpy as np

from ddpm_jax.calls import programs
from ddpm_jax.calls.conditions import conditions
from ddpm_jax.calls.ready import ready
from ddpm_jax.ddpm import DDPM, Labels
from ddpm_jax.devices.progress import progress_bar
from ddpm_jax.devices.segments import placed, placed_as
from ddpm_jax.errors import NonFiniteSamples
from ddpm_jax.sampler import Sampler
from ddpm_jax.shapes import AnyKey, PyTree

STEPS = 50
"""Of DDIM, or all T where there are fewer."""


class Trace(NamedTuple):
    """Samples on their way from noise to images, in the model's units."""

    t: np.ndarray
    """[F] diffusion steps that x has at each frame, descending; 0 for the image."""
    x: np.ndarray
    """float32 [F,N,H,W,C]."""
    x_0: np.ndarray
    """float32 [F,N,H,W,C]: the image that the network sees in x; at t = 0 the image."""


def trace(ddpm: DDPM, params: PyTree, rng: AnyKey, n: int, labels: Labels = None) -> Trace:
    """The images 0, ..., n - 1 that `ddpm.sample` draws from `rng` by DDIM, from noise on.

    `params` are on one device. Raises NonFiniteSamples if x does not stay finite.
    """
    diffusion = ddpm.config.diffusion
    sampler = ddpm.resolve(Sampler("ddim", min(STEPS, ddpm.schedule.num_timesteps)))
    condition = conditions(ddpm.config.model, labels, n).of(np.arange(n), None)
    steps = sampler.timesteps_of(diffusion)[::-1]
    params = ready(ddpm, params)
    keys, state = programs.begin(ddpm, sampler, rng, np.arange(n, dtype=np.uint32))
    state = placed(state)
    xs = [np.asarray(state.x)]
    for i in progress_bar(range(len(steps)), desc="drawing samples", unit="step"):
        bounds = (np.int32(i), np.int32(i + 1))
        after, finite = programs.advance(
            ddpm, sampler, diffusion.clip, params, condition, keys, state, *bounds
        )
        state = placed_as(after, state)
        if not np.asarray(jax.device_get(finite)).all():
            raise NonFiniteSamples(
                f"samples: not finite from step t = {steps[i]} on; the weights may have diverged"
            )
        xs.append(np.asarray(state.x))
    x = np.stack(xs)
    x[-1] = programs.within_bounds(ddpm, x[-1])
    return Trace(np.append(steps + 1, 0), x, predictions(ddpm, steps, np.stack(xs)))


def predictions(ddpm: DDPM, steps: np.ndarray, xs: np.ndarray) -> np.ndarray:
    """The x_0 that each x of a DDIM chain [F,...] was moved towards; the last x itself at the end.

    `steps` [F - 1] are the original steps, descending. A step of DDIM without noise keeps x_0 and
    eps (Song et al. 2021, Eq. 12), so that both follow from the x before and after it: no call of
    the network.
    """
    alphas_bar = np.asarray(ddpm.schedule.alphas_bar, np.float64)[steps]
    alphas_bar = np.append(alphas_bar, 1.0)  # Of the image.
    shape = (-1,) + (1,) * (xs.ndim - 1)
    signal = np.sqrt(alphas_bar).reshape(shape)
    noise = np.sqrt(1 - alphas_bar).reshape(shape)
    before, after = xs[:-1].astype(np.float64), xs[1:].astype(np.float64)
    x_0 = (noise[:-1] * after - noise[1:] * before) / (
        noise[:-1] * signal[1:] - noise[1:] * signal[:-1]
    )
    return np.concatenate([x_0, xs[-1:]]).astype(np.float32)
