"""Inpainting, variations and restoration with Gaussian data, whose answers are known."""

from functools import partial

import gaussian
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_operators import OPERATORS, dense
from test_samplers import exact_ode, fine_chain, keys

from ddpm_jax import make_schedule, samplers
from ddpm_jax.diffusion import p_mean_variance
from ddpm_jax.editing import (
    conditioned,
    diffused,
    inpaint,
    inpaint_step,
    inpaint_walk,
    lowest,
    restore,
    vary,
)
from ddpm_jax.errors import UserError
from ddpm_jax.guidance import guided
from ddpm_jax.operators import blur, downscale, grey, mask
from ddpm_jax.samplers import SAMPLERS
from ddpm_jax.schedule import strided

OPTIONS = dict(prediction="x_0", variance="fixed_small", clip=False)


class Gaussian:
    """Pixels of a chain's x_t in float64: x_0 ~ N(mean, covariance), and what a chain makes of x.

    `betas` are those of the chain that is followed.
    """

    def __init__(self, betas, mean, covariance):
        self.betas = np.asarray(betas, np.float64)
        self.a = np.cumprod(1 - self.betas)
        self.a_prev = np.append(1, self.a[:-1])
        self.prior = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)

    def best(self, t):
        """(offset, slope) of E[x_0 | x_t] in x_t."""
        mean, covariance = self.prior
        a = self.a[t]
        noisy = a * covariance + (1 - a) * np.eye(len(mean))
        slope = np.sqrt(a) * covariance @ np.linalg.inv(noisy)
        return mean - np.sqrt(a) * slope @ mean, slope

    def posterior(self, t, x_t, matrix, y, n):
        """E[x_0 | x_t, y] where y = matrix x_0 + noise of deviation n."""
        mean, covariance = self.prior
        a = self.a[t]
        pixels = len(mean)
        rows = np.concatenate([np.sqrt(a) * np.eye(pixels), matrix])
        noise = np.append(np.full(pixels, 1 - a), np.full(len(matrix), n**2))
        together = rows @ covariance @ rows.T + np.diag(noise)
        away = np.append(x_t, y) - rows @ mean
        return mean + covariance @ rows.T @ np.linalg.solve(together, away)

    def down(self, t, offset, slope):
        """(offset, slope, variance) of x_{t-1} in x_t, x_0 being offset + slope x_t (Eq. 7)."""
        of_x_0 = np.sqrt(self.a_prev[t]) * self.betas[t] / (1 - self.a[t])
        of_x_t = np.sqrt(1 - self.betas[t]) * (1 - self.a_prev[t]) / (1 - self.a[t])
        variance = self.betas[t] * (1 - self.a_prev[t]) / (1 - self.a[t])
        return of_x_0 * offset, of_x_0 * slope + of_x_t * np.eye(len(offset)), variance

    def denoiser(self, schedule):
        """The network that predicts E[x_0 | x_t], of images of as many pixels."""
        rows = [self.best(t) for t in range(len(self.betas))]
        offsets, slopes = (jnp.float32(np.stack(each)) for each in zip(*rows, strict=True))

        def denoise_fn(x_t, t):
            t = jnp.searchsorted(schedule.timesteps, t)
            flat = x_t.reshape(len(x_t), -1)
            x_0 = offsets[t] + jnp.einsum("bij,bj->bi", slopes[t], flat)
            return x_0.reshape(x_t.shape)

        return denoise_fn


def agree(images, mean, covariance, errors=6):
    """The moments of images [N,...] are these, to so many standard errors."""
    flat = np.float64(images).reshape(len(images), -1)
    scale = np.sqrt(np.diag(covariance)) + 1e-6
    root = np.sqrt(len(flat))
    assert (np.abs(flat.mean(axis=0) - mean) <= errors * scale / root).all()
    away = np.abs(np.cov(flat.T) - covariance) / np.outer(scale, scale)
    assert (away <= errors * np.sqrt(2) / root).all()


