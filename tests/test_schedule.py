"""The schedules against published figures and float64 rewrites."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import Schedule, make_schedule
from ddpm_jax.schedule import SMALLEST_BETA, schedule_parameters, strided

NAMES = ["linear", "cosine", "quad", "const", "jsd", "warmup10", "warmup50", "raised_cosine"]


def test_linear_has_the_papers_values():
    s = make_schedule()
    assert s.num_timesteps == 1000
    np.testing.assert_allclose(np.asarray(s.betas)[[0, -1]], [1e-4, 0.02], rtol=1e-7)
    np.testing.assert_allclose(
        np.asarray(s.alphas_bar)[[0, -1]], [0.9999, 4.035829765e-05], rtol=1e-7
    )
    np.testing.assert_allclose(
        np.asarray(s.posterior_variance)[[1, -1]], [5.453187661e-05, 0.0199999835], rtol=1e-7
    )
    np.testing.assert_allclose(s.posterior_log_variance[:2], [-9.816725135] * 2, rtol=1e-7)
    assert (
        s.posterior_mean_coef_x_0[0],
        s.posterior_mean_coef_x_t[0],
        s.posterior_variance[0],
    ) == (1, 0, 0)


@pytest.mark.parametrize(
    ("name", "last"), [("quad", 7.33e-4), ("const", 1.68e-9), ("jsd", 0), ("cosine", 2.43e-9)]
)
def test_alphas_bar_ends_where_the_released_code_ends(name, last):
    np.testing.assert_allclose(make_schedule(name).alphas_bar[-1], last, rtol=3e-3)


def test_tables_are_computed_in_float64():
    exact = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    s = make_schedule()
    # A float32 cumprod is off by 1.7e-4 at the first entry.
    np.testing.assert_allclose(np.float64(s.sqrt_one_minus_alphas_bar) ** 2, 1 - exact, rtol=3e-7)
    np.testing.assert_allclose(np.float64(s.sqrt_recipm1_alphas_bar) ** 2, 1 / exact - 1, rtol=3e-7)


@pytest.mark.parametrize("T", [1, 2, 10, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_at_every_length_is_sound(name, T):
    s = make_schedule(name, T)
    for table in jax.tree.leaves(s):
        assert table.shape == (T,) and bool(jnp.isfinite(table).all())
        assert table.dtype == (jnp.int32 if table is s.timesteps else jnp.float32)
    assert bool(
        (s.betas > 0).all() and (s.betas <= 1).all() and (jnp.diff(s.alphas_bar) <= 0).all()
    )
    # The entry that is not log(posterior variance): the released code's, and beta where T = 1.
    entry_0 = s.posterior_variance[1] if T > 1 else s.betas[0]
    np.testing.assert_allclose(
        jnp.exp(s.fixed_large_log_variance), jnp.append(entry_0, s.betas[1:]), rtol=1e-5
    )
    np.testing.assert_allclose(jnp.exp(s.posterior_log_variance[:1]), entry_0, rtol=1e-5)


def test_the_two_cosines_differ():
    u = np.linspace(0, np.pi / 2, 1000)
    ramp = 1e-4 + (0.02 - 1e-4) * np.sin(u) ** 2
    np.testing.assert_allclose(make_schedule("raised_cosine").betas, ramp, rtol=1e-6)
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    cosine = make_schedule("cosine")
    np.testing.assert_allclose(cosine.alphas_bar[:-1], (f / f[0])[1:-1], rtol=1e-4)
    assert int((cosine.betas >= np.float32(0.999)).sum()) == 1


def test_warmups_ramp_then_stay():
    for name, ramp in (("warmup10", 100), ("warmup50", 500)):
        betas = np.asarray(make_schedule(name).betas)
        np.testing.assert_allclose(betas[:ramp], np.linspace(1e-4, 0.02, ramp), rtol=1e-6)
        np.testing.assert_allclose(betas[ramp:], 0.02, rtol=1e-6)
    np.testing.assert_allclose(make_schedule("jsd", 4).betas, [1 / 4, 1 / 3, 1 / 2, 1], rtol=1e-6)
    np.testing.assert_allclose(
        np.sqrt(make_schedule("quad", 3).betas),
        [0.01, (0.01 + 0.02**0.5) / 2, 0.02**0.5],
        rtol=1e-6,
    )


def test_linear_keeps_its_ends_at_another_length_and_rescales_as_its_docstring_says():
    np.testing.assert_allclose(
        np.asarray(make_schedule("linear", 100).betas)[[0, -1]], [1e-4, 0.02], rtol=1e-6
    )
    scaled = make_schedule("linear", 100, beta_start=0.1 / 100, beta_end=20 / 100)
    assert 0.4 < float(scaled.alphas_bar[-1] / make_schedule().alphas_bar[-1]) < 1.1


def test_a_strided_chain_is_a_schedule():
    s = Schedule.from_betas([0.1, 0.2], timesteps=[3, 9])
    assert s.timesteps.tolist() == [3, 9] and s.num_timesteps == 2


def test_a_schedule_made_while_tracing_holds_no_tracers():
    made = []
    jax.jit(lambda x: made.append(make_schedule("linear", 5)) or x)(1.0)
    assert made[0].betas.tolist() == make_schedule("linear", 5).betas.tolist()


def test_a_schedule_passes_through_jit():
    assert float(jax.jit(lambda s, t: s.betas[t])(make_schedule("const", 3), 1)) == np.float32(0.02)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: make_schedule("linaer"), "linaer"),
        (lambda: make_schedule("jsd", 10, beta_end=0.1), "beta_end"),
        (lambda: make_schedule("linear", 0), "num_timesteps"),
        (lambda: make_schedule("linear", 10, beta_end=1.5), "betas"),
        (lambda: make_schedule("linear", 10, beta_start=1e-17), "betas: 1e-17 is too small"),
        (lambda: make_schedule("const", 10, beta_end=1e-300), "betas: 1e-300 is too small"),
        (lambda: Schedule.from_betas([0.1, 4e-12]), "betas: 4e-12 is too small"),
        (lambda: Schedule.from_betas([]), "betas"),
        (lambda: Schedule.from_betas([0.1, np.nan]), "betas"),
        (lambda: Schedule.from_betas([0.1], timesteps=[1, 2]), "timesteps"),
    ],
)
def test_bad_input_is_named(make, names):
    with pytest.raises(ValueError, match=names):
        make()


@pytest.mark.parametrize("name", ["linear", "quad", "const", "raised_cosine"])
def test_the_smallest_betas_have_sound_tables(name):
    """Against 1 - alphas_bar from sums of logarithms, which lose no digits."""
    s = make_schedule(name, 100, **dict.fromkeys(schedule_parameters(name), SMALLEST_BETA))
    exact = -np.expm1(np.cumsum(np.log1p(-np.full(100, SMALLEST_BETA))))
    np.testing.assert_allclose(np.float64(s.sqrt_one_minus_alphas_bar) ** 2, exact, rtol=1e-5)
    assert all(np.isfinite(table).all() for table in jax.tree.leaves(s))
    assert np.isfinite(jax.tree.leaves(strided(s, [0, 50, 99]))).all()


@pytest.mark.parametrize("name", ["linear", "cosine", "jsd"])
def test_a_strided_chain_keeps_alphas_bar_where_it_visits(name):
    schedule, steps = make_schedule(name, 100), np.array([0, 1, 7, 50, 98, 99])
    a = np.cumprod(1 - np.float64(schedule.betas))
    short = strided(schedule, steps)
    np.testing.assert_allclose(short.alphas_bar, a[steps], rtol=1e-6)
    np.testing.assert_allclose(short.betas, 1 - a[steps] / np.append(1, a[steps[:-1]]), rtol=1e-5)
    # The posterior's variance from the definition, with the stride's own beta: Eq. 7.
    a_prev = np.append(1, a[steps[:-1]])
    posterior = (1 - a[steps] / a_prev) * (1 - a_prev) / (1 - a[steps])
    np.testing.assert_allclose(short.posterior_variance, posterior, rtol=1e-5)
    assert short.timesteps.tolist() == steps.tolist()
    again = strided(short, [1, 3])
    assert again.timesteps.tolist() == [1, 50]
    np.testing.assert_allclose(again.alphas_bar, a[[1, 50]], rtol=1e-6)


def test_a_stride_of_one_is_the_chain_itself():
    schedule = make_schedule()
    assert strided(schedule, np.arange(1000)) is schedule
    first = strided(schedule, np.arange(10))
    np.testing.assert_array_equal(first.betas, schedule.betas[:10])
    for steps in ([], [3, 3], [5, 2], [-1, 4], [0, 1000]):
        with pytest.raises(ValueError, match="timesteps"):
            strided(schedule, steps)
