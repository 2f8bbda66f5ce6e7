"""The bound against its closed forms for Gaussian data, and against the samplers' keys."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import with_
from gaussian import Chain, M, S, denoiser, images_and_noise, mmse
from scipy import stats

from ddpm_jax import DDPM, likelihood, losses, make_schedule, q_sample
from ddpm_jax.devices.mesh import make_mesh, replicated
from ddpm_jax.errors import UserError
from ddpm_jax.likelihood import bits_per_dim, prior_bits

T, N = 40, 192
BETAS = np.linspace(0.01, 0.2, T)
CHAIN = Chain(BETAS)
SCHEDULE = make_schedule("linear", T, beta_start=0.01, beta_end=0.2)
PREDICTIONS = ("eps", "x_0", "mean", "v")


def learned(t):
    """The best variance there is: the posterior's and that of what is not known of x_0."""
    variance = CHAIN.posterior + CHAIN.c_0**2 * mmse(CHAIN.a)
    return jnp.float32(np.log(variance))[t]


def reverse_variance(variance):
    """(what the denoiser says of it, its table in NumPy)."""
    if variance == "learned":
        return learned, CHAIN.posterior + CHAIN.c_0**2 * mmse(CHAIN.a)
    if variance == "learned_range":
        return (lambda t: jnp.full(t.shape, 0.5)), CHAIN.betas**0.75 * CHAIN.variance(
            "fixed_small"
        ) ** 0.25
    return None, CHAIN.variance(variance)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small", "learned", "learned_range"])
def test_every_term_equals_its_closed_form(prediction, variance):
    says, table = reverse_variance(variance)
    x_0, noise = images_and_noise()
    denoise_fn = denoiser(SCHEDULE, prediction, says)

    @jax.jit
    def terms(t):
        t = t[None]
        x_t = q_sample(SCHEDULE, x_0, t, noise)
        return losses.vlb_terms(
            SCHEDULE, denoise_fn, x_0, x_t, t, prediction=prediction, variance=variance, clip=False
        )[0]

    np.testing.assert_allclose(
        jax.lax.map(terms, jnp.arange(T)), CHAIN.terms(table), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("levels", [None, 65_536])
def test_the_decoders_term_of_continuous_and_16_bit_images_equals_its_closed_form(levels):
    """Of a density it is exact; 65,536 bins are 257 times narrower than 256, in log2 8.0056."""
    x_0, noise = images_and_noise()
    t = jnp.zeros(1, jnp.int32)
    x_t = q_sample(SCHEDULE, x_0, t, noise)
    options = dict(prediction="eps", variance="fixed_small", clip=False, levels=levels)
    found = losses.vlb_terms(SCHEDULE, denoiser(SCHEDULE, "eps"), x_0, x_t, t, **options)[0]
    expected = CHAIN.terms(CHAIN.variance("fixed_small"))[0] + (np.log2(257) if levels else 0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"), [("linear", {}), ("cosine", {}), ("const", {"beta_end": 0.01})]
)
def test_the_prior_equals_its_closed_form(name, options):
    schedule = make_schedule(name, 1000, **options)
    a = np.cumprod(1 - np.float64(schedule.betas))[-1]
    for square in (1.0, 0.25, 0.0):
        expected = 0.5 * (a * square - a - np.log1p(-a)) / np.log(2)
        got = prior_bits(schedule, jnp.full((2, 4, 4, 3), np.sqrt(square)))
        np.testing.assert_allclose(got, [expected] * 2, rtol=1e-3, atol=1e-9)


def test_the_prior_of_the_papers_schedule():
    # 0.5 (a x_0^2 - a - log(1 - a)) / log 2 for a = 4.0358e-5.
    np.testing.assert_allclose(
        prior_bits(make_schedule(), jnp.ones((1, 1, 1, 1))), 2.9113e-5, rtol=1e-3
    )
    np.testing.assert_allclose(
        prior_bits(make_schedule(), jnp.full((1, 1, 1, 1), 0.5)), 7.28e-6, rtol=1e-2
    )


@pytest.fixture(scope="module")
def measured():
    """bits_per_dim of N Gaussian images [N,16,16,1] with fixed_small.

    Their first and second moments are exact. With N images, the tolerances below are at least 6
    standard errors of what the noise does to a mean.
    """
    z = stats.norm.ppf((np.arange(N * 256) + 0.5) / (N * 256))
    pixels = M + S * np.random.default_rng(2).permutation(z / z.std())
    x_0 = jnp.float32(pixels.reshape(N, 16, 16, 1))
    options = dict(prediction="eps", variance="fixed_small", clip=False)
    return x_0, bits_per_dim(SCHEDULE, denoiser(SCHEDULE, "eps"), jax.random.key(5), x_0, **options)


def mean_total(bits, variance):
    """The mean bound, less what chance adds to the errors of the predicted images.

    Each term is affine in its error.
    """
    slope = CHAIN.c_0**2 / (2 * variance * np.log(2))
    return bits.total.mean() - slope @ (np.float64(bits.mse).mean(0) - mmse(CHAIN.a))


def test_the_whole_bound_equals_its_closed_form(measured):
    _, bits = measured
    variance = CHAIN.variance("fixed_small")
    expected = CHAIN.terms(variance)
    assert bits.total.shape == bits.prior.shape == (N,)
    assert bits.terms.shape == bits.mse.shape == (N, T)
    np.testing.assert_allclose(bits.terms.mean(0), expected, rtol=0.05, atol=1e-5)
    np.testing.assert_allclose(bits.prior.mean(), CHAIN.prior(), rtol=0.02)
    whole = expected.sum() + CHAIN.prior()
    np.testing.assert_allclose(mean_total(bits, variance), whole, rtol=2e-4)


def test_the_bound_is_tight_where_the_reverse_steps_are_exact(measured):
    """With the best variance, p(x_{t-1} | x_t) is exact.

    The bound is then -log2 p(x_0) plus the cost of x_T.
    """
    x_0, bits = measured
    options = dict(prediction="eps", variance="learned", clip=False)
    exact = bits_per_dim(
        SCHEDULE, denoiser(SCHEDULE, "eps", learned), jax.random.key(5), x_0, **options
    )
    truth = np.log2(255 / 2) - stats.norm.logpdf(np.float64(x_0), M, S).mean() / np.log(2)
    a = CHAIN.a[-1]
    variance = a * S**2 + 1 - a
    of_x_T = 0.5 * (a * M**2 + variance - 1 - np.log(variance)) / np.log(2)
    _, table = reverse_variance("learned")
    np.testing.assert_allclose(mean_total(exact, table), truth + of_x_T, rtol=2e-4)
    assert bits.total.mean() > exact.total.mean() + 0.1


def test_rate_and_distortion_at_reverse_steps_equal_their_closed_forms(measured):
    _, bits = measured
    rates, rmse = likelihood.rate(bits.prior, bits.terms), np.sqrt(bits.mse.mean(0))
    assert rates.shape == (N, T)
    terms = CHAIN.terms(CHAIN.variance("fixed_small"))
    for k in (1, T // 2, T):
        # After k steps x is known at the 0-based step T - k.
        np.testing.assert_allclose(rmse[T - k], np.sqrt(mmse(CHAIN.a[T - k])), rtol=0.02)
        expected = CHAIN.prior() + terms[np.arange(T) > T - k].sum()
        np.testing.assert_allclose(rates[:, k - 1].mean(), expected, rtol=0.02)
    np.testing.assert_array_equal(rates[:, 0], bits.prior)
    np.testing.assert_allclose(rates[:, -1] + bits.terms[:, 0], bits.total, rtol=1e-5)


def test_an_image_has_its_own_noise_wherever_it_stands(measured):
    x_0, bits = measured
    options = dict(prediction="eps", variance="fixed_small", clip=False)
    some = bits_per_dim(
        SCHEDULE, denoiser(SCHEDULE, "eps"), jax.random.key(5), x_0[10:13], start=10, **options
    )
    np.testing.assert_allclose(some.terms, bits.terms[10:13], rtol=1e-4, atol=1e-6)
    # And it is fold_in(fold_in(rng, index), t), which anyone can draw.
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 11), 7)
    x_t = q_sample(
        SCHEDULE, x_0[11:12], jnp.array([7]), jax.random.normal(key, (1, *x_0.shape[1:]))
    )
    a = CHAIN.a[7]
    x_0_hat = M + np.sqrt(a) * S**2 / (a * S**2 + 1 - a) * (np.float64(x_t) - np.sqrt(a) * M)
    np.testing.assert_allclose(bits.mse[11, 7], ((x_0[11:12] - x_0_hat) ** 2).mean(), rtol=1e-4)


