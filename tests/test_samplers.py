"""Ancestral sampling with denoisers whose answer is known."""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import M, S, denoiser, gain

from ddpm_jax import Schedule, make_schedule, samplers
from ddpm_jax.config import Diffusion
from ddpm_jax.devices.mesh import batch_sharding, make_mesh
from ddpm_jax.diffusion import p_mean_variance, target, x_0_denoiser
from ddpm_jax.schedule import SCHEDULES, schedule_parameters, strided

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
        schedule,
        oracle(schedule, image, prediction),
        keys(4),
        SHAPE,
        prediction=prediction,
        variance=variance,
    )
    np.testing.assert_allclose(x_0, jnp.broadcast_to(image, x_0.shape), atol=1e-4)


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_gaussian_data_and_their_optimal_denoiser_give_the_chains_exact_moments(variance):
    """x_0 ~ N(m, s^2) per pixel: steps are affine, so mean and variance follow a recursion."""
    m, s, T = 0.3, 0.2, 50
    schedule = make_schedule("linear", T, beta_start=2e-3, beta_end=0.3)

    def denoise_fn(x_t, t):
        a = schedule.alphas_bar[t].reshape(-1, 1, 1, 1)
        return jnp.sqrt(1 - a) * (x_t - jnp.sqrt(a) * m) / (a * s**2 + 1 - a)

    x_0 = samplers.ancestral(
        schedule, denoise_fn, keys(4000), (4, 4, 1), prediction="eps", variance=variance, clip=False
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
        p = p_mean_variance(
            schedule, x_t, x_t, jnp.array([t]), prediction="x_0", variance="fixed_large"
        )
        return samplers.ancestral_step(p, t, noise)

    np.testing.assert_array_equal(step(0, noise), step(0, 0 * noise))
    for t, beta in ((1, 0.01005), (2, 0.02)):
        np.testing.assert_allclose(
            step(t, noise) - step(t, 0 * noise), 100 * np.sqrt(beta), rtol=1e-5
        )


def test_the_network_is_told_the_original_steps_of_a_strided_chain():
    schedule = Schedule.from_betas([0.1, 0.2, 0.3], timesteps=[5, 50, 500])
    seen = []

    def denoise_fn(x, t):
        jax.debug.callback(lambda t: seen.append(t.tolist()), t, ordered=True)
        return x

    samplers.ancestral(
        schedule, denoise_fn, keys(2), SHAPE, prediction="eps", variance="fixed_small"
    )
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
            np.testing.assert_array_equal(
                samplers.gaussian_noise(keys(8)[i : i + 1], t, SHAPE)[0], noise[i]
            )
            alone = jax.random.normal(
                jax.random.fold_in(jax.random.fold_in(jax.random.key(0), i), t), SHAPE
            )
            np.testing.assert_array_equal(alone, noise[i])
    assert len(np.unique(samplers.gaussian_noise(keys(8), 0, SHAPE))) == 48


def test_noise_has_the_same_bits_on_any_number_of_devices():
    noise = jax.jit(lambda keys: samplers.gaussian_noise(keys, 3, SHAPE))
    for devices in (2, 4):
        spread = jax.device_put(keys(8), batch_sharding(make_mesh(devices)))
        np.testing.assert_array_equal(noise(spread), noise(keys(8)))


def test_one_step_chains_work():
    schedule = make_schedule("linear", 1)
    x_0 = samplers.ancestral(
        schedule, lambda x, t: x, keys(3), SHAPE, prediction="x_0", variance="fixed_large"
    )
    np.testing.assert_allclose(
        x_0, jnp.clip(samplers.gaussian_noise(keys(3), samplers.START, SHAPE), -1, 1), rtol=1e-6
    )


def test_time_grids_by_hand():
    def grid(T, steps, name):
        return samplers.time_grid(T, steps, name).tolist()

    assert grid(1000, 4, "linspace") == [0, 333, 666, 999] and grid(1000, 1, "linspace") == [999]
    assert grid(1000, 4, "leading") == [0, 250, 500, 750]
    assert grid(1000, 4, "trailing") == [249, 499, 749, 999]
    # (sqrt(800) i / 4)^2 rounded down, as in the DDIM code.
    assert grid(1000, 5, "quad") == [0, 50, 200, 450, 800]
    # 999 (i / 4)^2, rounded.
    assert grid(1000, 5, "squares") == [0, 62, 250, 562, 999] and grid(1000, 1, "squares") == [999]
    assert grid(6, 5, "squares") == [0, 1, 2, 3, 5]  # Of 0, 0.3, 1.25, 2.8, 5.
    assert grid(10, 3, "leading") == [0, 3, 6] and grid(10, 3, "trailing") == [3, 6, 9]
    for name in get_args(samplers.Grid):
        assert grid(7, 7, name) == list(range(7))
        for steps in (1, 2, 50, 799, 999):
            t = samplers.time_grid(1000, steps, name)
            assert len(t) == steps and t[0] >= 0 and t[-1] <= 999 and (np.diff(t) > 0).all()
    for steps in (0, 11):
        with pytest.raises(ValueError, match="steps: must be from 1 to 10"):
            samplers.time_grid(10, steps)
    with pytest.raises(ValueError, match="grid"):
        samplers.time_grid(10, 3, "cubic")


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
@pytest.mark.parametrize("clip", [True, False])
def test_ddim_with_eta_1_is_ancestral_sampling_with_the_posteriors_variance(prediction, clip):
    schedule = make_schedule("linear", 60, beta_start=2e-3, beta_end=0.2)
    # Some structure, and predictions beyond [-1, 1], so that the clip acts.
    network = lambda x_t, t: jnp.sin(3 * x_t) + 0.3 * x_t  # noqa: E731
    options = dict(prediction=prediction, variance="fixed_small", clip=clip)
    expected = samplers.ancestral(schedule, network, keys(8), SHAPE, **options)
    got = samplers.ddim(schedule, network, keys(8), SHAPE, eta=1.0, **options)
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-4)
    other = samplers.ddim(schedule, network, keys(8), SHAPE, eta=0.5, **options)
    assert np.abs(other - expected).max() > 0.01