# Four pixels of correlated data, of which the first and the last are known.
MEAN = np.array([0.2, -0.1, 0.3, 0.0])
PLACES = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
DISTANCES = np.abs(PLACES[:, None] - PLACES[None]).sum(axis=-1)
COVARIANCE = 0.3 * 0.8**DISTANCES
KNOWN = np.float32([0.9, 0.0, 0.0, 0.6])
MASK = np.float32([1, 0, 0, 1])
BETAS = np.linspace(0.02, 0.5, 16)


def inpainted_moments(data, resample, jump):
    """(mean, covariance) of RePaint's images: each step affine, the ways up one beta at a time."""
    T = len(data.betas)
    mean, covariance = np.zeros(4), np.eye(4)
    keep = MASK == 1

    def down(t, mean, covariance):
        offset, slope, variance = data.down(t, *data.best(t))
        mean = offset + slope @ mean
        covariance = slope @ covariance @ slope.T + (variance if t else 0) * np.eye(4)
        mean[keep] = np.sqrt(data.a_prev[t]) * KNOWN[keep]
        covariance[keep] = covariance[:, keep] = 0
        covariance[keep, keep] = 1 - data.a_prev[t]
        return mean, covariance

    for t in reversed(range(T)):
        mean, covariance = down(t, mean, covariance)
        again = resample - 1 if t >= 1 and (t - 1) % jump == 0 and t + jump <= T else 0
        for _ in range(again):
            for beta in data.betas[t : t + jump]:
                mean = np.sqrt(1 - beta) * mean
                covariance = (1 - beta) * covariance + beta * np.eye(4)
            for other in reversed(range(t, t + jump)):
                mean, covariance = down(other, mean, covariance)
    return mean, covariance


def test_inpainting_comes_nearer_to_the_conditional_distribution_with_resample():
    keep = MASK == 1
    across = COVARIANCE[~keep][:, keep] @ np.linalg.inv(COVARIANCE[keep][:, keep])
    mean = MEAN[~keep] + across @ (KNOWN - MEAN)[keep]
    covariance = COVARIANCE[~keep][:, ~keep] - across @ COVARIANCE[keep][:, ~keep]
    for steps, jump in ((16, 1), (16, 3), (60, 5)):
        scale = 16 / steps
        chain = Gaussian(np.linspace(0.02 * scale, 0.5 * scale, steps), MEAN, COVARIANCE)
        errors = []
        for resample in (1, 2, 4, 8):
            got_mean, got = inpainted_moments(chain, resample, jump)
            ratio = np.linalg.solve(got[~keep][:, ~keep], covariance)
            away = got_mean[~keep] - mean
            of_mean = away @ np.linalg.solve(got[~keep][:, ~keep], away)
            # The Kullback-Leibler divergence from the true distribution, in nats.
            errors.append(0.5 * (np.trace(ratio) - 2 - np.log(np.linalg.det(ratio)) + of_mean))
        assert (np.diff(errors) < 0).all() and errors[-1] < 0.6 * errors[0], (steps, jump, errors)


@pytest.mark.parametrize(("resample", "jump"), [(1, 1), (3, 1), (2, 4)])
def test_inpainted_images_have_the_moments_of_that_walk(resample, jump):
    n = 6000
    schedule = make_schedule("linear", 16, beta_start=0.02, beta_end=0.5)
    data = Gaussian(BETAS, MEAN, COVARIANCE)
    draw = partial(inpaint, schedule, data.denoiser(schedule), resample=resample, jump=jump)
    known = np.tile(KNOWN.reshape(1, 2, 2, 1), (n, 1, 1, 1))
    images = jax.jit(partial(draw, **OPTIONS))(keys(n), known, MASK.reshape(1, 2, 2, 1))
    agree(images, *inpainted_moments(data, resample, jump))