def test_the_evaluated_bound_clips_the_predicted_image():
    def denoise_fn(x_t, t):
        return jnp.full_like(x_t, 3.0)  # As a prediction of x_0: far outside.

    x_0 = jnp.ones((1, 2, 2, 1))
    clipped, not_clipped = (
        bits_per_dim(
            SCHEDULE,
            denoise_fn,
            jax.random.key(0),
            x_0,
            prediction="x_0",
            variance="fixed_small",
            clip=clip,
        )
        for clip in (True, False)
    )
    np.testing.assert_array_equal(clipped.mse, 0)
    np.testing.assert_array_equal(not_clipped.mse, 4)
    assert clipped.total[0] < not_clipped.total[0]


def test_the_networks_bound_is_the_same_in_any_batch_and_on_devices(tiny, pictures):
    ddpm = DDPM(
        dataclasses.replace(
            tiny, diffusion=dataclasses.replace(tiny.diffusion, variance="fixed_small")
        )
    )
    params = jax.tree.map(lambda leaf: leaf + 0.01, ddpm.init(jax.random.key(0)))
    x_0, key = np.float32(pictures[:7]) / 127.5 - 1, jax.random.key(1)
    whole = ddpm.bits_per_dim(params, key, x_0)
    assert whole.total.shape == (7,) and whole.terms.shape == (7, 10)
    assert ddpm.bits_per_dim(params, key, x_0[:0]).mse.shape == (0, 10)
    for other in (
        ddpm.bits_per_dim(params, key, x_0, batch_size=4),
        ddpm.bits_per_dim(jax.device_put(params, replicated(make_mesh(4))), key, x_0),
    ):
        for a, b in zip(whole, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    tail = ddpm.bits_per_dim(params, key, x_0[5:], start=5)
    np.testing.assert_allclose(tail.terms, whole.terms[5:], rtol=1e-4, atol=1e-6)
    with pytest.raises(TypeError, match="floats"):
        ddpm.bits_per_dim(params, key, pictures[:2])


@pytest.mark.parametrize(("schedule", "beta_end"), [("jsd", None), ("linear", 1.0)])
def test_an_infinite_bound_is_refused(tiny, schedule, beta_end):
    """eps of an x_T without any trace of the image, x_0 not clipped."""
    fields = {"schedule": schedule, "beta_start": None, "beta_end": beta_end}
    infinite = with_(tiny, diffusion={**fields, "clip": False})
    with pytest.raises(UserError, match=f"likelihood: with schedule {schedule}, x_T"):
        DDPM(infinite).bits_per_dim(None, jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
    for finite in ({**fields, "clip": True}, {**fields, "clip": False, "prediction": "v"}):
        with_(tiny, diffusion=finite).diffusion.check_bound()