def test_after_a_clip_ddim_takes_the_eps_that_leads_from_the_clipped_image():
    """Eq. 12 of DDIM in NumPy, one step from t = 1 to t = 0."""
    betas = np.array([0.1, 0.3])
    a = np.cumprod(1 - betas)
    x_t = np.float32([[[[2.5], [-0.3]]]])
    got = samplers.ddim(
        Schedule.from_betas(betas),
        lambda x, t: jnp.where(
            t.reshape(-1, 1, 1, 1) == 1, 3.0 * x, x
        ),  # At t = 0 the image is kept.
        None,
        (1, 2, 1),
        prediction="x_0",
        variance="fixed_small",
        x_T=x_t,
    )
    x_0 = np.clip(3.0 * x_t, -1, 1)
    expected = np.sqrt(a[0]) * x_0 + np.sqrt(1 - a[0]) * (x_t - np.sqrt(a[1]) * x_0) / np.sqrt(
        1 - a[1]
    )
    np.testing.assert_allclose(got, np.clip(expected, -1, 1), rtol=1e-5)


def fine_chain():
    """4,000 steps that are even in lambda = log(alpha / sigma), from 4 to -4."""
    alphas_bar = 1 / (1 + np.exp(-2 * np.linspace(4, -4, 4000)))
    return Schedule.from_betas(1 - alphas_bar / np.append(1, alphas_bar[:-1]))


def exact_ode(x_T, a_T, a_0):
    """Where the probability-flow ODE takes x_T for Gaussian data, and the best x_0 there."""
    spread = np.sqrt(a_0 * S**2 + 1 - a_0) / np.sqrt(a_T * S**2 + 1 - a_T)
    x = np.sqrt(a_0) * M + spread * (np.float64(x_T) - np.sqrt(a_T) * M)
    return M + gain(a_0) * (x - np.sqrt(a_0) * M)


