"""The average of the weights against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import messages, with_

from ddpm_jax import DDPM
from ddpm_jax.average import average, first_share
from ddpm_jax.data import Batch
from ddpm_jax.training import update
from ddpm_jax.weights import load


def followed(params, first, **options):
    """The average after updates with each of `params` [N,D], computed in float32."""

    def step(before, now):
        n, params = now
        return average(before, params, n, **options), None

    n = np.arange(len(params), dtype=np.int32)
    return jax.jit(lambda: jax.lax.scan(step, jnp.float32(first), (n, params))[0])()


def exact(params, first, decays):
    """The same in float64, as a weighted sum."""
    later = np.append(np.cumprod(decays[:0:-1])[::-1], 1.0)  # What follows each update.
    return decays[0] * later[0] * first + ((1 - decays) * later) @ np.float64(params)


@pytest.mark.parametrize(("decay", "error"), [(0.9999, 2e-5), (0.99999, 5e-5)])
def test_400_000_updates_with_noisy_weights(rng, decay, error):
    """optax.incremental_update is off by 3e-4 and 5e-3 here: its weights do not sum to 1."""
    mean = np.linspace(0.01, 1, 8)
    params = np.float32(mean + 0.03 * rng.normal(size=(400_000, 8)))
    expected = exact(params, mean, np.full(400_000, decay))
    np.testing.assert_allclose(followed(params, mean, decay=decay), expected, rtol=error)


def test_the_warm_up_forgets_the_first_weights(rng):
    params = np.float32(rng.normal(size=(300, 4)))
    first = np.full(4, 1000.0)
    n = np.arange(300)
    decays = np.minimum(0.95, (1 + n) / (10 + n))
    got = followed(params, first, decay=0.95, warmup=True)
    np.testing.assert_allclose(got, exact(params, first, decays), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("updates", [0, 1, 2, 50, 600, 5000])
@pytest.mark.parametrize("options", [{"decay": 0.998}, {"decay": 0.998, "warmup": True}])
def test_the_share_of_the_first_weights_is_what_is_left_of_them(updates, options):
    zeros = np.zeros((updates, 1), np.float32)
    left = followed(zeros, np.ones(1), **options) if updates else np.ones(1)
    np.testing.assert_allclose(left, first_share(updates, **options), rtol=2e-4, atol=1e-30)


def test_the_share_of_small32_after_600_updates():
    np.testing.assert_allclose(first_share(600, decay=0.998), 0.3008, atol=1e-4)
    assert first_share(600, decay=0.998, warmup=True) < 1e-9


def test_an_update_takes_the_decay_of_its_own_number(tiny, pictures, monkeypatch):
    """With a gradient of ones, so that there is no network to compile."""
    ones = lambda ddpm, params, *_: (jnp.float32(0), jax.tree.map(jnp.ones_like, params))  # noqa: E731
    monkeypatch.setattr(update, "_mean_gradient", ones)
    ddpm = DDPM(with_(tiny, optim={"ema_warmup": True, "ema_decay": 0.999, "warmup_steps": 0}))
    state = update.init_state(ddpm)._replace(step=jnp.int32(5))
    after, _ = jax.jit(update.train_step, static_argnums=0)(ddpm, state, Batch(pictures[:8]))
    for before, new, got in zip(
        *map(jax.tree.leaves, (state.ema_params, after.params, after.ema_params)), strict=True
    ):
        expected = 6 / 15 * np.float64(before) + 9 / 15 * np.float64(new)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


def test_a_young_average_says_so(run, copy, caplog):
    """Two updates with decay 0.5 leave a quarter of the first weights, and 0.3 too little."""
    load.load_for_command(run, None, None, None)
    assert not messages(caplog)
    run = copy
    config = run / "config.json"
    config.write_text(config.read_text().replace('"ema_decay": 0.3', '"ema_decay": 0.5'))
    load.load_for_command(run, None, None, None)
    (said,) = [line for line in messages(caplog) if "averaged weights" in line]
    assert said == (
        f"{run}: in the averaged weights of step 2, those that the run started from still count "
        "for 25 %; --weights raw takes those of the last update"
    )
    caplog.clear()
    load.load_for_command(run, "raw", None, None)
    assert not messages(caplog)
