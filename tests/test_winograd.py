"""Convolutions with fewer multiplications: the same numbers, in every chain and on every batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import correlate2d

from ddpm_jax import DDPM
from ddpm_jax.calls.ready import Ready, ready
from ddpm_jax.config import Config, Data, Diffusion, Model
from ddpm_jax.devices.mesh import make_mesh, replicate
from ddpm_jax.models import winograd


@pytest.mark.parametrize("shape", [(2, 8, 8, 3, 4), (1, 5, 7, 2, 2), (3, 1, 2, 1, 1)])
def test_a_convolution_is_that_of_the_definition(rng, shape):
    """Against SciPy's in float64, even and odd sides."""
    B, H, W, C, D = shape
    x = rng.standard_normal((B, H, W, C))
    kernel = rng.standard_normal((3, 3, C, D))
    expected = np.zeros((B, H, W, D))
    for b, c, d in np.ndindex(B, C, D):
        expected[b, :, :, d] += correlate2d(x[b, :, :, c], kernel[:, :, c, d], mode="same")
    tile = winograd.transformed_kernel(jnp.float32(kernel))
    result = winograd.convolution(jnp.float32(x), tile)
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_the_transform_of_the_kernel_is_the_papers(rng):
    """G g G^T in float64 (Lavin & Gray 2016, Eq. 7)."""
    G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    kernel = rng.standard_normal((3, 3, 2, 5))
    for c, d in np.ndindex(2, 5):
        tile = winograd.transformed_kernel(jnp.float32(kernel))[:, c, d]
        expected = G @ kernel[:, :, c, d] @ G.T
        np.testing.assert_allclose(tile, expected.ravel(), rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def wide():
    """(a model of one level with 128 channels, its parameters, far from zero)."""
    config = Config(
        model=Model(
            base_channels=128,
            channel_multipliers=(1, 1),
            num_res_blocks=1,
            attention_resolutions=(),
            norm_groups=32,
        ),
        diffusion=Diffusion(num_timesteps=4, beta_start=0.01, beta_end=0.5),
        data=Data(source="array", image_shape=(16, 16, 1)),
    )
    rng = np.random.default_rng(0)
    ddpm = DDPM(config)
    params = jax.tree.map(
        lambda leaf: jnp.float32(0.03 * rng.standard_normal(leaf.shape)), ddpm.shapes
    )
    return ddpm, params


def without(ddpm):
    """The same model with convolutions as XLA has them."""
    model = dataclasses.replace(ddpm.config.model, winograd=False)
    return DDPM(dataclasses.replace(ddpm.config, model=model))


def test_wide_convolutions_alone_are_transformed(wide, tiny):
    ddpm, params = wide
    tiles = ready(ddpm, params).tiles
    # The level of 8x8 pixels has too few, the downsampling a stride of 2.
    assert set(tiles) == {"down_0_0_block", "up_0_0_block", "up_0_1_block", "up_1_upsample"}
    assert all(leaf.shape[0] == 16 for leaf in jax.tree.leaves(tiles))
    assert ready(without(ddpm), params) is params
    half = dataclasses.replace(ddpm.config.model, dtype="bfloat16")
    assert ready(DDPM(dataclasses.replace(ddpm.config, model=half)), params) is params
    narrow = DDPM(tiny)
    assert not isinstance(ready(narrow, narrow.shapes), Ready)


def test_images_and_bounds_are_those_of_plain_convolutions(wide):
    ddpm, params = wide
    key = jax.random.key(1)
    images = ddpm.sample(params, key, 3)
    np.testing.assert_allclose(images, without(ddpm).sample(params, key, 3), atol=1e-5)
    assert np.abs(images).max() < 1.01 and images.std() > 0.1
    for batch_size in (1, 2):
        again = ddpm.sample(params, key, 3, batch_size=batch_size)
        np.testing.assert_allclose(again, images, atol=1e-5)
    bits = ddpm.bits_per_dim(params, key, images)
    expected = without(ddpm).bits_per_dim(params, key, images)
    np.testing.assert_allclose(bits.total, expected.total, rtol=1e-5)


def test_another_device_than_a_cpu_has_plain_convolutions(wide):
    """Lowered for a GPU, the program holds the convolutions and none of the products of tiles."""
    ddpm, params = wide

    def chain(params, x, t):
        return ddpm.denoise(ready(ddpm, params), x, t)

    x = jax.ShapeDtypeStruct((2, 16, 16, 1), jnp.float32)
    t = jax.ShapeDtypeStruct((2,), jnp.int32)
    traced = jax.jit(chain).trace(jax.eval_shape(lambda: params), x, t)
    on_cpu = traced.lower(lowering_platforms=("cpu",)).as_text()
    on_gpu = traced.lower(lowering_platforms=("cuda",)).as_text()
    plain = jax.jit(without(ddpm).denoise).trace(jax.eval_shape(lambda: params), x, t)
    count = plain.lower().as_text().count("stablehlo.convolution")
    assert on_gpu.count("stablehlo.convolution") == count
    assert on_cpu.count("stablehlo.convolution") == count - len(
        jax.tree.leaves(ready(ddpm, params).tiles)
    )


def test_devices_share_the_work(wide):
    ddpm, params = wide
    key = jax.random.key(1)
    shared = ddpm.sample(replicate(params, make_mesh(2)), key, 4, batch_size=2)
    np.testing.assert_allclose(shared, ddpm.sample(params, key, 4), atol=1e-5)
