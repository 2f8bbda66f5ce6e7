"""jax's 64-bit mode changes nothing: every draw, table and parameter states its dtype."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import with_

from ddpm_jax import DDPM, make_schedule
from ddpm_jax.data import Batch
from ddpm_jax.errors import UserError
from ddpm_jax.keys import example_keys, gaussian_noise, happens, random_flip, random_times, seed_key
from ddpm_jax.models import inception_shapes
from ddpm_jax.samplers.chain import start_state
from ddpm_jax.training.update import adam, init_state, train_step


def in_both_modes(make):
    """What `make()` returns without and with 64 bits."""
    without = make()
    with jax.enable_x64(True):
        return without, make()


def assert_same(make):
    """The same dtypes and bits in both modes."""
    for a, b in zip(*map(jax.tree.leaves, in_both_modes(make)), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


@pytest.mark.parametrize(
    "draw",
    [
        lambda keys: gaussian_noise(keys, 3, (2, 3, 1)),
        lambda keys: random_times(keys, 1000),
        lambda keys: happens(keys, 0.3, (50,)),
        lambda keys: random_flip(keys, np.arange(24, dtype=np.float32).reshape(8, 1, 3, 1)),
    ],
    ids=["noise", "times", "happens", "flips"],
)
def test_draws(draw):
    assert_same(lambda: draw(example_keys(seed_key(2**32 - 1), np.arange(8, dtype=np.uint32))))


def test_tables():
    assert_same(lambda: make_schedule("cosine", 50))


def test_inceptions_parameters():
    with jax.enable_x64(True):
        shapes = inception_shapes.__wrapped__()
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_fresh_parameters(tiny):
    assert_same(lambda: DDPM(tiny).init(jax.random.key(4)))


def test_an_update_keeps_the_dtypes_of_the_state(tiny, pictures):
    """Traced alone; of a batch in parts, which are added up."""
    ddpm = DDPM(with_(tiny, train={"accumulate": 2}))
    before = jax.eval_shape(lambda: init_state(ddpm))
    with jax.enable_x64(True):
        assert jax.eval_shape(lambda: init_state(ddpm)) == before
        batch = Batch(pictures[:8], None)
        after, metrics = jax.eval_shape(lambda state: train_step(ddpm, state, batch), before)
    assert after == before
    assert {leaf.dtype for leaf in jax.tree.leaves(metrics)} == {jnp.dtype("float32")}


def test_adam_is_optaxs(rng):
    """In both modes, with a rate that warms up: the bits that optax gives without 64."""
    import optax

    rate = optax.linear_schedule(0.0, 1e-3, 7)
    gradients = np.float32(rng.normal(size=(20, 5)))

    def follow(optimizer):
        def step(state, gradient):
            update, state = optimizer.update(gradient, state)
            return state, update

        return jax.jit(lambda g: jax.lax.scan(step, optimizer.init(g[0]), g))(gradients)

    expected = follow(optax.adam(rate))
    for got in in_both_modes(lambda: follow(adam(rate))):
        for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
            np.testing.assert_array_equal(a, b, strict=True)


def test_images(tiny):
    ddpm = DDPM(tiny)
    params = jax.tree.map(lambda leaf: leaf + 0.02, ddpm.init(jax.random.key(0)))
    assert_same(lambda: ddpm.sample(params, jax.random.key(1), 2))


def test_images_of_float64_are_taken_as_float32(tiny):
    """Traced alone."""
    ddpm = DDPM(tiny)
    params = jax.eval_shape(ddpm.init, jax.random.key(0))
    x_0 = np.zeros((2, 8, 8, 1))
    keys = example_keys(jax.random.key(2), np.arange(2, dtype=np.uint32))
    with jax.enable_x64(True):
        for use in (
            lambda params, x: ddpm.encode(params, x),
            lambda params, x: ddpm.decode(params, x, steps=4),
            lambda params, x: ddpm.reverse(params, keys, x, 3),
            lambda params, x: ddpm.loss(params, keys[0], x, train=True),
            lambda params, x: start_state(None, (8, 8, 1), x),
        ):
            results = jax.tree.leaves(jax.eval_shape(use, params, x_0))
            assert {result.dtype for result in results} == {jnp.dtype("float32")}


@contextlib.contextmanager
def other_draws():
    """jax set to draw other numbers from a key."""
    jax.config.update("jax_threefry_partitionable", False)
    try:
        yield
    finally:
        jax.config.update("jax_threefry_partitionable", True)


def test_other_draws_of_a_key_are_refused(tiny):
    """Where a program is compiled already, too."""
    ddpm = DDPM(tiny)
    params = ddpm.init(jax.random.key(0))
    ddpm.sample(params, jax.random.key(1), 2)
    with other_draws():
        for use in (
            lambda: ddpm.init(jax.random.key(0)),
            lambda: ddpm.sample(params, jax.random.key(1), 2),
            lambda: ddpm.bits_per_dim(params, jax.random.key(1), np.zeros((1, 8, 8, 1), "f")),
            lambda: ddpm.loss(params, jax.random.key(1), np.zeros((1, 8, 8, 1), "f")),
            lambda: seed_key(0),
        ):
            with pytest.raises(UserError, match="jax_threefry_partitionable: it is off"):
                use()
