"""The multistep samplers: their order, and their coefficients against quadrature, in float64."""

import copy
from functools import partial

import jax
import numpy as np
import pytest
from conftest import with_
from gaussian import M, S, gain
from scipy.integrate import quad, solve_ivp

from ddpm_jax import DDPM, Schedule, make_schedule
from ddpm_jax.calls.conditions import FREE
from ddpm_jax.calls.programs import advance, begin
from ddpm_jax.diffusion import MeanVariance
from ddpm_jax.sampler import Sampler
from ddpm_jax.samplers import SAMPLERS, Chain, time_grid
from ddpm_jax.samplers.multistep import exponential_moments, levels
from ddpm_jax.schedule import strided

# A mixture of two Gaussians.
MEANS = np.array([-0.7, 0.5])
DEVIATIONS = np.array([0.15, 0.3])
SHARES = np.array([0.4, 0.6])


def mixtures_x_0(x, alpha, sigma):
    """E[x_0 | x] of the mixture, x being alpha x_0 + sigma noise."""
    variance = (alpha * DEVIATIONS) ** 2 + sigma**2
    away = x[..., None] - alpha * MEANS
    share = SHARES * np.exp(-(away**2) / (2 * variance)) / np.sqrt(variance)
    x_0 = MEANS + alpha * DEVIATIONS**2 / variance * away
    return (share * x_0).sum(-1) / share.sum(-1)


def even_chain(steps):
    """A Schedule of float64, even in lambda: `steps` steps from -5 at t = `steps` to 4.5 at 0."""
    alphas_bar = 1 / (1 + np.exp(-2 * np.linspace(4.5, -5, steps + 1)))
    betas = 1 - alphas_bar / np.append(1, alphas_bar[:-1])
    return in_float64(Schedule.from_betas(betas), betas=betas)


def in_float64(schedule, original=None, *, betas=None):
    """The chain with the tables that samplers read in float64.

    They follow from its `betas` or, of a stride, from those of `original`.
    """
    betas = np.float64(original.betas) if betas is None else betas
    alphas_bar = np.cumprod(1 - betas)[schedule.timesteps]
    exact = {
        "betas": betas,
        "sqrt_alphas_bar": np.sqrt(alphas_bar),
        "sqrt_one_minus_alphas_bar": np.sqrt(1 - alphas_bar),
    }
    if len(betas) != len(alphas_bar):
        del exact["betas"]
    schedule = copy.copy(schedule)
    for name, table in exact.items():
        object.__setattr__(schedule, name, table)
    return schedule


def follow(name, schedule, x, x_0_of, noise=None, original=None, stop=0, **options):
    """The x at t = `stop` of the chain of sampler `name` from `x` [N], each step in float64.

    `x_0_of`(x, t) is the network; `noise`(t) is the noise of a step.
    """
    method = SAMPLERS[name]
    shape = (1, 1, x.size, 1)

    def p(x, t):
        x_0 = x_0_of(x.ravel(), t).reshape(shape)
        return MeanVariance(x_0, x_0, x_0, x_0)

    def shaped_noise(t):
        return noise(t).reshape(shape)

    tables = method.tables(schedule, original or schedule, **options)
    chain = Chain(schedule, p, shaped_noise, tables)
    x = x.reshape(shape)
    memory = (np.zeros(shape),) * method.memory
    for t in reversed(range(stop + 1, schedule.num_timesteps)):
        x, memory = method.step(chain, x, t, memory)
    assert x.dtype == np.float64
    return x.ravel()