def test_the_walk_by_hand():
    assert inpaint_walk(3, 1, 1).tolist() == [[2, 0], [1, 0], [0, 0]]
    assert inpaint_walk(3, 2, 1).tolist() == [[2, 1], [2, 0], [1, 1], [1, 0], [0, 0]]
    # From 5: down to 3, up to 5, down to 1, up to 3, down to the image.
    down = [[4, 0], [3, 2], [4, 0], [3, 0], [2, 0], [1, 2], [2, 0], [1, 0], [0, 0]]
    assert inpaint_walk(5, 2, 2).tolist() == down
    assert len(inpaint_walk(250, 10, 10)) == 2410 and len(inpaint_walk(250, 1, 10)) == 250
    assert len(inpaint_walk(4, 10, 10)) == 4  # Too short for a way up.
    for steps, resample, jump in ((7, 3, 2), (30, 4, 7), (12, 2, 11)):
        walk = inpaint_walk(steps, resample, jump)
        # Each call continues where the one before, or its way up, has ended.
        assert walk[0, 0] == steps - 1 and walk[-1].tolist() == [0, 0]
        np.testing.assert_array_equal(walk[1:, 0], walk[:-1].sum(axis=1) - 1)
        ups = np.unique(walk[walk[:, 1] > 0, 0], return_counts=True)
        assert ups[0].tolist() == list(range(1, steps - jump + 1, jump))
        assert set(ups[1]) == {resample - 1} and walk[:, 0].max() == steps - 1


@pytest.mark.parametrize("name", ["resample", "jump"])
@pytest.mark.parametrize("value", [0, -1, True])
def test_what_is_no_number_of_passes_is_one_line(name, value):
    with pytest.raises(UserError, match=f"{name}: must be a whole number of at least 1"):
        inpaint_walk(10, **{"resample": 2, "jump": 2, name: value})


def test_known_pixels_come_back_as_they_are_and_the_network_is_called_along_the_walk():
    original = make_schedule("linear", 100)
    grid = np.array([0, 9, 40, 77, 99])
    seen = []

    def denoise_fn(x, t):
        jax.debug.callback(lambda t: seen.append(t.tolist()), t, ordered=True)
        return jnp.concatenate([jnp.sin(9 * x), x], axis=-1)

    known = np.random.default_rng(0).uniform(-1, 1, (2, 3, 2, 2)).astype(np.float32)
    known[0, 0, 0, 0] = -0.0
    keep = np.random.default_rng(1).random((2, 3, 2, 1)) > 0.5
    keep[0, 0, 0] = True
    images = inpaint(
        strided(original, grid),
        denoise_fn,
        keys(2),
        known,
        np.where(keep, 0.7, 0.3).astype(np.float32),
        resample=3,
        jump=2,
        prediction="x_0",
        variance="learned_range",
    )
    jax.effects_barrier()
    assert seen == [[grid[t]] * 2 for t in inpaint_walk(5, 3, 2)[:, 0]]
    keep = np.broadcast_to(keep, known.shape)
    got = np.asarray(images)
    np.testing.assert_array_equal(got[keep].view(np.int32), known[keep].view(np.int32))
    assert (got[~keep] != known[~keep]).all()


def test_a_walk_in_parts_is_the_whole_one():
    schedule = make_schedule("linear", 6, beta_end=0.5)
    known = jnp.linspace(-1, 1, 8).reshape(2, 2, 2, 1)
    keep = jnp.array([[True, False], [False, True]]).reshape(1, 2, 2, 1)
    passes = dict(resample=2, jump=2)

    @jax.jit
    def both(keys):
        arguments = (schedule, lambda x, t: 0.5 * x, keys, known, keep)
        step = inpaint_step(*arguments, **passes, **OPTIONS)
        x = samplers.start_state(keys, (2, 2, 1)).x
        for first, last in ((0, 4), (4, len(inpaint_walk(6, 2, 2)))):
            x = jax.lax.fori_loop(first, last, lambda i, x: step(x, i), x)
        return x, inpaint(*arguments, **passes, **OPTIONS)

    np.testing.assert_allclose(*both(keys(2)), atol=1e-6)


