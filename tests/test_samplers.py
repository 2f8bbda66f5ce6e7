"""Ancestral sampling with denoisers whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import Schedule, make_schedule, samplers
from ddpm_jax.diffusion import target
from ddpm_jax.parallel import batch_sharding, make_mesh

SHAPE = (2, 3, 1)


def keys(n):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(n))


def oracle(schedule, image, prediction):
    """The optimal denoiser where all data are one image [H,W,C]."""

    def denoise_fn(x_t, t):
        x_0 = jnp.broadcast_to(image, x_t.shape)
        a = schedule.alphas_bar[t].reshape(-1, 1, 1, 1)
        noise = (x_t - jnp.sqrt(a) * x_0) / jnp.sqrt(1 - a)
        return target(schedule, x_0, x_t, t, noise, prediction=prediction)

    return denoise_fn


@pytest.mark.parametrize("prediction", ["eps", "x_0", "mean", "v"])
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_an_oracle_recovers_its_image(prediction, variance):
    schedule = make_schedule("linear", 50, beta_end=0.2)
    image = jnp.linspace(-1, 1, 6).reshape(1, *SHAPE)
    x_0 = samplers.ancestral(
        schedule, oracle(schedule, image, prediction), keys(4), SHAPE, prediction=prediction, variance=variance
    )
    np.testing.assert_allclose(x_0, jnp.broadcast_to(image, x_0.shape), atol=1e-4)


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_gaussian_data_and_their_optimal_denoiser_give_the_chains_exact_moments(variance):
    """x_0 ~ N(m, s^2) a pixel: every step is affine, so mean and variance follow a recursion in NumPy."""
    m, s, T = 0.3, 0.2, 50
    schedule = make_schedule("linear", T, beta_start=2e-3, beta_end=0.3)

    def denoise_fn(x_t, t):
        a = schedule.alphas_bar[t].reshape(-1, 1, 1, 1)
        return jnp.sqrt(1 - a) * (x_t - jnp.sqrt(a) * m) / (a * s**2 + 1 - a)

    x_0 = samplers.ancestral(
        schedule, denoise_fn, keys(1000), (4, 4, 1), prediction="eps", variance=variance, clip=False
    )
    betas = np.linspace(2e-3, 0.3, T)
    a = np.cumprod(1 - betas)
    a_prev = np.append(1, a[:-1])
    mean, var = 0.0, 1.0
    for t in reversed(range(T)):
        # Eq. 11: x_{t-1} = (x_t - beta / sqrt(1 - a) eps(x_t)) / sqrt(1 - beta) + sigma z
        slope = (1 - betas[t] / (a[t] * s**2 + 1 - a[t])) / np.sqrt(1 - betas[t])
        offset = betas[t] * np.sqrt(a[t]) * m / (a[t] * s**2 + 1 - a[t]) / np.sqrt(1 - betas[t])
        sigma2 = betas[t] * ((1 - a_prev[t]) / (1 - a[t]) if variance == "fixed_small" else 1)
        mean, var = slope * mean + offset, slope**2 * var + (sigma2 if t else 0)
    np.testing.assert_allclose([x_0.mean(), x_0.std()], [mean, np.sqrt(var)], atol=0.005)


def test_no_noise_is_added_at_the_last_step():
    schedule = make_schedule("linear", 3)
    x_t, noise = jnp.full((1, *SHAPE), 0.1), jnp.full((1, *SHAPE), 100.0)

    def step(t, noise):
        return samplers.ancestral_step(
            schedule, lambda x, t: x, x_t, t, noise, prediction="x_0", variance="fixed_large"
        )

    np.testing.assert_array_equal(step(0, noise), step(0, 0 * noise))
    for t, beta in ((1, 0.01005), (2, 0.02)):
        np.testing.assert_allclose(step(t, noise) - step(t, 0 * noise), 100 * np.sqrt(beta), rtol=1e-5)


def test_the_network_is_told_the_original_steps_of_a_strided_chain():
    schedule = Schedule.from_betas([0.1, 0.2, 0.3], timesteps=[5, 50, 500])
    seen = []

    def denoise_fn(x, t):
        jax.debug.callback(lambda t: seen.append(t.tolist()), t, ordered=True)
        return x

    samplers.ancestral(schedule, denoise_fn, keys(2), SHAPE, prediction="eps", variance="fixed_small")
    jax.effects_barrier()
    assert seen == [[500, 500], [50, 50], [5, 5]]


def test_the_trajectory_is_kept_when_asked():
    schedule = make_schedule("linear", 4)
    arguments = (schedule, lambda x, t: 0.5 * x, keys(2), SHAPE)
    options = dict(prediction="eps", variance="fixed_large")
    x_0 = samplers.ancestral(*arguments, **options)
    last, xs = samplers.ancestral(*arguments, **options, trajectory=True)
    assert xs.shape == (4, 2, *SHAPE)
    np.testing.assert_array_equal(xs[-1], last)
    np.testing.assert_array_equal(x_0, last)


def test_noise_has_the_same_bits_in_any_batch():
    for t in (0, 7):
        noise = samplers.gaussian_noise(keys(8), t, SHAPE)
        for i in (0, 3, 7):
            np.testing.assert_array_equal(samplers.gaussian_noise(keys(8)[i : i + 1], t, SHAPE)[0], noise[i])
            alone = jax.random.normal(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), i), t), SHAPE)
            np.testing.assert_array_equal(alone, noise[i])
    assert len(np.unique(samplers.gaussian_noise(keys(8), 0, SHAPE))) == 48


def test_noise_has_the_same_bits_on_any_number_of_devices():
    noise = jax.jit(lambda keys: samplers.gaussian_noise(keys, 3, SHAPE))
    for devices in (2, 4):
        spread = jax.device_put(keys(8), batch_sharding(make_mesh(devices)))
        np.testing.assert_array_equal(noise(spread), noise(keys(8)))


def test_one_step_chains_work():
    schedule = make_schedule("linear", 1)
    x_0 = samplers.ancestral(schedule, lambda x, t: x, keys(3), SHAPE, prediction="x_0", variance="fixed_large")
    np.testing.assert_allclose(x_0, jnp.clip(samplers.gaussian_noise(keys(3), 1, SHAPE), -1, 1), rtol=1e-6)
