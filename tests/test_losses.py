"""Eq. 14 against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import Schedule, losses


@pytest.mark.parametrize("prediction", ["eps", "x_0"])
def test_simple_is_the_mean_square_error_of_each_example(rng, prediction):
    betas = np.array([0.1, 0.3, 0.5])
    schedule = Schedule.from_betas(betas, timesteps=[4, 40, 400])
    x_0, noise = rng.normal(size=(2, 3, 2, 2, 1))
    t = np.array([2, 0, 1])
    seen = {}

    def denoise_fn(x_t, timesteps):
        seen["x_t"], seen["timesteps"] = x_t, timesteps
        return 0.5 * x_t

    loss = losses.simple(schedule, denoise_fn, jnp.float32(x_0), t, jnp.float32(noise), prediction=prediction)
    a = np.cumprod(1 - betas)[t][:, None, None, None]
    x_t = np.sqrt(a) * x_0 + np.sqrt(1 - a) * noise
    np.testing.assert_allclose(seen["x_t"], x_t, rtol=1e-5, atol=1e-6)
    assert seen["timesteps"].tolist() == [400, 4, 40]  # The network is told the original steps.
    expected = ((0.5 * x_t - (noise if prediction == "eps" else x_0)) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_simple_refuses_a_learned_variance():
    schedule, x = Schedule.from_betas([0.1]), jnp.zeros((1, 2, 2, 1))
    with pytest.raises(ValueError, match="output"):
        losses.simple(schedule, lambda x, t: jnp.concatenate([x, x], -1), x, jnp.zeros(1, int), x, prediction="eps")