def edits():
    """{name: images of (keys, rows)}, each edit with a network that mixes no two images."""
    schedule = make_schedule("linear", 8, beta_end=0.5)
    images = np.linspace(-1, 1, 3 * 16, dtype=np.float32).reshape(3, 4, 4, 1)
    masks = images > 0
    masks[1] = True
    masks[1, 0] = False
    images, masks = jnp.asarray(images), jnp.asarray(masks)

    def network(x, t):
        return 0.3 * jnp.sin(3 * x) + 0.1 * jnp.roll(x, 1, axis=1)

    def inpainted(keys, rows):
        known = images[rows], masks[rows]
        return inpaint(schedule, network, keys, *known, resample=2, jump=2, **OPTIONS)

    def varied(keys, rows):
        return vary(schedule, network, keys, images[rows], 5, samplers.ancestral, **OPTIONS)

    def restored(keys, rows, noise):
        y = downscale(2).A(images[rows])
        method = samplers.ancestral
        return restore(schedule, network, keys, y, downscale(2), method, noise=noise, **OPTIONS)

    return {
        "inpaint": inpainted,
        "vary": varied,
        "ddnm": partial(restored, noise=0.0),
        "pigdm": partial(restored, noise=0.1),
    }


@pytest.mark.parametrize("name", ["inpaint", "vary", "ddnm", "pigdm"])
def test_an_image_does_not_depend_on_its_batch(name):
    edit = jax.jit(edits()[name])
    whole = edit(keys(3), np.arange(3))
    alone = edit(keys(3)[1:2], np.array([1]))
    np.testing.assert_allclose(alone[0], whole[1], rtol=1e-6, atol=1e-6)
    other = edit(keys(4)[3:], np.array([1]))
    assert np.abs(other - alone).max() > 0.01


@pytest.mark.parametrize(("name", "eta"), [("ancestral", 1.0), ("ddim", 0.0)])
def test_variations_have_the_moments_of_the_part_of_the_chain(name, eta):
    """Of one image: from x_k ~ N(sqrt(a) image, 1 - a) down affine steps, in float64."""
    T, k, n = 40, 7, 4000
    schedule = make_schedule("linear", T, beta_start=1e-3, beta_end=0.25)
    grid = samplers.time_grid(T, 12)
    short = strided(schedule, grid)
    image = jnp.float32([-0.6, 0.8]).reshape(1, 1, 2, 1)
    got = vary(
        short,
        gaussian.denoiser(schedule, "x_0"),
        keys(n),
        jnp.broadcast_to(image, (n, 1, 2, 1)),
        k,
        SAMPLERS[name],
        original=schedule,
        **OPTIONS,
    )
    a = np.cumprod(1 - np.linspace(1e-3, 0.25, T))[grid][:k]
    a_prev = np.append(1, a[:-1])
    mean, variance = np.sqrt(a[-1]) * np.array([-0.6, 0.8]), 1 - a[-1]
    for i in reversed(range(k)):
        noise = eta**2 * (1 - a[i] / a_prev[i]) * (1 - a_prev[i]) / (1 - a[i])
        of_eps = np.sqrt(1 - a_prev[i] - noise) / np.sqrt(1 - a[i])
        of_x_0 = np.sqrt(a_prev[i]) - of_eps * np.sqrt(a[i])
        gain = gaussian.gain(a[i])
        mean = (of_x_0 * gain + of_eps) * mean
        mean += of_x_0 * gaussian.M * (1 - gain * np.sqrt(a[i]))
        variance = (of_x_0 * gain + of_eps) ** 2 * variance + noise
    agree(got, mean, variance * np.eye(2))


@pytest.mark.parametrize("name", ["dpm-solver++3m", "unipc", "deis", "ipndm", "heun"])
def test_every_solver_can_start_in_the_middle_of_a_chain(name):
    """It follows the exact flow from there: no earlier prediction is made up."""
    schedule = fine_chain()
    images = jnp.linspace(-0.6, 0.9, 12).reshape(2, 2, 3, 1)
    short = strided(schedule, samplers.time_grid(4000, 60))
    fn = gaussian.denoiser(schedule, "x_0")
    x = diffused(lowest(short, 30), keys(2), images)
    got = vary(short, fn, keys(2), images, 30, SAMPLERS[name], original=schedule, **OPTIONS)
    a = np.cumprod(1 - np.float64(schedule.betas))[short.timesteps]
    np.testing.assert_allclose(got, exact_ode(x, a[29], a[0]), atol=1e-3)