@pytest.fixture(scope="module")
def exact_flow():
    """(x at lambda = -5, where the probability flow takes it at 4.5) of the mixture."""
    x = np.linspace(-2.5, 2.5, 21)

    def slope(log_snr, x):
        alpha = 1 / np.sqrt(1 + np.exp(-2 * log_snr))
        sigma = 1 / np.sqrt(1 + np.exp(2 * log_snr))
        return alpha * mixtures_x_0(x, alpha, sigma) - alpha**2 * x

    flow = solve_ivp(slope, (-5, 4.5), x, "DOP853", rtol=1e-12, atol=1e-13)
    return x, flow.y[:, -1]


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("dpm-solver++", {}, 2),
        ("dpm-solver++3m", {}, 3),
        # The corrector adds one.
        ("unipc", {"order": 2, "b_h": "b1"}, 3),
        ("unipc", {"order": 2, "b_h": "b2"}, 3),
        ("unipc", {"order": 3, "b_h": "b1"}, 4),
        ("unipc", {}, 4),
        ("deis", {"order": 2}, 2),
        ("deis", {}, 3),
        ("deis", {"order": 4}, 4),
        # Its weights are those of steps that are even in rho.
        ("ipndm", {}, 2),
    ],
)
def test_the_order_of_a_method_is_its_nominal_one(exact_flow, name, options, order):
    x, expected = exact_flow

    def error_at(steps):
        schedule = even_chain(steps)
        chain = levels(schedule, schedule)

        def x_0_of(x, t):
            return mixtures_x_0(x, chain.alpha[t], chain.sigma[t])

        return np.abs(follow(name, schedule, x, x_0_of, **options) - expected).mean()

    # The order 4 of DEIS shows late.
    steps = 160 if options == {"order": 4} else 40
    assert np.log2(error_at(steps) / error_at(2 * steps)) > order - 0.3


def test_the_stochastic_form_has_the_mean_and_is_of_second_order_in_the_variance():
    """On Gaussian data, from one x: the closed form of p(x at 4.5 | x at -5).

    Steps are affine there, so x is followed as its mean and its weight of each step's noise.
    """

    def error_at(steps):
        schedule = even_chain(steps)
        chain = levels(schedule, schedule)
        a = chain.alpha**2
        variance = a * S**2 + 1 - a
        x = np.zeros(steps + 2)  # Entry t + 1 is the weight of the noise of the step from t.
        x[0] = chain.alpha[-1] * M + 2

        def x_0_of(x, t):
            x_0 = gain(a[t]) * x
            x_0[0] += M - gain(a[t]) * chain.alpha[t] * M
            return x_0

        x = follow("sde-dpm-solver++", schedule, x, x_0_of, lambda t: np.eye(1, x.size, t + 1)[0])
        slope = chain.alpha[-1] / chain.alpha[0] * variance[0] / variance[-1]
        mean = chain.alpha[0] * M + slope * 2
        # The expected x_0 is a martingale, so the mean is exact.
        np.testing.assert_allclose(x[0], mean, rtol=1e-10)
        return (x[1:] ** 2).sum() - variance[0] + slope**2 * variance[-1]

    assert np.log2(np.abs(error_at(40) / error_at(80))) > 1.7


def strided_chains():
    """(name, the short chain, the original) on grids whose steps are uneven in lambda."""
    for name, grid in (("linear", "quad"), ("cosine", "linspace"), ("jsd", "trailing")):
        schedule = make_schedule(name, 1000)
        yield name, strided(schedule, time_grid(1000, 9, grid)), schedule


CHAINS = {name: chains for name, *chains in strided_chains()}


class Numbers:
    """alpha, sigma, lambda and rho of a chain, from the betas of the original alone."""

    def __init__(self, schedule, original):
        with np.errstate(divide="ignore"):
            a = np.cumprod(1 - np.float64(original.betas))[schedule.timesteps]
            self.alpha, self.sigma = np.sqrt(a), np.sqrt(1 - a)
            self.log_snr = np.log(self.alpha) - np.log(self.sigma)
            self.rho = self.sigma / self.alpha
        self.t = np.asarray(schedule.timesteps)
        self.steps = len(a)

    def count(self, t, order):
        """Predictions that the step from t uses."""
        return max(1, min(order, np.isfinite(self.log_snr[t:]).sum(), t + 1))


