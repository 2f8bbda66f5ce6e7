"""The process against Bayes' rule, iteration, integrals and NumPy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from scipy import integrate, stats

from ddpm_jax import (
    decoder_log_likelihood,
    make_schedule,
    normal_kl,
    p_mean_variance,
    q_posterior,
    q_sample,
)
from ddpm_jax.diffusion import clip_x_0, predict_x_0, target

SHAPE = (5, 2, 3, 2)
T = np.array([0, 1, 7, 500, 999], np.int32)


def draw(rng, *names):
    return [jnp.asarray(rng.uniform(-1, 1, SHAPE), jnp.float32) for _ in names]


def column(table):
    return np.float64(table)[T][:, None, None, None]


def test_iterating_eq_2_gives_eq_4():
    betas = np.linspace(1e-4, 0.02, 1000)
    scale, variance = 1.0, 0.0  # of q(x_t | x_0), one step of Eq. 2 at a time
    scales, variances = [], []
    for beta in betas:
        scale, variance = scale * np.sqrt(1 - beta), (1 - beta) * variance + beta
        scales.append(scale)
        variances.append(variance)
    s, zero, one = make_schedule(), jnp.zeros(SHAPE), jnp.ones(SHAPE)
    np.testing.assert_allclose(
        q_sample(s, one, T, zero)[:, 0, 0, 0], np.array(scales)[T], rtol=1e-6
    )
    np.testing.assert_allclose(
        q_sample(s, zero, T, one)[:, 0, 0, 0] ** 2, np.array(variances)[T], rtol=1e-6
    )


def test_the_posterior_is_bayes_rule(rng):
    """p(x_{t-1} | x_t, x_0) as the product of two Gaussians, precision by precision."""
    s = make_schedule()
    x_0, x_t = draw(rng, "x_0", "x_t")
    mean, variance, log_variance = q_posterior(s, x_0, x_t, T)
    beta, alphas_bar = np.linspace(1e-4, 0.02, 1000), np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for b, t in enumerate(T):
        if t == 0:
            np.testing.assert_allclose(mean[b], x_0[b], rtol=1e-6)
            continue
        prior_mean, prior_variance = (
            np.sqrt(alphas_bar[t - 1]) * np.float64(x_0[b]),
            1 - alphas_bar[t - 1],
        )
        precision = 1 / prior_variance + (1 - beta[t]) / beta[t]
        expected = (
            prior_mean / prior_variance + np.sqrt(1 - beta[t]) * np.float64(x_t[b]) / beta[t]
        ) / precision
        np.testing.assert_allclose(mean[b], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(variance[b], 1 / precision, rtol=1e-5)
        np.testing.assert_allclose(log_variance[b], -np.log(precision), rtol=1e-5)
    assert mean.shape == variance.shape == log_variance.shape == SHAPE


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["eps", "x_0", "mean", "v"])
def test_a_perfect_output_gives_back_the_image_and_the_posterior(rng, prediction, schedule):
    s = make_schedule(schedule)
    x_0, noise = draw(rng, "x_0", "noise")
    x_t = q_sample(s, x_0, T, noise)
    output = target(s, x_0, x_t, T, noise, prediction=prediction)
    # Where nearly nothing of the image is left, float32 noise comes back magnified.
    tolerance = 2e-3 if schedule == "linear" else 1e-2
    known = slice(None) if schedule == "linear" else slice(0, 4)
    x_0_again = predict_x_0(s, output, x_t, T, prediction=prediction)
    np.testing.assert_allclose(x_0_again[known], x_0[known], atol=tolerance)
    p = p_mean_variance(
        s, output, x_t, T, prediction=prediction, variance="fixed_small", clip=False
    )
    expected = q_posterior(s, x_0, x_t, T)[0]
    np.testing.assert_allclose(p.mean[known], expected[known], atol=1e-4)


def test_v_is_the_rotation_of_image_and_noise(rng):
    s = make_schedule()
    x_0, noise = draw(rng, "x_0", "noise")
    v = target(s, x_0, q_sample(s, x_0, T, noise), T, noise, prediction="v")
    a = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[T][:, None, None, None]
    np.testing.assert_allclose(
        v, np.sqrt(a) * np.float64(noise) - np.sqrt(1 - a) * np.float64(x_0), atol=1e-6
    )


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_the_clip_comes_before_the_mean(rng, prediction):
    s = make_schedule()
    x_t, output = (jnp.asarray(rng.normal(0, 3, SHAPE), jnp.float32) for _ in range(2))
    p = p_mean_variance(s, output, x_t, T, prediction=prediction, variance="fixed_large")
    assert float(jnp.abs(p.x_0).max()) == 1
    a, a_prev = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), None
    a_prev = np.append(1, a[:-1])[T][:, None, None, None]
    a, beta = a[T][:, None, None, None], np.linspace(1e-4, 0.02, 1000)[T][:, None, None, None]
    x, out = np.float64(x_t), np.float64(output)
    image = {
        "eps": (x - np.sqrt(1 - a) * out) / np.sqrt(a),
        "x_0": out,
        "v": np.sqrt(a) * x - np.sqrt(1 - a) * out,
    }
    image = np.clip(image[prediction], -1, 1)
    expected = (np.sqrt(a_prev) * beta * image + np.sqrt(1 - beta) * (1 - a_prev) * x) / (1 - a)
    np.testing.assert_allclose(p.mean, expected, rtol=1e-4, atol=1e-4)


def test_for_the_mean_target_the_clip_touches_only_the_reported_image(rng):
    s = make_schedule()
    x_t, output = (jnp.asarray(rng.normal(0, 3, SHAPE), jnp.float32) for _ in range(2))
    p = p_mean_variance(s, output, x_t, T, prediction="mean", variance="fixed_large")
    assert p.mean is output and float(jnp.abs(p.x_0).max()) == 1


def test_variances(rng):
    s = make_schedule()
    x_t, output, v = draw(rng, "x_t", "output", "v")

    def log_variance(variance, output):
        p = p_mean_variance(s, output, x_t, T, prediction="eps", variance=variance)
        np.testing.assert_array_equal(p.variance, jnp.exp(p.log_variance))
        assert p.mean.shape == p.variance.shape == p.log_variance.shape == p.x_0.shape == SHAPE
        return p.log_variance

    beta = np.linspace(1e-4, 0.02, 1000)
    a = np.cumprod(1 - beta)
    posterior = beta * (1 - np.append(1, a[:-1])) / (1 - a)
    posterior[0] = posterior[1]
    small, large = np.log(posterior)[T], np.log(np.append(posterior[1], beta[1:]))[T]
    np.testing.assert_allclose(log_variance("fixed_small", output)[:, 0, 0, 0], small, rtol=1e-6)
    np.testing.assert_allclose(log_variance("fixed_large", output)[:, 0, 0, 0], large, rtol=1e-6)
    both = jnp.concatenate([output, v], axis=-1)
    np.testing.assert_array_equal(log_variance("learned", both), v)
    weight = (np.float64(v) + 1) / 2
    mixed = weight * column(np.log(beta)) + (1 - weight) * small[:, None, None, None]
    np.testing.assert_allclose(log_variance("learned_range", both), mixed, rtol=1e-5)


def test_a_chain_that_ends_at_pure_noise_stays_finite():
    s = make_schedule("jsd", 10)
    t = jnp.array([9])
    x_t = jnp.full((1, 1, 1, 1), 0.3)
    for prediction in ("eps", "x_0", "mean", "v"):
        p = p_mean_variance(s, x_t / 2, x_t, t, prediction=prediction, variance="fixed_large")
        assert all(bool(jnp.isfinite(field).all()) for field in p)


@pytest.mark.parametrize(
    ("prediction", "variance"), [("epsilon", "fixed_large"), ("eps", "fixed"), ("eps", "learned")]
)
def test_what_does_not_fit_is_refused(prediction, variance):
    x = jnp.zeros((1, 2, 2, 1))
    with pytest.raises(ValueError, match=r"prediction|variance"):
        p_mean_variance(
            make_schedule(), x, x, jnp.zeros(1, jnp.int32), prediction=prediction, variance=variance
        )


def test_normal_kl_is_the_integral():
    for m1, v1, m2, v2 in [(0.0, 1.0, 0.0, 1.0), (0.3, 0.5, -0.2, 2.0), (1.0, 1e-2, 1.1, 2e-2)]:
        p, q = stats.norm(m1, np.sqrt(v1)), stats.norm(m2, np.sqrt(v2))
        expected = integrate.quad(
            lambda x, p=p, q=q: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)),
            m1 - 12 * v1**0.5,
            m1 + 12 * v1**0.5,
        )[0]
        np.testing.assert_allclose(
            normal_kl(m1, np.log(v1), m2, np.log(v2)), expected, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("std", [3.0, 0.1, 0.0074, 1e-3])
@pytest.mark.parametrize("mean", [0.0, 0.3721, -1.0, 1.4])
def test_the_decoder_sums_to_one_over_the_levels(mean, std):
    levels = jnp.arange(256) / 127.5 - 1
    log_p = decoder_log_likelihood(levels, jnp.full(256, mean), jnp.full(256, 2 * np.log(std)))
    np.testing.assert_allclose(np.exp(np.float64(log_p)).sum(), 1, rtol=2e-4)


def test_the_decoder_of_16_bits_sums_to_one_over_the_levels():
    levels = jnp.arange(65_536) / 32_767.5 - 1
    table = jnp.full(65_536, 2 * np.log(0.01))
    for mean in (-0.9999, 0.3):
        log_p = decoder_log_likelihood(levels, jnp.full(65_536, mean), table, 65_536)
        np.testing.assert_allclose(np.exp(np.float64(log_p)).sum(), 1, rtol=1e-4)


def test_the_decoder_of_continuous_images_is_the_density_times_a_bin(rng):
    x_0, mean = rng.normal(size=(2, 1000)).astype(np.float32)
    found = decoder_log_likelihood(x_0, mean, np.full(1000, 2 * np.log(0.3), np.float32), None)
    expected = stats.norm.logpdf(np.float64(x_0), mean, 0.3) + np.log(2 / 255)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_decoder_is_exact_far_into_the_tails():
    x = np.array([-1, -0.5, 0.2, 127 / 127.5 - 1, 1])
    levels = np.round((x + 1) * 127.5) / 127.5 - 1
    for mean, std in [(0.9, 0.02), (-0.9, 0.02), (0.0, 0.5), (0.1, 0.01)]:
        lower, upper = stats.norm.logcdf(
            [(levels - 1 / 255 - mean) / std, (levels + 1 / 255 - mean) / std]
        )
        above = stats.norm.logsf((levels - 1 / 255 - mean) / std)
        right = stats.norm.logsf([(levels + 1 / 255 - mean) / std, (levels - 1 / 255 - mean) / std])
        left_side = levels < mean
        small, large = np.where(left_side, lower, right[0]), np.where(left_side, upper, right[1])
        expected = large + np.log1p(-np.exp(small - large))
        expected = np.where(levels < -0.999, upper, np.where(levels > 0.999, above, expected))
        got = decoder_log_likelihood(
            jnp.float32(levels), jnp.full(5, mean), jnp.full(5, 2 * np.log(std))
        )
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_the_decoders_gradient_is_finite():
    x_0 = jnp.array([-1.0, 0.0, 1.0])
    gradient = jax.grad(lambda m, v: decoder_log_likelihood(x_0, m, v).sum(), argnums=(0, 1))
    for mean in (-3.0, 0.0, 3.0):
        assert all(
            bool(jnp.isfinite(g).all()) for g in gradient(jnp.full(3, mean), jnp.full(3, -9.0))
        )


def test_the_released_codes_tanh_is_near_where_the_decoder_is_likely_and_wrong_in_the_tails():
    """It takes 0.5 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) for the normal CDF.

    Probabilities are floored at 1e-12.
    """

    def tanh_form(x, mean, std):
        cdf = [
            0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
            for z in ((x + 1 / 255 - mean) / std, (x - 1 / 255 - mean) / std)
        ]
        return np.log(np.maximum(cdf[0] - cdf[1], 1e-12))

    x, std = 101 / 127.5 - 1, 0.02

    def ours(mean):
        return decoder_log_likelihood(
            jnp.float32([x]), jnp.float32([mean]), jnp.float32([2 * np.log(std)])
        )[0]

    for sigmas in (0, 1, 2):
        np.testing.assert_allclose(
            ours(x + sigmas * std), tanh_form(x, x + sigmas * std, std), atol=0.01
        )
    assert -0.45 < tanh_form(x, x + 4 * std, std) - ours(x + 4 * std) < -0.25
    assert ours(x + 12 * std) < -60 and tanh_form(x, x + 12 * std, std) == np.log(1e-12)


def test_annotated_shapes_and_dtypes_are_checked():
    """Without the check of conftest.py, each of these would give some result."""
    schedule = make_schedule("linear", 10)
    x_0, t = np.zeros((2, 4, 4, 1), np.float32), np.zeros(2, np.int32)
    q_sample(schedule, x_0, t, x_0)
    for wrong in [
        (x_0, t, x_0[:1]),  # the noise of one example
        (x_0, t[:1], x_0),  # the step of one example
        (x_0[0], t, x_0[0]),  # no examples
        (x_0, t, x_0.astype(np.uint8)),
    ]:
        with pytest.raises(TypeCheckError):
            q_sample(schedule, *wrong)
    with pytest.raises(TypeCheckError):
        dataclasses.replace(schedule, timesteps=schedule.betas)


def test_a_predicted_mean_gives_a_finite_image_where_nothing_of_it_is_left():
    """And the image itself up to there, as Eq. 7 solved for x_0 in float64 has it."""
    s = make_schedule("const", 1000, beta_end=0.2)
    t = np.array([300, 900, 999], np.int32)
    x_0, x_t = jnp.full((3, 1, 1, 1), 0.5), jnp.full((3, 1, 1, 1), 0.1)
    mean = q_posterior(s, x_0, x_t, t)[0]
    found = predict_x_0(s, mean, x_t, t, prediction="mean")
    assert s.posterior_mean_coef_x_0[999] == 0 and np.isfinite(found).all()
    assert np.abs(predict_x_0(s, mean + 0.1, x_t, t, prediction="mean")[1:]).min() > 1e6


def test_dynamic_clipping_divides_by_each_images_own_quantile(rng):
    """Saharia et al. 2022, Section 2.3, in NumPy; an image of small values stays as it is."""
    x_0 = np.float32(rng.normal(size=(3, 5, 4, 3)) * np.array([0.2, 1, 9]).reshape(3, 1, 1, 1))
    got = clip_x_0(x_0, dynamic=True)
    for image, clipped in zip(x_0, got, strict=True):
        s = max(1, np.quantile(np.abs(image), 0.995))
        np.testing.assert_allclose(clipped, np.clip(image, -s, s) / s, rtol=1e-5)
    np.testing.assert_array_equal(got[0], x_0[0])
    np.testing.assert_array_equal(clip_x_0(x_0), np.clip(x_0, -1, 1))