def ode_errors(sampler, strides):
    """The largest error of `sampler` against the exact ODE on each number of steps."""
    schedule = fine_chain()
    a = np.cumprod(1 - np.float64(schedule.betas))
    x_T = jnp.linspace(-2, 2, 12).reshape(2, *SHAPE)
    options = dict(prediction="eps", variance="fixed_small", clip=False, x_T=x_T)
    errors = []
    for steps in strides:
        short = strided(schedule, samplers.time_grid(4000, steps))
        x_0 = sampler(short, denoiser(schedule, "eps"), None, SHAPE, **options)
        errors.append(np.abs(x_0 - exact_ode(x_T, a[-1], a[0])).max())
    return np.array(errors)


@pytest.mark.parametrize("sampler", [samplers.dpm_solver, samplers.heun])
def test_solvers_are_of_second_order_and_ddim_of_first(sampler):
    second = ode_errors(sampler, (20, 40, 80))
    first = ode_errors(samplers.ddim, (20, 40, 80))
    # Twice the steps: a quarter of the error, and half of it.
    assert ((second[:-1] / second[1:] > 3.3) & (second[:-1] / second[1:] < 5)).all()
    assert ((first[:-1] / first[1:] > 1.7) & (first[:-1] / first[1:] < 2.3)).all()
    assert (second < first / 3).all()


def test_heun_is_algorithm_1_of_karras_et_al_in_their_own_coordinates():
    """In float64 NumPy: x / sqrt(alphas_bar) over sigma, the mean slope, DDIM at the end."""
    betas = np.linspace(0.02, 0.4, 12)
    a = np.cumprod(1 - betas)
    sigma = np.append(np.sqrt((1 - a) / a)[::-1], 0.0)
    x_T = np.random.default_rng(0).normal(size=(2, *SHAPE))

    def x_0_of(x_t):  # A network that predicts x_0, the same at every step.
        return np.sin(2 * x_t) + 0.2 * x_t

    x = x_T / np.sqrt(a[-1])
    for i in range(12):
        scale = 1 / np.sqrt(1 + sigma[i] ** 2)
        slope = (x - x_0_of(scale * x)) / sigma[i]
        end = x + (sigma[i + 1] - sigma[i]) * slope
        if sigma[i + 1] > 0:
            scale = 1 / np.sqrt(1 + sigma[i + 1] ** 2)
            slope_end = (end - x_0_of(scale * end)) / sigma[i + 1]
            end = x + (sigma[i + 1] - sigma[i]) * (slope + slope_end) / 2
        x = end

    calls = []

    def network(x_t, t):
        jax.debug.callback(lambda t: calls.append(int(t[0])), t)
        return jnp.sin(2 * x_t) + 0.2 * x_t

    got = samplers.heun(
        Schedule.from_betas(betas),
        network,
        None,
        SHAPE,
        prediction="x_0",
        variance="fixed_small",
        clip=False,
        x_T=jnp.float32(x_T),
    )
    np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-5)
    jax.effects_barrier()
    # Two calls a step, the second one step further down, but for the last.
    assert sorted(calls) == sorted([*range(12), *range(11)])


def test_heun_is_finite_where_steps_have_nothing_left_of_the_image():
    """alphas_bar is 0 in float32 at several steps."""
    schedule = make_schedule("const", 1000, beta_end=0.2)
    short = strided(schedule, samplers.time_grid(1000, 10))
    assert (np.asarray(short.alphas_bar) == 0).sum() > 1
    options = dict(prediction="x_0", variance="fixed_small")
    x_0 = samplers.heun(short, lambda x, t: 0.5 * x, keys(2), SHAPE, **options)
    assert np.isfinite(x_0).all()


def test_ddim_encodes_what_it_decodes():
    schedule, x_0 = fine_chain(), jnp.linspace(-0.6, 0.9, 12).reshape(2, *SHAPE)
    options = dict(prediction="eps", variance="fixed_small", clip=False)
    errors = []
    for steps in (50, 400):
        short = strided(schedule, samplers.time_grid(4000, steps))
        x_T = samplers.ddim_encode(
            short, denoiser(schedule, "eps"), x_0, prediction="eps", variance="fixed_small"
        )
        x = samplers.ddim(short, denoiser(schedule, "eps"), None, SHAPE, x_T=x_T, **options)
        errors.append(np.abs(x - x_0).max())
    assert errors[1] < 0.01 and errors[1] < errors[0] / 4
    # Encoded data are Gaussian with the spread of x_T.
    np.testing.assert_allclose(x_T.mean(), (x_0.mean() - M) / S, atol=0.05)
    np.testing.assert_allclose(x_T.std(), x_0.std() / S, rtol=0.05)