def basis(nodes, j, x):
    """The Lagrange polynomial that is 1 at nodes[j] and 0 at the others."""
    value = np.ones_like(x)
    for other in np.delete(nodes, j):
        value = value * (x - other) / (nodes[j] - other)
    return value


def exponential_weights(nodes, start, stop):
    """int e^(lambda - stop) L_j(lambda) d lambda from start to stop, of each node."""
    if np.isneginf(start):
        return np.ones(1)
    return [
        quad(lambda u, j=j: np.exp(u - stop) * basis(nodes, j, u), start, stop, epsabs=1e-12)[0]
        for j in range(len(nodes))
    ]


def assert_row(row, expected):
    """The table's row, which ends in zeros, is `expected`."""
    expected = np.append(expected, np.zeros(len(row) - len(expected)))
    np.testing.assert_allclose(row, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("chain", CHAINS)
def test_two_predictions_in_closed_form(chain):
    """2M and its stochastic form (Lu et al. 2022, Algorithm 2; from version 2 on)."""
    schedule, original = CHAINS[chain]
    n = Numbers(schedule, original)
    flow = SAMPLERS["dpm-solver++"].tables(schedule, original)
    sde = SAMPLERS["sde-dpm-solver++"].tables(schedule, original)
    for t in range(1, n.steps):
        h = n.log_snr[t - 1] - n.log_snr[t]
        mix = np.array([1.0])
        if n.count(t, 2) == 2:
            r = (n.log_snr[t] - n.log_snr[t + 1]) / h
            mix = np.array([1 + 1 / (2 * r), -1 / (2 * r)])
        of_x = n.sigma[t - 1] / n.sigma[t]
        alpha = n.alpha[t - 1]
        assert_row(flow.predict[t], [of_x, *(alpha * (1 - np.exp(-h)) * mix)])
        assert_row(sde.predict[t], [of_x * np.exp(-h), *(alpha * (1 - np.exp(-2 * h)) * mix)])
        np.testing.assert_allclose(sde.noise[t], n.sigma[t - 1] * np.sqrt(1 - np.exp(-2 * h)))
    assert sde.noise[0] == 0


@pytest.mark.parametrize("chain", CHAINS)
def test_three_predictions_are_a_parabola_integrated_exactly(chain):
    schedule, original = CHAINS[chain]
    n = Numbers(schedule, original)
    table = SAMPLERS["dpm-solver++3m"].tables(schedule, original).predict
    for t in range(1, n.steps):
        nodes = n.log_snr[t : t + n.count(t, 3)]
        weights = exponential_weights(nodes, n.log_snr[t], n.log_snr[t - 1])
        assert_row(table[t], [n.sigma[t - 1] / n.sigma[t], *(n.alpha[t - 1] * np.array(weights))])


@pytest.mark.parametrize("b_h", ["b1", "b2"])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("chain", CHAINS)
def test_unipcs_predictor_and_corrector(chain, order, b_h):
    """Exact with three predictions or more; two have B(h) / 2 as the weight of their slope."""
    schedule, original = CHAINS[chain]
    n = Numbers(schedule, original)
    tables = SAMPLERS["unipc"].tables(schedule, original, order=order, b_h=b_h)

    def weights(nodes, start, stop):
        if len(nodes) != 2:
            return exponential_weights(nodes, start, stop)
        h = stop - start
        half = (h if b_h == "b1" else 1 - np.exp(-h)) / 2
        of_other = half * h / (nodes[1] - nodes[0]) if nodes[0] == start else None
        if of_other is None:  # The corrector's: the new prediction stands first.
            return [half, 1 - np.exp(-h) - half]
        return [1 - np.exp(-h) - of_other, of_other]

    for t in range(1, n.steps):
        start, stop = n.log_snr[t], n.log_snr[t - 1]
        nodes = n.log_snr[t : t + n.count(t, order)]
        of_x = n.sigma[t - 1] / n.sigma[t]
        assert_row(
            tables.predict[t], [of_x, *(n.alpha[t - 1] * np.array(weights(nodes, start, stop)))]
        )
        if np.isneginf(start):  # Nothing to correct: x_0 alone decided the step.
            assert_row(tables.correct[t - 1], [1])
            continue
        of_x_0 = n.alpha[t - 1] * np.array(weights(np.append(stop, nodes), start, stop))
        assert_row(tables.correct[t - 1], [0, of_x, *of_x_0])
    assert_row(tables.correct[-1], [1])


def eps_row(n, t, weights):
    """The row of alpha_b / alpha_a x + alpha_b sum_j weights[j] eps_j, from a to b."""
    a, b = t, t - 1
    of_eps = n.alpha[b] * np.asarray(weights)
    of_x = n.alpha[b] / n.alpha[a] + of_eps[0] / n.sigma[a]
    return [of_x, -of_eps[0] * n.alpha[a] / n.sigma[a], *of_eps[1:]]


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("chain", CHAINS)
def test_deis_integrates_polynomials_in_t(chain, order):
    """Over rho, whose logarithm is linear between two original steps: sums of fine steps."""
    schedule, original = CHAINS[chain]
    n = Numbers(schedule, original)
    whole = Numbers(original, original)
    table = SAMPLERS["deis"].tables(schedule, original, order=order).predict
    for t in range(1, n.steps):
        if not np.isfinite(n.rho[t]):
            assert_row(table[t], [n.sigma[t - 1] / n.sigma[t], n.alpha[t - 1]])
            continue
        nodes = n.t[t : t + n.count(t, order)]
        times = np.linspace(n.t[t], n.t[t - 1], 200 * (n.t[t] - n.t[t - 1]) + 1)
        finite = np.isfinite(whole.log_snr)
        rho = np.exp(-np.interp(times, whole.t[finite], whole.log_snr[finite]))
        middle = (times[1:] + times[:-1]) / 2
        weights = [basis(nodes, j, middle) @ np.diff(rho) for j in range(len(nodes))]
        np.testing.assert_allclose(
            table[t][: len(nodes) + 1], eps_row(n, t, weights), rtol=1e-5, atol=1e-7
        )
        assert not table[t][len(nodes) + 1 :].any()


@pytest.mark.parametrize("chain", CHAINS)
def test_ipndm_has_the_numbers_of_adams_and_bashforth(chain):
    schedule, original = CHAINS[chain]
    n = Numbers(schedule, original)
    numbers = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12]]
    numbers.append([55 / 24, -59 / 24, 37 / 24, -9 / 24])
    table = SAMPLERS["ipndm"].tables(schedule, original).predict
    for t in range(1, n.steps):
        if not np.isfinite(n.rho[t]):
            assert_row(table[t], [n.sigma[t - 1] / n.sigma[t], n.alpha[t - 1]])
            continue
        weights = (n.rho[t - 1] - n.rho[t]) * np.array(numbers[n.count(t, 4) - 1])
        assert_row(table[t], eps_row(n, t, weights))


