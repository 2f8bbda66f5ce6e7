"""What the measured errors say: the best variance and the best steps, against closed forms."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import Chain, denoiser, images_and_noise, mmse
from scipy import stats

from ddpm_jax import losses, make_schedule, q_sample
from ddpm_jax.calibration import (
    DECODER_VARIANCES,
    Calibration,
    best_decoder,
    cell_grid,
    decoder_bits,
    likelihood_steps,
    optimal_variance,
    pair_bits,
)
from ddpm_jax.diffusion import decoder_log_likelihood, p_mean_variance
from ddpm_jax.schedule import strided

T = 40
SCHEDULE = make_schedule("linear", T, beta_start=0.01, beta_end=0.2)
CHAIN = Chain(np.float64(SCHEDULE.betas))
MSE = mmse(CHAIN.a)
SOME = [0, 3, 4, 11, 25, 38]
CHAINS = {"whole": np.arange(T), "strided": np.array(SOME), "late": np.array([5, 20, 39])}


def numpy_chain(schedule, timesteps):
    """The betas of the strided chain, from their definition in float64."""
    a = np.cumprod(1 - np.float64(schedule.betas))[timesteps]
    return Chain(1 - a / np.append(1, a[:-1]))


@pytest.mark.parametrize("timesteps", CHAINS.values(), ids=CHAINS)
def test_the_best_variance_is_the_posteriors_and_that_of_the_error(timesteps):
    chain = numpy_chain(SCHEDULE, timesteps)
    expected = chain.posterior + chain.c_0**2 * MSE[timesteps]
    found = optimal_variance(strided(SCHEDULE, timesteps), MSE)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=2e-6)  # The strided betas are float32.
    assert found[0] == MSE[timesteps[0]]


@pytest.mark.parametrize("timesteps", CHAINS.values(), ids=CHAINS)
def test_every_term_with_the_best_variance_equals_its_closed_form(timesteps):
    schedule = strided(SCHEDULE, timesteps)
    chain = numpy_chain(SCHEDULE, timesteps)
    denoise_fn = denoiser(SCHEDULE, "x_0")
    x_0, noise = images_and_noise()
    best = optimal_variance(schedule, MSE)

    @jax.jit
    def terms(table):
        def term(t):
            t = t[None]
            x_t = q_sample(schedule, x_0, t, noise)
            output = denoise_fn(x_t, schedule.timesteps[t])
            p = p_mean_variance(
                schedule, output, x_t, t, prediction="x_0", variance=table, clip=False
            )
            return losses.bound_terms(schedule, p, x_0, x_t, t)[0]

        return jax.lax.map(term, jnp.arange(len(timesteps)))

    expected = chain.terms(chain.posterior + chain.c_0**2 * MSE[timesteps])
    np.testing.assert_allclose(terms(best), expected, rtol=0, atol=1e-5)
    for factor in (0.9, 1.1):
        assert (terms(factor * best) > terms(best)).all()
    for name in ("fixed_small", "fixed_large"):
        assert terms(best).sum() < terms(chain.variance(name)).sum() - 0.01


def bound(schedule, mse, timesteps, variance):
    """The expected bound of a chain but for its prior, from the definitions."""
    timesteps = np.array(timesteps)
    chain = numpy_chain(schedule, timesteps)
    error = chain.c_0**2 * mse[timesteps]
    table = chain.posterior + error if variance == "optimal" else chain.variance(variance)
    ratio = table[1:] / chain.posterior[1:]
    kl = 0.5 * ((chain.posterior + error)[1:] / table[1:] - 1 + np.log(ratio))
    wide = table[0] + (2 / 255) ** 2 / 12
    decoder = np.log(255 / 2 * np.sqrt(2 * np.pi * wide)) + error[0] / (2 * wide)
    return (decoder + kl.sum()) / np.log(2)


SHORT = {
    "linear": make_schedule("linear", 9, beta_start=0.01, beta_end=0.5),
    "cosine": make_schedule("cosine", 9),
    "jsd": make_schedule("jsd", 9),
}


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("variance", ["optimal", "fixed_small", "fixed_large"])
def test_no_other_steps_have_a_better_bound(name, variance):
    schedule = SHORT[name]
    a = np.cumprod(1 - np.float64(schedule.betas))
    # Errors of Gaussian data, and errors that do not grow from step to step.
    for mse in (mmse(a), np.random.default_rng(0).uniform(0.001, 0.3, 9)):
        for steps in range(2, 10):
            found = likelihood_steps(schedule, mse, steps, variance)
            assert found.dtype == np.int32 and len(found) == steps
            assert found[0] == 0 and found[-1] == 8 and (np.diff(found) > 0).all()
            inner = itertools.combinations(range(1, 8), steps - 2)
            least = min(bound(schedule, mse, (0, *some, 8), variance) for some in inner)
            np.testing.assert_allclose(bound(schedule, mse, found, variance), least, rtol=1e-9)


def test_a_thousand_steps_take_a_moment_and_more_steps_are_better():
    schedule = make_schedule()
    mse = mmse(np.cumprod(1 - np.float64(schedule.betas)))
    bounds = []
    for steps in (2, 10, 100, 500):
        found = likelihood_steps(schedule, mse, steps, "fixed_small")
        bounds.append(bound(schedule, mse, found, "fixed_small"))
        even = np.rint(np.linspace(0, 999, steps)).astype(int)
        assert bounds[-1] <= bound(schedule, mse, even, "fixed_small") + 1e-9
    assert (np.diff(bounds) < 0).all()
    np.testing.assert_array_equal(
        likelihood_steps(schedule, mse, 1000, "fixed_small"), np.arange(1000)
    )


def test_betas_of_one_take_no_number_away():
    schedule = make_schedule("warmup10", 30, beta_start=0.01, beta_end=1.0)
    mse = np.linspace(0.01, 0.3, 30)
    for variance in ("optimal", "fixed_small", "fixed_large"):
        costs = pair_bits(schedule, mse, variance)
        upper = np.triu_indices(30, 1)
        assert np.isfinite(costs[upper]).all() and np.isinf(costs[np.tril_indices(30)]).all()
    assert np.isfinite(optimal_variance(schedule, mse)).all()


def test_the_decoders_bits_are_those_of_its_bins():
    """Of errors that are Gaussian, integrated numerically; sigma is 4, 1 and half a bin."""
    places = np.linspace(-6, 6, 2001)
    weights = stats.norm.pdf(places) / stats.norm.pdf(places).sum()
    for sigma, tolerance in ((8 / 255, 2e-4), (2 / 255, 2e-3), (1 / 255, 0.06)):
        for error in (0.5 * sigma, sigma):
            x = jnp.zeros(len(places))
            log_variance = jnp.full(len(places), 2 * np.log(sigma))
            nats = -decoder_log_likelihood(x, jnp.float32(error * places), log_variance)
            expected = np.float64(nats) @ weights / np.log(2)
            np.testing.assert_allclose(
                decoder_bits(np.array([sigma**2]), error**2), expected, atol=tolerance
            )


def test_a_variance_is_never_zero_and_needs_an_error_for_each_step():
    assert optimal_variance(SCHEDULE, np.zeros(T))[0] == np.finfo(np.float32).tiny
    with pytest.raises(ValueError, match="mse: must have an entry for each of the model's steps"):
        optimal_variance(strided(SCHEDULE, SOME), MSE[:30])
    for steps in (0, 1, T + 1):
        with pytest.raises(ValueError, match=f"steps: must be from 2 to {T} .*, got {steps}"):
            likelihood_steps(SCHEDULE, MSE, steps)
    with pytest.raises(ValueError, match="variance: 'learned' is not one of optimal, fixed_small"):
        likelihood_steps(SCHEDULE, MSE, 3, "learned")
    with pytest.raises(ValueError, match="mse: must have the shape"):
        likelihood_steps(SCHEDULE, MSE[:5], 3)


def test_a_table_must_fit_the_chain_and_the_output():
    x, t = jnp.zeros((1, 2, 2, 1)), jnp.array([0])
    for table in (MSE, jnp.float32(MSE)):
        p = p_mean_variance(SCHEDULE, x, x, t, prediction="x_0", variance=table)
        np.testing.assert_allclose(p.variance, MSE[0], rtol=1e-6)
        with pytest.raises(ValueError, match=r"variance: .* each step of the chain, \(40,\), got"):
            p_mean_variance(SCHEDULE, x, x, t, prediction="x_0", variance=table[:7])
        with pytest.raises(ValueError, match=r"output: must be .* variance of a table"):
            two = jnp.zeros((1, 2, 2, 2))
            p_mean_variance(SCHEDULE, two, x, t, prediction="x_0", variance=table)


def calibration(T=3, images=5, seed=0):
    rng = np.random.default_rng(seed)
    cells = rng.uniform(0, 1, (T, 2, 2, 3)).astype(np.float32)
    return Calibration(
        mse=rng.uniform(0, 1, T), error=np.ones(T), cells=cells, cells_error=cells, images=images
    )


def test_calibrations_are_equal_by_content_and_cannot_be_changed():
    one = calibration()
    assert one == calibration() and hash(one) == hash(calibration())
    assert {one: 1}[calibration()] == 1
    for other in (calibration(seed=1), calibration(images=6), None):
        assert one != other
    for name in ("mse", "cells"):
        changed = getattr(one, name).copy()
        changed.flat[-1] += 1
        assert dataclasses.replace(one, **{name: changed}) != one
        with pytest.raises(ValueError, match="read-only"):
            getattr(one, name)[0] = 1


def test_a_calibration_of_nonsense_is_refused():
    one = calibration()
    for fields, says in [
        ({"mse": -one.mse}, "mse: must be finite"),
        ({"error": np.full(3, np.nan)}, "error: must be finite"),
        ({"mse": one.mse[:2]}, "do not fit together: mse \\(2,\\), error \\(3,\\)"),
        ({"cells": one.cells[0]}, "do not fit together"),
        ({"cells_error": one.cells[:, :1]}, "do not fit together"),
        ({"images": 0}, "images: must be at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=says):
            dataclasses.replace(one, **fields)


@pytest.mark.parametrize(
    ("size", "cells"), [(32, 8), (28, 7), (8, 8), (13, 1), (5, 5), (1, 1), (12, 6), (256, 8)]
)
def test_cells_divide_the_image(size, cells):
    assert cell_grid((size, 8, 3)) == (cells, 8, 3) and cell_grid((8, size, 1)) == (8, cells, 1)


def test_the_best_decoder_is_the_vertex_of_a_parabola():
    logs = np.log(DECODER_VARIANCES)
    for log_variance in (-12.3, -8.0, -2.2):
        bits = 1.5 + 0.2 * (logs - log_variance) ** 2
        np.testing.assert_allclose(np.log(best_decoder(bits)), log_variance, rtol=1e-10)
    assert best_decoder(logs) < DECODER_VARIANCES[1]  # None of the list has the least.
    assert best_decoder(-logs) > DECODER_VARIANCES[-2]


def test_the_decoder_has_its_own_variance_where_step_0_is_visited():
    found = optimal_variance(strided(SCHEDULE, SOME), MSE, 0.25)
    expected = optimal_variance(strided(SCHEDULE, SOME), MSE)
    assert SOME[0] == 0 and found[0] == 0.25 and expected[0] == MSE[0]
    np.testing.assert_array_equal(found[1:], expected[1:])
    later = strided(SCHEDULE, SOME[1:])
    np.testing.assert_array_equal(optimal_variance(later, MSE, 0.25), optimal_variance(later, MSE))