def test_a_variation_of_all_steps_is_the_whole_chain():
    schedule = make_schedule("linear", 6, beta_end=0.5)
    images = jnp.linspace(-1, 1, 8).reshape(2, 2, 2, 1)
    assert lowest(schedule, 6) is schedule
    table = np.float64(schedule.posterior_variance) + 0.01
    options = dict(prediction="eps", variance=table, clip=True)
    a = np.cumprod(1 - np.linspace(1e-4, 0.5, 6))

    @partial(jax.jit, static_argnums=1)
    def both(keys, k):
        fn = lambda x, t: jnp.sin(x)  # noqa: E731
        got = vary(schedule, fn, keys, images, k, samplers.ancestral, **options)
        noise = samplers.gaussian_noise(keys, samplers.START, (2, 2, 1))
        x = np.sqrt(a[k - 1]) * images + np.sqrt(1 - a[k - 1]) * noise
        for t in reversed(range(k)):
            t_batch = jnp.array([t, t])
            p = p_mean_variance(schedule, fn(x, t_batch), x, t_batch, **options)
            x = samplers.ancestral_step(p, t, samplers.gaussian_noise(keys, t, (2, 2, 1)))
        return got, x

    for k in (6, 2):
        np.testing.assert_allclose(*both(keys(2), k), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [0, 7, -1])
def test_more_steps_than_the_chain_has_are_one_line(k):
    with pytest.raises(UserError, match=f"k: must be from 1 to the chain's 6 steps, got {k}"):
        lowest(make_schedule("linear", 6), k)


M, S = gaussian.M, gaussian.S
SHAPE = (4, 4, 3)


def data_of(betas, pixels):
    """Independent pixels N(M, S^2)."""
    return Gaussian(betas, np.full(pixels, M), S**2 * np.eye(pixels))


def measured(operator, n, shape=SHAPE):
    """y [1,h,w,c] of one image of that prior, with noise of deviation n."""
    rng = np.random.default_rng(0)
    x = np.float32(M + S * rng.normal(size=(1, *shape)))
    y = np.asarray(operator.A(x))
    return np.float32(y + n * rng.normal(size=y.shape))


@pytest.mark.parametrize("name", OPERATORS)
def test_pigdm_is_the_posterior_mean_at_every_step(name):
    """With the exact r2, in one batch that has every step of the paper's chain in it once."""
    operator = OPERATORS[name]
    schedule = make_schedule("linear", 1000)
    a = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    y = measured(operator, 0.1)
    rng = np.random.default_rng(1)
    shape = (1000, *SHAPE)
    level = a.reshape(-1, 1, 1, 1)
    x_0, noise = rng.normal(size=(2, *shape))
    x_t = np.float32(np.sqrt(level) * (M + S * x_0) + np.sqrt(1 - level) * noise)
    fn = conditioned(
        schedule,
        gaussian.denoiser(schedule, "x_0"),
        np.broadcast_to(y, (1000, *y.shape[1:])),
        operator,
        prediction="x_0",
        noise=0.1,
        r2=gaussian.mmse(a),
    )
    got = jax.jit(fn)(x_t, np.arange(1000))
    data = data_of(np.linspace(1e-4, 0.02, 1000), 48)
    matrix = dense(operator)
    for t in (0, 1, 2, 5, 10, *range(20, 999, 40), 998, 999):
        expected = data.posterior(t, np.float64(x_t[t].ravel()), matrix, np.float64(y.ravel()), 0.1)
        np.testing.assert_allclose(got[t].ravel(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "v", "mean"])