@pytest.mark.parametrize("prediction", ["eps", "mean"])
@pytest.mark.parametrize("steps", [10, 25])
def test_a_strided_ancestral_chain_has_its_exact_moments(prediction, steps):
    """Affine steps with sigmas of the strided chain, followed in NumPy from alphas_bar alone."""
    schedule = make_schedule("linear", 100, beta_start=1e-3, beta_end=0.15)
    grid = samplers.time_grid(100, steps)
    denoise_fn = x_0_denoiser(schedule, denoiser(schedule, prediction), prediction=prediction)
    options = dict(prediction="x_0", variance="fixed_small", clip=False)
    x_0 = samplers.ancestral(strided(schedule, grid), denoise_fn, keys(4000), (4, 4, 1), **options)
    a = np.cumprod(1 - np.linspace(1e-3, 0.15, 100))[grid]
    a_prev = np.append(1, a[:-1])
    mean, var = 0.0, 1.0
    for i in reversed(range(steps)):
        alpha = a[i] / a_prev[i]
        c_0, c_t = (
            np.sqrt(a_prev[i]) * (1 - alpha) / (1 - a[i]),
            np.sqrt(alpha) * (1 - a_prev[i]) / (1 - a[i]),
        )
        slope = c_0 * gain(a[i]) + c_t
        mean = slope * mean + c_0 * (1 - gain(a[i]) * np.sqrt(a[i])) * M
        var = slope**2 * var + (1 - alpha) * (1 - a_prev[i]) / (1 - a[i])
    np.testing.assert_allclose([x_0.mean(), x_0.std()], [mean, np.sqrt(var)], atol=0.005)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS.values(), ids=samplers.SAMPLERS)
def test_every_sampler_starts_from_the_same_noise_however_many_steps(sampler):
    schedule = make_schedule("linear", 20)
    for steps in (1, 3, 20):
        seen = []

        def denoise_fn(x, t, seen=seen):
            jax.debug.callback(lambda x, t: seen.append((x, t[0])), x, t, ordered=True)
            return x

        short = strided(schedule, samplers.time_grid(20, steps))
        _, xs = sampler(
            short,
            denoise_fn,
            keys(2),
            SHAPE,
            prediction="eps",
            variance="fixed_small",
            trajectory=True,
        )
        jax.effects_barrier()
        assert xs.shape == (steps, 2, *SHAPE) and np.isfinite(xs).all()
        visited = samplers.time_grid(20, steps)[::-1]
        if sampler is samplers.heun:  # It looks one step ahead from each.
            visited = np.append(visited[0], visited[1:].repeat(2))
        assert [t for _, t in seen] == visited.tolist()
        np.testing.assert_array_equal(
            seen[0][0], samplers.gaussian_noise(keys(2), samplers.START, SHAPE)
        )


@pytest.mark.parametrize("sampler", samplers.SAMPLERS.values(), ids=samplers.SAMPLERS)
def test_a_chain_that_ends_at_pure_noise_can_be_sampled(sampler):
    schedule = make_schedule("jsd", 30)
    image = jnp.linspace(-1, 1, 6).reshape(1, *SHAPE)
    for steps in (30, 5):
        short = strided(schedule, samplers.time_grid(30, steps))
        x_0 = sampler(
            short,
            lambda x, t: jnp.broadcast_to(image, x.shape),
            keys(2),
            SHAPE,
            prediction="x_0",
            variance="fixed_small",
        )
        np.testing.assert_allclose(x_0, jnp.broadcast_to(image, x_0.shape), atol=1e-5)


