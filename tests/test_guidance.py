"""Guidance with denoisers whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_samplers import keys

from ddpm_jax import make_schedule, samplers
from ddpm_jax.diffusion import predict_x_0, target
from ddpm_jax.errors import UserError
from ddpm_jax.guidance import NO_CLASS, guided
from ddpm_jax.schedule import strided

# Of class 0, class 1 and, last, no class.
MEANS = np.array([0.5, -0.4, 0.1])
DEVIATIONS = np.array([0.2, 0.3, 0.6])
SHAPE = (2, 2, 1)


def best(schedule, prediction, calls=None):
    """The optimal denoiser for pixels N(MEANS[label], DEVIATIONS[label]^2)."""

    def conditional_fn(x_t, t, labels):
        if calls is not None:
            calls.append((x_t, t, labels))
        a = schedule.alphas_bar[t].reshape(-1, 1, 1, 1)
        m = jnp.float32(MEANS)[labels].reshape(-1, 1, 1, 1)
        s2 = jnp.square(jnp.float32(DEVIATIONS)[labels]).reshape(-1, 1, 1, 1)
        x_0 = m + jnp.sqrt(a) * s2 / (a * s2 + 1 - a) * (x_t - jnp.sqrt(a) * m)
        noise = (x_t - jnp.sqrt(a) * x_0) / jnp.sqrt(1 - a)
        return target(schedule, x_0, x_t, t, noise, prediction=prediction)

    return conditional_fn


def best_x_0(a, x_t, label):
    """The same in float64: the offset and the slope of x_0 in x_t are its values at 0 and 1."""
    m, s2 = MEANS[label], DEVIATIONS[label] ** 2
    return m + np.sqrt(a) * s2 / (a * s2 + 1 - a) * (x_t - np.sqrt(a) * m)


def moments(betas, timesteps, label, w, interval=(-np.inf, np.inf)):
    """(mean, deviation) of a pixel that the guided ancestral chain on `timesteps` draws."""
    a = np.cumprod(1 - betas)[timesteps]
    a_prev = np.append(1, a[:-1])
    mean, variance = 0.0, 1.0
    for i in reversed(range(len(a))):
        w_t = w if interval[0] <= timesteps[i] < interval[1] else 1.0
        x_0 = [w_t * best_x_0(a[i], x, label) + (1 - w_t) * best_x_0(a[i], x, -1) for x in (0, 1)]
        alpha = a[i] / a_prev[i]
        of_x_0 = np.sqrt(a_prev[i]) * (1 - alpha) / (1 - a[i])
        of_x_t = np.sqrt(alpha) * (1 - a_prev[i]) / (1 - a[i])
        slope = of_x_0 * (x_0[1] - x_0[0]) + of_x_t
        mean = slope * mean + of_x_0 * x_0[0]
        variance = slope**2 * variance + (1 - alpha) * (1 - a_prev[i]) / (1 - a[i])
    return mean, np.sqrt(variance)


@pytest.mark.parametrize(
    ("w", "interval", "prediction"),
    [(0.0, None, "eps"), (1.5, None, "v"), (3.0, (10, 30), "x_0"), (-1.0, (0, 20), "mean")],
)
def test_samples_have_the_moments_of_the_guided_chain(w, interval, prediction):
    betas = np.linspace(1e-3, 0.25, 40)
    schedule = make_schedule("linear", 40, beta_start=1e-3, beta_end=0.25)
    grid = np.arange(40) if prediction == "mean" else samplers.time_grid(40, 12)
    labels = jnp.arange(8000) % 2
    x_0 = samplers.ancestral(
        strided(schedule, grid),
        guided(best(schedule, prediction), labels, w, interval),
        keys(8000),
        SHAPE,
        prediction=prediction,
        variance="fixed_small",
        clip=False,
    )
    for label in (0, 1):
        of_label = np.asarray(x_0)[label::2]
        mean, deviation = moments(betas, grid, label, w, interval or (0, 40))
        error = deviation / np.sqrt(of_label.size)  # 0.008 of a deviation.
        np.testing.assert_allclose(of_label.mean(), mean, atol=6 * error)
        np.testing.assert_allclose(of_label.std(), deviation, atol=6 * error)
        far = moments(betas, grid, label, 1.0)  # Guidance matters by much more than that.
        assert max(abs(far[0] - mean), abs(far[1] - deviation)) > 20 * error


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v", "mean"])
def test_any_prediction_is_guided_alike(prediction):
    """w x_0 of the label + (1 - w) x_0 of none, at every step, whatever is predicted."""
    schedule = make_schedule("linear", 12, beta_start=0.01, beta_end=0.3)
    t = np.arange(12)
    x_t = np.float32(np.random.default_rng(0).normal(size=(12, *SHAPE)))
    output = guided(best(schedule, prediction), jnp.full(12, 1), 2.5)(x_t, t)
    got = predict_x_0(schedule, output, x_t, t, prediction=prediction)
    a = np.cumprod(1 - np.linspace(0.01, 0.3, 12)).reshape(-1, 1, 1, 1)
    expected = 2.5 * best_x_0(a, x_t, 1) - 1.5 * best_x_0(a, x_t, -1)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_guidance_is_one_call_of_a_doubled_batch_and_without_it_a_plain_one():
    schedule = make_schedule("linear", 12)
    x_t = jnp.arange(8.0).reshape(2, *SHAPE)
    t = jnp.array([3, 7])
    labels = jnp.array([1, 0])
    for w in (1.0, 1, np.float64(1)):
        calls = []
        fn = best(schedule, "eps", calls)
        np.testing.assert_array_equal(guided(fn, labels, w)(x_t, t), fn(x_t, t, labels))
        assert len(calls) == 2 and all(len(seen) == 2 for seen in calls[0])
    for w in (2.0, jnp.float32(1)):  # An argument of a program may be 1, but any other too.
        calls = []
        guided(best(schedule, "eps", calls), labels, w, (4, 9))(x_t, t)
        ((seen, steps, classes),) = calls
        np.testing.assert_array_equal(seen, x_t[np.array([0, 0, 1, 1])])
        np.testing.assert_array_equal(steps, [3, 3, 7, 7])
        np.testing.assert_array_equal(classes, [1, NO_CLASS, 0, NO_CLASS])
    calls = []
    guided(best(schedule, "eps", calls), labels, 2.0, none=2)(x_t, t)
    np.testing.assert_array_equal(calls[0][2], [1, 2, 0, 2])


def test_outside_the_interval_the_output_is_the_conditional_one():
    schedule = make_schedule("linear", 12)
    fn = best(schedule, "eps")
    t = jnp.arange(12)
    x_t = jax.random.normal(jax.random.key(0), (12, *SHAPE))
    labels = jnp.zeros(12, jnp.int32)
    got = guided(fn, labels, 4.0, (3, 8))(x_t, t)
    inside = (t >= 3) & (t < 8)
    np.testing.assert_array_equal(got[~inside], fn(x_t, t, labels)[~inside])
    np.testing.assert_array_equal(got[inside], guided(fn, labels, 4.0)(x_t, t)[inside])
    assert (np.abs(got - fn(x_t, t, labels)).max(axis=(1, 2, 3)) > 0.01).tolist() == inside.tolist()


def test_an_image_without_a_class_is_not_guided():
    schedule = make_schedule("linear", 12)
    fn = best(schedule, "eps")
    x_t = jax.random.normal(jax.random.key(0), (2, *SHAPE))
    t = jnp.array([5, 5])
    labels = jnp.array([NO_CLASS, 1])
    got = guided(fn, labels, 4.0)(x_t, t)
    np.testing.assert_array_equal(got[0], fn(x_t, t, labels)[0])


def test_a_learned_variance_is_the_conditional_one():
    def conditional_fn(x_t, t, labels):
        of_class = jnp.where(labels == NO_CLASS, 1.0, 5.0).reshape(-1, 1, 1, 1)
        return jnp.concatenate([of_class * x_t, of_class + 0 * x_t], axis=-1)

    x_t = jnp.ones((2, 2, 2, 3))
    output = guided(conditional_fn, jnp.array([0, 1]), 2.0, (0, 4))(x_t, jnp.array([3, 4]))
    assert output.shape == (2, 2, 2, 6)
    assert (output[0, ..., :3] == 9).all() and (output[1, ..., :3] == 5).all()
    assert (output[..., 3:] == 5).all()


def test_an_output_keeps_its_dtype():
    def conditional_fn(x_t, t, labels):
        return x_t.astype(jnp.bfloat16)

    for w in (2.0, np.float64(2), jnp.float32(2)):
        output = guided(conditional_fn, jnp.array([0]), w)(jnp.ones((1, *SHAPE)), jnp.array([0]))
        assert output.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("w", "interval", "words"),
    [
        (float("nan"), None, "guidance: must be a finite number, got nan"),
        (float("inf"), None, "guidance: must be a finite number, got inf"),
        (1e39, None, "guidance: must be a finite number, got 1e"),
        (2.0, (5, 5), r"guidance_interval: must be \(lo, hi\) with lo < hi"),
        (2.0, (8, 3), "guidance_interval"),
        (2.0, (1, 2, 3), "guidance_interval"),
    ],
)
def test_what_is_no_guidance_is_one_line(w, interval, words):
    with pytest.raises(UserError, match=words):
        guided(lambda x_t, t, labels: x_t, jnp.array([0]), w, interval)