MULTISTEP = [name for name, method in SAMPLERS.items() if method.tables is not None]


@pytest.mark.parametrize("name", MULTISTEP)
@pytest.mark.parametrize("chain", CHAINS)
def test_every_step_keeps_a_known_image_and_the_last_returns_it(name, chain):
    """With x_0 right at every step, x lies where the forward process would have it."""
    schedule, original = CHAINS[chain]
    n = Numbers(schedule, original)
    tables = SAMPLERS[name].tables(schedule, original)
    assert_row(tables.predict[0], [0, 1])
    x_0, noise = 0.3, -1.2
    keeps_eps = name in ("deis", "ipndm")
    earlier = noise if keeps_eps else x_0
    for t in range(1, n.steps):
        x = n.alpha[t] * x_0 + n.sigma[t] * noise
        got = tables.predict[t] @ [x, x_0, *[earlier] * (tables.predict.shape[1] - 2)]
        kept = 1.0
        if tables.noise is not None:  # The rest of the noise is drawn anew.
            kept = np.sqrt(1 - (tables.noise[t] / n.sigma[t - 1]) ** 2)
        expected = n.alpha[t - 1] * x_0 + kept * n.sigma[t - 1] * noise
        np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["linear", "cosine", "jsd"])
def test_few_even_steps_come_nearer_than_ddims(name):
    """Where the first steps are wide in rho, too. Nearer to the flow in all T steps."""
    T = 200
    betas = {"beta_start": 5e-4, "beta_end": 0.1} if name == "linear" else {}
    original = make_schedule(name, T, **betas)
    noise = np.random.default_rng(0).normal(size=100)

    def image(sampler, steps, grid, **options):
        schedule = strided(original, time_grid(T, steps, grid))
        n = Numbers(schedule, original)

        def x_0_of(x, t):
            return mixtures_x_0(x, n.alpha[t], n.sigma[t])

        if sampler is not None:
            exact = in_float64(schedule, original)
            x = follow(sampler, exact, noise, x_0_of, original=original, **options)
            return x_0_of(x, 0)
        x = noise
        for t in reversed(range(1, steps)):
            x_0 = x_0_of(x, t)
            x = n.alpha[t - 1] * x_0 + n.sigma[t - 1] / n.sigma[t] * (x - n.alpha[t] * x_0)
        return x_0_of(x, 0)

    fine = image("unipc", T, "linspace")

    def error(*arguments, **options):
        return np.sqrt(np.square(image(*arguments, **options) - fine).mean())

    for steps in (5, 10, 20):
        for sampler in MULTISTEP:
            method = SAMPLERS[sampler]
            if not method.deterministic:
                continue
            grid = "linspace" if sampler in ("deis", "ipndm") else "trailing"
            ddim = error(None, steps, grid)
            for order in method.orders or (None,):
                options = {} if order is None else {"order": order}
                assert error(sampler, steps, grid, **options) < ddim, (steps, sampler, order)


