"""A GPU against this machine's CPU: the network, its gradients, images, and runs that go on.

scripts/test_gpu.sh runs these, and the tests of the mathematics, on a GPU.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import with_, with_source

from ddpm_jax import DDPM, fit, load, load_config

if jax.default_backend() != "gpu":
    pytest.skip("needs a GPU: run scripts/test_gpu.sh", allow_module_level=True)

CPU = jax.devices("cpu")[0]


@pytest.fixture(scope="module")
def model():
    """The digits' network without dropout, all its parameters far from zero."""
    config = load_config("digits")
    config = with_(config, model={"dropout": 0.0})
    ddpm = DDPM(config)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(ddpm.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), shapes)
    return ddpm, params


def batch_of(ddpm, count):
    """(x_t [B,H,W,C], t [B])."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((count, *ddpm.image_shape), np.float32)
    return x, rng.integers(0, 1000, count, dtype=np.int32)


def relative(value, expected):
    """The largest difference, as part of the largest number expected."""
    value = np.asarray(value, np.float32)
    expected = np.asarray(expected, np.float32)
    return np.abs(value - expected).max() / np.abs(expected).max()


def flat(tree):
    """All numbers of a tree in one array."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize(
    ("dtype", "precision", "bound"),
    [("float32", "highest", 2e-5), ("float32", "default", 1e-2), ("bfloat16", "default", 1e-1)],
)
def test_the_network_is_that_of_the_cpu(model, dtype, precision, bound):
    ddpm, params = model
    x, t = batch_of(ddpm, 16)
    expected = jax.jit(ddpm.denoise)(*jax.device_put((params, x, t), CPU))
    of_dtype = dataclasses.replace(
        ddpm.config, model=dataclasses.replace(ddpm.config.model, dtype=dtype)
    )
    with jax.default_matmul_precision(precision):
        output = jax.jit(DDPM(of_dtype).denoise)(params, x, t)
    assert output.devices() != {CPU}
    assert relative(output, expected) < bound


def test_the_loss_and_its_gradients_are_those_of_the_cpu(model):
    ddpm, params = model
    x_0 = np.clip(batch_of(ddpm, 16)[0] / 2, -1, 1)

    def loss(params, key, x_0):
        return ddpm.loss(params, key, x_0).mean()

    call = jax.jit(jax.value_and_grad(loss))
    key = jax.random.key(5)
    expected = call(*jax.device_put((params, key, x_0), CPU))
    with jax.default_matmul_precision("highest"):
        value = call(params, key, x_0)
    assert relative(value[0], expected[0]) < 1e-5
    # All together: some gradients are rounding alone, such as that of a bias before a norm.
    assert relative(flat(value[1]), flat(expected[1])) < 1e-3


@pytest.mark.parametrize("options", [{}, {"sampler": "unipc", "steps": 10}])
def test_images_are_those_of_the_cpu_on_any_batch_size(model, options):
    ddpm, params = model
    ddpm = DDPM(with_(ddpm.config, diffusion={"num_timesteps": 50}))
    key = jax.random.key(2)
    with jax.default_matmul_precision("highest"):
        images = ddpm.sample(params, key, 7, **options)
        for batch_size in (1, 3):
            again = ddpm.sample(params, key, 7, batch_size=batch_size, **options)
            np.testing.assert_allclose(again, images, atol=1e-3)
    on_cpu = jax.device_put((params, key), CPU)
    np.testing.assert_allclose(ddpm.sample(*on_cpu, 7, **options), images, atol=1e-3)


def test_noise_of_the_same_key_is_that_of_the_cpu():
    keys = jax.random.split(jax.random.key(0), 8)
    draw = jax.jit(jax.vmap(lambda key: jax.random.normal(key, (8, 8, 1))))
    np.testing.assert_allclose(draw(keys), draw(jax.device_put(keys, CPU)), atol=1e-5)


def test_a_stopped_run_goes_on_bit_for_bit(tiny, pictures, tmp_path):
    config = with_source(tiny, pictures, tmp_path)
    fit(config, tmp_path / "whole")
    fit(with_(config, train={"steps": 2}), tmp_path / "parts")
    fit(config, tmp_path / "parts")
    whole, parts = (load(tmp_path / name)[1] for name in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


def test_bfloat16_trains(tiny, pictures, tmp_path):
    config = with_source(tiny, pictures, tmp_path, model={"dtype": "bfloat16"})
    fit(config, tmp_path / "run")
    _, params = load(tmp_path / "run")
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
