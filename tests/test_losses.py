"""The objectives against NumPy, against closed forms, and by what they teach."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gaussian import Chain, denoiser, images_and_noise

from ddpm_jax import Schedule, UserError, losses, make_schedule
from ddpm_jax.config import Diffusion
from ddpm_jax.diffusion import predict_x_0, q_sample

PREDICTIONS = ("eps", "x_0", "mean", "v")


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

    loss = losses.simple(
        schedule, denoise_fn, jnp.float32(x_0), t, jnp.float32(noise), prediction=prediction
    )
    a = np.cumprod(1 - betas)[t][:, None, None, None]
    x_t = np.sqrt(a) * x_0 + np.sqrt(1 - a) * noise
    np.testing.assert_allclose(seen["x_t"], x_t, rtol=1e-5, atol=1e-6)
    assert seen["timesteps"].tolist() == [400, 4, 40]  # The network is told the original steps.
    expected = ((0.5 * x_t - (noise if prediction == "eps" else x_0)) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_simple_refuses_a_learned_variance():
    schedule, x = Schedule.from_betas([0.1]), jnp.zeros((1, 2, 2, 1))
    with pytest.raises(ValueError, match="output"):
        losses.simple(
            schedule,
            lambda x, t: jnp.concatenate([x, x], -1),
            x,
            jnp.zeros(1, int),
            x,
            prediction="eps",
        )


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weighs_the_error_of_the_image(rng, prediction):
    """Whatever is predicted, the loss is min(SNR, gamma) times the mean squared error of x_0."""
    schedule = make_schedule()
    t = np.array([0, 10, 100, 250, 500, 999])
    x_0, noise, output = (jnp.float32(array) for array in rng.normal(size=(3, 6, 2, 2, 1)))
    loss = losses.simple(
        schedule,
        lambda x_t, _: x_t + 0.1 * output,
        x_0,
        t,
        noise,
        prediction=prediction,
        min_snr_gamma=5.0,
    )
    x_t = q_sample(schedule, x_0, t, noise)
    error = x_0 - predict_x_0(schedule, x_t + 0.1 * output, x_t, t, prediction=prediction)
    a = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t]
    expected = np.minimum(a / (1 - a), 5.0) * np.mean(np.float64(error) ** 2, axis=(1, 2, 3))
    # At t = 0 a predicted mean is x_0 itself. At other t, dividing x_0 out loses digits in float32.
    np.testing.assert_allclose(loss, expected, rtol=2e-2 if prediction == "mean" else 1e-3)
    assert (
        losses.min_snr_weight(make_schedule("jsd", 4), np.array([3]), 5.0, prediction="eps") == 1
    ).all()


@pytest.mark.parametrize(
    ("schedule", "options"), [("const", {"beta_end": 0.2}), ("linear", {"beta_end": 0.5})]
)
def test_min_snr_of_a_predicted_mean_is_its_limit_where_nothing_is_left(schedule, options):
    """snr / coef^2, its parts multiplied out in float64 before they vanish (Eq. 4 and 7)."""
    schedule = make_schedule(schedule, 1000, **options)
    t = np.arange(0, 1000, 37)
    betas = np.float64(schedule.betas)
    one_minus = (1 - np.cumprod(1 - betas))[t]
    snr = np.cumprod(1 - betas)[t] / one_minus
    expected = np.minimum(5 / snr, 1) * (1 - betas[t]) * one_minus / betas[t] ** 2
    got = losses.min_snr_weight(schedule, t, 5.0, prediction="mean")
    np.testing.assert_allclose(got, expected, rtol=1e-4)


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_the_bounds_mean_over_t_is_the_whole_sum(variance):
    betas, (x_0, noise) = np.linspace(0.01, 0.3, 20), images_and_noise()
    schedule = Schedule.from_betas(betas)
    loss = jax.jit(
        lambda t: losses.vlb(
            schedule,
            denoiser(schedule, "eps"),
            x_0,
            t[None],
            noise,
            prediction="eps",
            variance=variance,
        )
    )
    chain = Chain(betas)
    expected = chain.terms(chain.variance(variance)).sum()
    np.testing.assert_allclose(np.mean([loss(t) for t in np.arange(20)]), expected, rtol=1e-4)


def test_the_bound_is_not_clipped_in_training():
    schedule, x_0 = make_schedule("linear", 10), jnp.ones((1, 2, 2, 1))
    far, near = (
        losses.vlb(
            schedule,
            lambda x_t, t, value=value: jnp.full_like(x_t, value),
            x_0,
            jnp.array([5]),
            x_0,
            prediction="x_0",
            variance="fixed_small",
        )
        for value in (3.0, 2.0)
    )
    np.testing.assert_allclose(far / near, 4, rtol=1e-3)


def combinations():
    """Every (loss, prediction, variance, gamma) that a config accepts."""
    for loss in ("simple", "vlb", "hybrid"):
        for prediction in PREDICTIONS:
            for variance in ("fixed_large", "fixed_small", "learned", "learned_range"):
                for gamma in (None, 5.0):
                    try:
                        Diffusion(
                            loss=loss, prediction=prediction, variance=variance, min_snr_gamma=gamma
                        )
                    except UserError:
                        continue
                    yield loss, prediction, variance, gamma


def linear_network(schedule, channels):
    """(parameters, apply): an affine map of each pixel, one for each step and output channel."""
    shape = (schedule.num_timesteps, 1, 1, channels)
    params = {"slope": jnp.zeros(shape), "offset": jnp.zeros(shape)}
    return params, lambda params, x_t, t: params["slope"][t] * x_t + params["offset"][t]


def objective(loss, schedule, prediction, variance, gamma):
    options = {"prediction": prediction}
    if loss != "simple":
        options["variance"] = variance
    if loss != "vlb":
        options["min_snr_gamma"] = gamma
    return lambda denoise_fn, *batch: getattr(losses, loss)(
        schedule, denoise_fn, *batch, **options
    ).mean()


@pytest.fixture(scope="module")
def batch():
    """One fixed (x_0, t, noise)."""
    random = np.random.default_rng(3)
    x_0 = 0.7 + 0.05 * random.normal(size=(64, 2, 2, 1))
    return jnp.float32(x_0), jnp.arange(64) % 8, jnp.float32(random.normal(size=x_0.shape))


@pytest.mark.parametrize(("loss", "prediction", "variance", "gamma"), list(combinations()))
def test_every_allowed_objective_teaches(batch, loss, prediction, variance, gamma):
    schedule = make_schedule("linear", 8, beta_start=0.02, beta_end=0.5)
    params, apply = linear_network(schedule, 2 if variance.startswith("learned") else 1)
    total = objective(loss, schedule, prediction, variance, gamma)
    optimizer = optax.adam(0.1)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            value, gradient = jax.value_and_grad(
                lambda params: total(lambda x_t, t: apply(params, x_t, t), *batch)
            )(params)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), length=31)[1]

    values = train(params)
    assert np.isfinite(values).all() and values[-1] <= 0.8 * values[0]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_the_hybrids_gradient_in_the_mean_is_the_simple_losss(batch, prediction, variance):
    schedule = make_schedule("linear", 8, beta_start=0.02, beta_end=0.5)
    params, apply = linear_network(schedule, 2)
    params = jax.tree.map(lambda leaf: leaf + 0.3, params)

    def gradient(loss, part):
        total = objective(loss, schedule, prediction, variance, None)
        return jax.grad(
            lambda params: total(lambda x_t, t: apply(params, x_t, t)[..., part], *batch)
        )(params)

    hybrid, simple = gradient("hybrid", slice(None)), gradient("simple", slice(1))
    bound = gradient("vlb", slice(None))
    for name in params:
        np.testing.assert_array_equal(hybrid[name][..., 0], simple[name][..., 0])
        np.testing.assert_allclose(hybrid[name][..., 1], 0.001 * bound[name][..., 1], rtol=1e-5)
        assert np.abs(hybrid[name][..., 1]).max() > 0