@pytest.mark.parametrize("h", [1e-9, 1e-3, 0.5, 0.999, 1.001, 20.0])
def test_moments_are_right_for_short_and_long_steps(h):
    expected = [quad(lambda u, i=i: h * np.exp(h * (u - 1)) * u**i, 0, 1)[0] for i in range(5)]
    np.testing.assert_allclose(exponential_moments(h, 5), expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("model", "diffusion", "x64"),
    [
        ({"dtype": "bfloat16"}, {"clip": "dynamic"}, False),
        ({"dtype": "bfloat16"}, {"prediction": "v", "clip": False}, True),
        ({}, {"prediction": "mean", "variance": "learned", "loss": "vlb"}, True),
        ({}, {"prediction": "x_0", "variance": "learned_range", "loss": "hybrid"}, False),
    ],
)
def test_x_and_what_is_kept_of_earlier_steps_stay_float32(tiny, model, diffusion, x64):
    """Of any model, in both modes of jax: traced alone, where a type that changes is an error."""
    ddpm = DDPM(with_(tiny, model=model, diffusion=diffusion))
    params = jax.eval_shape(ddpm.init, jax.random.key(0))
    for name in MULTISTEP:
        sampler = Sampler(name, timesteps=(0, 4, 9))
        with jax.enable_x64(x64):
            keys, state = jax.eval_shape(
                lambda sampler=sampler: begin(ddpm, sampler, jax.random.key(0), np.arange(2))
            )
            after, _ = jax.eval_shape(
                partial(advance, ddpm, sampler, ddpm.config.diffusion.clip),
                *(params, FREE, keys, state, 0, 3),
            )
        assert after == state
        assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {np.dtype("float32")}