def test_pigdm_with_any_prediction(prediction):
    schedule = make_schedule("linear", 12, beta_start=0.01, beta_end=0.3)
    operator = OPERATORS["blur after grey"]
    data = data_of(np.linspace(0.01, 0.3, 12), 48)
    y = measured(operator, 0.05)
    x_t = np.float32(np.random.default_rng(1).normal(size=(12, *SHAPE)))
    fn = conditioned(
        schedule,
        gaussian.denoiser(schedule, prediction),
        np.broadcast_to(y, (12, *y.shape[1:])),
        operator,
        prediction=prediction,
        noise=0.05,
        r2=gaussian.mmse(data.a),
    )
    got = jax.jit(fn)(x_t, np.arange(12))
    for t in range(12):
        expected = data.posterior(t, x_t[t].ravel(), dense(operator), y.ravel(), 0.05)
        np.testing.assert_allclose(got[t].ravel(), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", OPERATORS)
def test_ddnm_satisfies_y_before_clipping(name):
    operator = OPERATORS[name]
    schedule = make_schedule("linear", 12, beta_start=0.01, beta_end=0.3)
    y = measured(operator, 0.0)
    batch = np.broadcast_to(y, (12, *y.shape[1:]))
    x_t = np.float32(np.random.default_rng(1).normal(size=(12, *SHAPE)))

    def network(x_t, t):
        return jnp.concatenate([jnp.sin(3 * x_t), x_t], axis=-1)

    fn = conditioned(schedule, network, batch, operator, prediction="eps")
    output = jax.jit(fn)(x_t, np.arange(12))
    x_0 = output[..., :3]
    np.testing.assert_allclose(operator.A(x_0), batch, atol=1e-5)
    np.testing.assert_array_equal(output[..., 3:], x_t)  # Those for the variance.
    # Nothing else is changed: the difference lies in the rows of A.
    a = np.cumprod(1 - np.linspace(0.01, 0.3, 12)).reshape(-1, 1, 1, 1)
    before = (x_t - np.sqrt(1 - a) * np.sin(3 * x_t)) / np.sqrt(a)
    change = np.asarray(x_0 - before).reshape(12, -1)
    matrix = dense(operator)
    inside = change @ matrix.T @ np.linalg.pinv(matrix, rcond=1e-4).T
    np.testing.assert_allclose(change, inside, atol=1e-4)


CASES = {
    "downscale": (downscale(2), (2, 2, 1)),
    "mask": (mask(np.array([[1, 0], [1, 1]])), (2, 2, 1)),
    "blur": (blur(np.array([[0.6, 0.3], [0.1, 0.0]])), (2, 2, 1)),
    "grey": (grey(), (1, 2, 3)),
}


@pytest.mark.parametrize(
    ("name", "method", "n"),
    [
        ("downscale", "ancestral", 0.1),
        ("mask", "ddim", 0.3),
        ("blur", "ancestral", 0.02),
        ("grey", "ddim", 0.1),
        ("blur", "ancestral", 0.0),
        ("downscale", "ddim", 0.0),
    ],
)
def test_restored_images_have_the_moments_of_the_finite_chain(name, method, n):
    operator, shape = CASES[name]
    T, count = 30, 4000
    betas = np.linspace(2e-3, 0.3, T)
    schedule = make_schedule("linear", T, beta_start=2e-3, beta_end=0.3)
    grid = samplers.time_grid(T, 10)
    pixels = np.prod(shape)
    a = np.cumprod(1 - betas)
    y = measured(operator, n, shape)
    r2 = 0.7 * (1 - a)  # Neither the default nor the exact one.
    images = restore(
        strided(schedule, grid),
        gaussian.denoiser(schedule, "x_0"),
        keys(count),
        np.broadcast_to(y, (count, *y.shape[1:])),
        operator,
        SAMPLERS[method],
        noise=n,
        r2=np.float32(r2),
        original=schedule,
        **OPTIONS,
    )
    a = a[grid]
    data = data_of(1 - a / np.append(1, a[:-1]), pixels)
    matrix = dense(operator, shape)
    mean, covariance = np.zeros(pixels), np.eye(pixels)
    for i in reversed(range(10)):
        offset, slope = data.best(i)
        if n:
            spread = r2[grid[i]] * matrix @ matrix.T + n**2 * np.eye(len(matrix))
            pull = (1 - a[i]) / np.sqrt(a[i]) * slope.T @ matrix.T @ np.linalg.inv(spread)
        else:
            pull = np.linalg.pinv(matrix)
        offset = offset + pull @ (y.ravel() - matrix @ offset)
        slope = slope - pull @ matrix @ slope
        if method == "ancestral":
            offset, slope, variance = data.down(i, offset, slope)
        else:
            of_eps = np.sqrt(1 - data.a_prev[i]) / np.sqrt(1 - a[i])
            of_x_0 = np.sqrt(data.a_prev[i]) - of_eps * np.sqrt(a[i])
            offset, slope = of_x_0 * offset, of_x_0 * slope + of_eps * np.eye(pixels)
            variance = 0.0
        mean = offset + slope @ mean
        covariance = slope @ covariance @ slope.T + (variance if i else 0.0) * np.eye(pixels)
    agree(images, mean, covariance)


def test_r2_is_1_minus_alphas_bar_unless_given():
    schedule = make_schedule("linear", 5, beta_end=0.5)
    y = jnp.full((5, 2, 2, 1), 0.3)
    x_t = jax.random.normal(jax.random.key(0), (5, 4, 4, 1))
    arguments = (schedule, gaussian.denoiser(schedule, "x_0"), y, downscale(2))
    default = conditioned(*arguments, prediction="x_0", noise=0.1)
    given = conditioned(*arguments, prediction="x_0", noise=0.1, r2=1 - schedule.alphas_bar)
    got, expected = jax.jit(lambda x, t: (default(x, t), given(x, t)))(x_t, np.arange(5))
    np.testing.assert_allclose(got, expected, rtol=1e-4)


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("name", ["ancestral", "unipc"])
def test_clipping_stands_last_and_a_chain_may_end_at_pure_noise(name, noise):
    """An image beyond [-1, 1] is what y asks for; jsd has nothing left of it at its last step."""
    schedule = make_schedule("jsd", 30)
    y = jnp.full((2, 1, 1, 1), 3.0)
    images = restore(
        strided(schedule, np.array([0, 8, 20, 29])),
        lambda x, t: jnp.sin(x),
        keys(2),
        y,
        downscale(2),
        SAMPLERS[name],
        noise=noise,
        prediction="eps",
        variance="fixed_small",
        original=schedule,
    )
    np.testing.assert_array_equal(images, jnp.ones((2, 2, 2, 1)))


def test_where_nothing_is_left_of_the_image_y_still_counts():
    """The posterior mean given y alone, in closed form; eps cannot say a thing there."""
    schedule = make_schedule("jsd", 30)
    y = jnp.full((1, 1, 1, 1), 0.5)
    fn = conditioned(
        schedule,
        lambda x, t: x / schedule.sqrt_one_minus_alphas_bar[-1],
        y,
        downscale(2),
        prediction="eps",
        noise=0.1,
    )
    x_0 = jax.jit(fn)(jnp.zeros((1, 2, 2, 1)), np.array([29]))
    np.testing.assert_allclose(x_0, np.full((1, 2, 2, 1), 0.5 * 0.25 / (0.25 + 0.01)), rtol=1e-5)


def test_guidance_and_restoration_compose():
    """The unknown pixel is the guided one, the known ones are y."""
    schedule = make_schedule("linear", 6, beta_start=0.01, beta_end=0.5)

    def conditional_fn(x_t, t, labels):
        of_class = jnp.where(labels == 0, 0.4, 0.1).reshape(-1, 1, 1, 1)
        return of_class + 0 * x_t

    denoise_fn = guided(conditional_fn, jnp.array([0, -1]), 3.0)
    y = jnp.full((2, 2, 2, 1), 0.9)
    operator = mask(np.array([[1, 0], [1, 1]]))
    fn = conditioned(schedule, denoise_fn, y, operator, prediction="x_0")
    x_0 = jax.jit(fn)(jnp.zeros((2, 2, 2, 1)), np.array([3, 3]))
    # 0.1 + 3 (0.4 - 0.1), and the image of no class.
    expected = [[0.9, 1.0, 0.9, 0.9], [0.9, 0.1, 0.9, 0.9]]
    np.testing.assert_allclose(x_0.reshape(2, 4), expected, rtol=1e-5)


def test_what_cannot_be_restored_is_one_line():
    schedule = make_schedule("linear", 5)
    y = jnp.zeros((1, 2, 2, 1))
    make = partial(conditioned, schedule, lambda x, t: x, y, downscale(2), prediction="x_0")
    for noise in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="noise: must be a finite number of at least 0"):
            make(noise=noise)
    with pytest.raises(ValueError, match="r2: must have an entry for each step of the chain"):
        make(noise=0.1, r2=np.ones(4, np.float32))