@functools.cache
def extreme_chains():
    """Chains of 6 steps on every grid, of every schedule at the ends of what its betas may be.

    Their tables, each with an axis of all chains in front, and a function that makes a Schedule of
    the tables of one.
    """
    ends = (1e-11, 1e-4, 0.2, 0.5, 1.0)
    chains = []
    for name in SCHEDULES:
        accepted = schedule_parameters(name)
        for start in ends if "beta_start" in accepted else (None,):
            for end in ends if "beta_end" in accepted else (None,):
                config = Diffusion(schedule=name, beta_start=start, beta_end=end)
                schedule = make_schedule(name, 1000, **config.schedule_parameters)
                grids = [samplers.time_grid(1000, 6, grid) for grid in get_args(samplers.Grid)]
                chains += [strided(schedule, grid) for grid in grids]
    tables = [np.stack(each) for each in zip(*map(jax.tree.leaves, chains), strict=True)]
    return chains, tables, functools.partial(jax.tree.unflatten, jax.tree.structure(chains[0]))


@pytest.mark.parametrize("prediction", ["x_0", "eps"])
@pytest.mark.parametrize("sampler", samplers.SAMPLERS.values(), ids=samplers.SAMPLERS)
def test_every_sampler_is_finite_on_every_schedule_and_grid(sampler, prediction):
    image = jnp.linspace(-1, 1, 6).reshape(1, *SHAPE)
    chains, tables, schedule_of = extreme_chains()
    own = None
    if sampler.tables is not None:
        own = jax.tree.map(lambda *each: np.stack(each), *[sampler.tables(c, c) for c in chains])

    def draw(tables, own):
        return sampler(
            schedule_of(tables),
            lambda x, t: jnp.broadcast_to(image, x.shape),
            keys(2),
            SHAPE,
            prediction=prediction,
            variance="fixed_small",
            trajectory=True,
            tables=own,
        )

    x_0, xs = jax.jit(jax.vmap(draw))(tables, own)
    assert len(xs) > 300 and np.isfinite(xs).all()
    if prediction == "x_0":  # Whatever the chain, it ends at the image that is predicted.
        np.testing.assert_allclose(x_0, jnp.broadcast_to(image, x_0.shape), atol=1e-5)


@pytest.mark.parametrize("name", ["dpm-solver++", "dpm-solver++3m", "unipc", "deis", "ipndm"])
def test_a_multistep_sampler_is_ddim_where_nothing_is_left_of_the_image(name):
    """Both are of first order there, and exact: in float64, with alphas_bar as they are."""
    schedule = make_schedule("const", 1000, beta_end=0.2)
    steps = np.array([0, 5, 20, 600, 800, 999])
    a = np.cumprod(1 - np.float64(schedule.betas))[steps]
    short = strided(schedule, steps)
    assert (np.asarray(short.sqrt_alphas_bar) == 0).sum() == 3
    sampler = samplers.SAMPLERS[name]
    x_0, x = np.float32(np.random.default_rng(0).normal(size=(2, 1, *SHAPE)))
    for t in (5, 4, 3):
        eps = (x - np.sqrt(a[t]) * x_0) / np.sqrt(1 - a[t])
        expected = np.sqrt(a[t - 1]) * x_0 + np.sqrt(1 - a[t - 1]) * eps
        row = sampler.tables(short, schedule).predict[t]
        assert not row[2:].any()
        np.testing.assert_allclose(row[0] * x + row[1] * x_0, expected, rtol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_ddim_step_is_eq_12_in_numpy(rng, eta):
    a, a_prev = 0.63, 0.9
    x_0, x_t, noise = np.float32(rng.normal(size=(3, 1, *SHAPE)))
    sigma = eta * np.sqrt((1 - a_prev) / (1 - a)) * np.sqrt(1 - a / a_prev)
    eps = (x_t - np.sqrt(a) * x_0) / np.sqrt(1 - a)
    expected = np.sqrt(a_prev) * x_0 + np.sqrt(1 - a_prev - sigma**2) * eps + sigma * noise
    got = samplers.ddim_step(Schedule.from_betas([0.1, 0.3]), x_0, x_t, 1, noise, eta=eta)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
