"""The network's part on both sides: the predicted x_0, on any number of devices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ddpm_jax.calls.conditions import FREE, Condition
from ddpm_jax.calls.edits import chain_part
from ddpm_jax.calls.programs import Images, Index, chain_of
from ddpm_jax.compression.codec import Predict
from ddpm_jax.data.images import to_uint8
from ddpm_jax.devices.mesh import fetch, place
from ddpm_jax.diffusion import p_mean_variance
from ddpm_jax.errors import NonFiniteSamples
from ddpm_jax.sampler import Sampler
from ddpm_jax.samplers import State, time_grid
from ddpm_jax.shapes import Float32, PyTree, UInt8

FLOW_STEPS = 20
"""Most steps of DDIM from what was received to an image."""


class Network:
    """A model with its parameters and what its images show."""

    def __init__(self, ddpm: Any, params: PyTree, mesh: Mesh | None, condition: Condition = FREE):
        self.ddpm = ddpm
        self.params = params
        self.mesh = mesh
        self.condition = condition

    def of(self, rows: np.ndarray) -> "Network":
        """The same for some of the images."""
        return Network(self.ddpm, self.params, self.mesh, self.condition.of(rows, self.mesh))

    def predictor(self, timesteps: tuple[int, ...]) -> Predict:
        """predict(x_t, i) of the chain that visits `timesteps`, ascending."""
        sampler = Sampler("ancestral", timesteps=timesteps, variance="fixed_small")

        def predict(x_t: np.ndarray, i: int) -> np.ndarray:
            args = (self.params, self.condition, place(x_t, self.mesh), np.int32(i))
            predicted = np.asarray(fetch(_predicted(self.ddpm, sampler, *args)))
            if not np.isfinite(predicted).all():
                raise NonFiniteSamples(
                    f"images: the predicted x_0 is not finite at step {timesteps[i]}; the weights "
                    "may have diverged (take an earlier checkpoint)"
                )
            return predicted

        return predict

    def flow(self, x_t: Float32[np.ndarray, "b h w c"], timestep: int) -> np.ndarray:
        """The images that DDIM, which draws no noise, leads to from x_t at `timestep`."""
        steps = time_grid(timestep + 1, min(FLOW_STEPS, timestep + 1))
        timesteps = tuple(steps.tolist())
        sampler = Sampler("ddim", timesteps=timesteps)
        args = (self.ddpm, sampler, timesteps, self.params, self.condition, None)
        state = State(place(x_t, self.mesh), ())
        state, _ = chain_part(*args, state, np.int32(0), np.int32(len(timesteps)))
        return np.asarray(fetch(state.x))


def picture(x_0: Float32[np.ndarray, "b h w c"]) -> UInt8[np.ndarray, "b h w c"]:
    """Images in [-1, 1] as uint8."""
    return to_uint8(np.clip(x_0, -1, 1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _predicted(
    ddpm: Any, sampler: Sampler, params: PyTree, condition: Condition, x_t: Images, i: Index
) -> Images:
    schedule, denoise_fn, options = chain_of(ddpm, sampler, params, condition)
    t = jnp.full(x_t.shape[:1], i, jnp.int32)
    output = denoise_fn(x_t, schedule.timesteps[t])
    of_p = {name: options[name] for name in ("prediction", "variance", "clip")}
    return jnp.asarray(p_mean_variance(schedule, output, x_t, t, **of_p).x_0)
