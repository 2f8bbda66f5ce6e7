"""The bound of strided chains, and of any variance, against a rewrite in NumPy's float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import with_
from gaussian import M, S, denoiser
from scipy import stats

from ddpm_jax import DDPM, UserError, make_schedule
from ddpm_jax.calibration import Calibration, cell_grid, likelihood_steps, optimal_variance
from ddpm_jax.calls import choice
from ddpm_jax.likelihood import bits_per_dim
from ddpm_jax.sampler import Sampler
from ddpm_jax.schedule import strided

KEY = jax.random.key(5)


def decoder_nats(x_0, mean, sigma):
    """-log p of Eq. 13 in float64."""
    upper, lower = (x_0 + 1 / 255 - mean) / sigma, (x_0 - 1 / 255 - mean) / sigma
    left = lower + upper > 0
    a, b = np.where(left, -upper, lower), np.where(left, -lower, upper)
    log_b = stats.norm.logcdf(b)
    inside = log_b + np.log1p(-np.exp(stats.norm.logcdf(a) - log_b))
    below, above = stats.norm.logcdf(upper), stats.norm.logcdf(-lower)
    return -np.where(x_0 < -0.999, below, np.where(x_0 > 0.999, above, inside))


def rewritten(betas, timesteps, x_0, predict, variance):
    """(terms, prior, squared errors [b,S,h,w,c]) from the definitions of Eq. 4 to 13.

    predict(x_t, t) is the clipped x_0; `variance` a name, or a function of (the posterior's
    variance, the weight of x_0) [S].
    """
    a = np.cumprod(1 - np.float64(betas))[timesteps]
    before = np.append(1, a[:-1])
    new_betas = 1 - a / before
    posterior = new_betas * (1 - before) / (1 - a)
    of_x_0 = np.sqrt(before) * new_betas / (1 - a)
    if callable(variance):
        table = variance(posterior, of_x_0)
    else:
        table = {"fixed_small": posterior, "fixed_large": new_betas}[variance].copy()
        table[0] = posterior[1]
    keys = [jax.random.fold_in(KEY, i) for i in range(len(x_0))]
    x_0 = np.float64(x_0)
    terms, errors = [], []
    for i, t in enumerate(timesteps):
        noise = [jax.random.normal(jax.random.fold_in(key, int(t)), x_0.shape[1:]) for key in keys]
        x_t = np.sqrt(a[i]) * x_0 + np.sqrt(1 - a[i]) * np.float64(np.stack(noise))
        x_0_hat = np.float64(predict(x_t, int(t)))
        errors.append((x_0 - x_0_hat) ** 2)
        if i == 0:
            nats = decoder_nats(x_0, x_0_hat, np.sqrt(table[0]))
        else:
            spread = posterior[i] + of_x_0[i] ** 2 * errors[-1]
            nats = 0.5 * (spread / table[i] - 1 + np.log(table[i] / posterior[i]))
        terms.append(nats.mean(axis=(1, 2, 3)) / np.log(2))
    prior = 0.5 * (a[-1] * x_0**2 - a[-1] - np.log(1 - a[-1])).mean(axis=(1, 2, 3)) / np.log(2)
    return np.stack(terms, 1), prior, np.stack(errors, 1)


def images(n=3, shape=(16, 12, 2)):
    """Of 256 levels, the ends among them."""
    levels = np.random.default_rng(3).integers(0, 256, (n, *shape))
    levels[0, 0], levels[0, 1] = 0, 255
    return np.float32(levels / 127.5 - 1)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "optimal"])
def test_a_strided_chain_has_the_bound_of_its_own_betas(variance):
    T, timesteps = 40, np.array([0, 2, 9, 10, 30])
    schedule = make_schedule("linear", T, beta_start=0.01, beta_end=0.2)
    mse = np.linspace(0.01, 0.2, T)
    shorter = strided(schedule, timesteps)
    table = optimal_variance(shorter, mse) if variance == "optimal" else variance
    x_0 = images()
    bits = bits_per_dim(
        shorter,
        denoiser(schedule, "x_0"),
        KEY,
        jnp.asarray(x_0),
        prediction="x_0",
        variance=table,
        clip=False,
        cells=(8, 6),
    )

    def predict(x_t, t):
        a = np.cumprod(1 - np.float64(schedule.betas))[t]
        return M + np.sqrt(a) * S**2 / (a * S**2 + 1 - a) * (x_t - np.sqrt(a) * M)

    def best(posterior, of_x_0):
        return posterior + of_x_0**2 * mse[timesteps]

    expected = best if variance == "optimal" else variance
    terms, prior, errors = rewritten(schedule.betas, timesteps, x_0, predict, expected)
    np.testing.assert_allclose(bits.terms, terms, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(bits.prior, prior, rtol=1e-4)
    np.testing.assert_allclose(bits.total, terms.sum(1) + prior, rtol=1e-4)
    np.testing.assert_allclose(bits.mse, errors.mean(axis=(2, 3, 4)), rtol=1e-4)
    cells = errors.reshape(3, 5, 8, 2, 6, 2, 2).mean(axis=(3, 5))
    np.testing.assert_allclose(bits.cells, cells, rtol=1e-3)
    np.testing.assert_allclose(bits.cells.mean(axis=(2, 3, 4)), bits.mse, rtol=1e-5)


def with_errors(config, mse):
    """A model with these errors."""
    cells = np.zeros((len(mse), *cell_grid(config.data.image_shape)), np.float32)
    return DDPM(config, Calibration(mse, 0 * mse, cells, cells, 4))


def calibrated(config, mse):
    """A model with these errors, its weights such that it predicts something."""
    ddpm = with_errors(config, mse)
    return ddpm, jax.tree.map(lambda leaf: leaf + 0.02, ddpm.init(jax.random.key(0)))


MSE = np.linspace(0.02, 0.4, 10)


@pytest.mark.parametrize("prediction", ["eps", "mean"])
def test_the_model_measures_the_chain_of_a_sampler(tiny, prediction):
    """A predicted mean, too, becomes the x_0 whose errors are known, clipped, on every chain."""
    ddpm, params = calibrated(with_(tiny, diffusion={"prediction": prediction}), MSE)
    x_0 = images(3, (8, 8, 1))
    betas = np.float64(ddpm.schedule.betas)
    a = np.cumprod(1 - betas)
    before = np.append(1, a[:-1])

    denoise = jax.jit(ddpm.denoise)

    def predict(x_t, t):
        output = np.float64(denoise(params, np.float32(x_t), np.full(3, t, np.int32)))
        if prediction == "eps":
            x_0_hat = (x_t - np.sqrt(1 - a[t]) * output) / np.sqrt(a[t])
        else:
            of_x_t = np.sqrt(1 - betas[t]) * (1 - before[t]) / (1 - a[t])
            of_x_0 = np.sqrt(before[t]) * betas[t] / (1 - a[t])
            x_0_hat = (output - of_x_t * x_t) / of_x_0
        return np.clip(x_0_hat, -1, 1)

    samplers = [Sampler(timesteps=(0, 3, 4, 9), variance="optimal")]
    if prediction == "mean":  # Here the whole chain, too, takes another way than without a table.
        samplers = [Sampler(variance="optimal")]
    for sampler in samplers:
        timesteps = sampler.timesteps_of(ddpm.config.diffusion)

        def best(posterior, of_x_0, timesteps=timesteps):
            return posterior + of_x_0**2 * MSE[timesteps]

        bits = ddpm.bits_per_dim(params, KEY, x_0, sampler=sampler, cells=True)
        terms, prior, errors = rewritten(betas, timesteps, x_0, predict, best)
        np.testing.assert_allclose(bits.mse, errors.mean(axis=(2, 3, 4)), rtol=1e-3)
        np.testing.assert_allclose(bits.cells, errors, rtol=1e-2, atol=1e-5)
        np.testing.assert_allclose(bits.terms, terms, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(bits.total, terms.sum(1) + prior, rtol=1e-3)


def test_the_grid_of_best_likelihood_is_that_of_the_chains_variance(tiny):
    ddpm = with_errors(tiny, MSE)
    for variance in (None, "fixed_small", "fixed_large", "optimal"):
        chosen = ddpm.resolve(Sampler(steps=4, grid="likelihood", variance=variance))
        steps = likelihood_steps(ddpm.schedule, MSE, 4, variance or "fixed_small")
        assert chosen.timesteps == tuple(steps.tolist()) and chosen.steps is None
    # It takes another sampler's steps from the best variance, and all steps as they are.
    chosen = ddpm.resolve(Sampler("ddim", steps=4, grid="likelihood"))
    assert chosen.timesteps == tuple(likelihood_steps(ddpm.schedule, MSE, 4).tolist())
    assert ddpm.resolve(Sampler(steps=10, grid="likelihood")) == Sampler("ancestral")


def test_the_best_steps_of_a_model_are_sought_once(tiny, monkeypatch):
    calls = []

    def sought(schedule, mse, steps, variance, levels):
        calls.append(mse[0])
        return np.array([0, 9])

    monkeypatch.setattr("ddpm_jax.calls.choice.likelihood_steps", sought)
    choice.best_steps.cache_clear()
    for mse in (MSE, MSE, 2 * MSE):
        ddpm = with_errors(tiny, mse)
        assert ddpm.resolve(Sampler(steps=2, grid="likelihood")).timesteps == (0, 9)
    assert calls == [MSE[0], 2 * MSE[0]]
    choice.best_steps.cache_clear()


def test_what_has_no_bound_or_no_calibration_gets_one_line(tiny):
    ddpm = with_errors(tiny, MSE)
    without = dataclasses.replace(ddpm, calibration=None)
    x_0 = images(1, (8, 8, 1))
    for model, sampler, says in [
        (ddpm, "ddim", "sampler: ddim has no bound; leave it out or choose ancestral"),
        (ddpm, Sampler(steps=4, grid="trailing"), "L_0 is of step 0, but this chain's first is"),
        (ddpm, Sampler(timesteps=(3, 5)), "first is step 3; choose the grid linspace, leading"),
        (ddpm, Sampler(steps=1, grid="likelihood"), "steps: must be from 2 to 10 for the steps of"),
        (without, Sampler(variance="optimal"), "variance: .* run ddpm-jax calibrate RUN"),
        (without, Sampler(steps=4, grid="likelihood"), "grid: .* run ddpm-jax calibrate RUN"),
    ]:
        with pytest.raises(UserError, match=says):
            model.bits_per_dim(None, KEY, x_0, sampler=sampler)
