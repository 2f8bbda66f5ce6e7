"""The network against the paper's counts and a NumPy float64 rewrite."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_unet import unet

from ddpm_jax import DDPM, load_config
from ddpm_jax.config import shipped_configs
from ddpm_jax.models import layers
from ddpm_jax.models.layers import GroupNorm, dropout, timestep_embedding


def keys(n):
    return jax.random.split(jax.random.key(3), n)


def random_like(tree, rng, scale=0.3):
    """Parameters that are nowhere nearly zero, so that every part of the network counts."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, scale, leaf.shape), jnp.float32), tree
    )


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def shapes_of(ddpm):
    """(the parameters' shapes, the output's for two images)."""
    params = jax.eval_shape(ddpm.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((2, *ddpm.image_shape), jnp.float32)
    t = jax.ShapeDtypeStruct((2,), jnp.int32)
    return params, jax.eval_shape(ddpm.denoise, params, x, t)


BUILT = {}
"""{(network, image shape): its shapes}: many of the shipped configs have the same network."""


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_config_builds_with_the_papers_number_of_parameters(name):
    ddpm = DDPM(load_config(name))
    network = (ddpm.network, ddpm.image_shape)
    if network not in BUILT:
        BUILT[network] = shapes_of(ddpm)
    shapes, output = BUILT[network]
    channels = ddpm.image_shape[-1] * (2 if ddpm.config.diffusion.learns_variance else 1)
    assert output.shape == (2, *ddpm.image_shape[:2], channels)
    counts = {"digits": 284_513, "small32": 1_113_955, "fashion_mnist": 1_112_801}
    counts |= {"cifar10_improved": 49_066_246}
    # A class is a row of the width of the time embedding; no class is one more.
    counts |= {"digits_class": 284_513 + 11 * 128, "fashion_mnist_class": 1_112_801 + 11 * 128}
    counts |= {"cifar10_class": 35_746_307 + 11 * 512}
    counts |= dict.fromkeys(
        ["cifar10", "cifar10_mean_vlb_fixed", "cifar10_mean_mse", "cifar10_eps_vlb_fixed"],
        35_746_307,
    )
    counts |= dict.fromkeys(["cifar10_mean_vlb_learned", "cifar10_eps_vlb_learned"], 35_749_766)
    counts |= dict.fromkeys(["celebahq256", "lsun_bedroom", "lsun_cat", "lsun_church"], 113_673_219)
    assert count(shapes) == counts[name]


@pytest.mark.parametrize(("shape", "multipliers"), [((8, 12, 2), (1, 1, 2)), ((6, 6, 3), (1,))])
def test_the_network_is_the_numpy_one(tiny, rng, shape, multipliers):
    model = dataclasses.replace(
        tiny.model, channel_multipliers=multipliers, num_res_blocks=2, attention_resolutions=(4,)
    )
    data = dataclasses.replace(tiny.data, image_shape=shape)
    ddpm = DDPM(dataclasses.replace(tiny, model=model, data=data))
    params = random_like(jax.eval_shape(ddpm.init, jax.random.key(0)), rng)
    x, t = rng.normal(size=(3, *shape)), np.array([0, 1, 999], np.int32)
    expected = unet(jax.tree.map(np.float64, params), x, t, model)
    np.testing.assert_allclose(
        jax.jit(ddpm.denoise)(params, jnp.float32(x), t), expected, rtol=2e-4, atol=2e-4
    )


def test_initial_parameters_have_the_papers_distribution():
    ddpm = DDPM(load_config("small32"))
    params = ddpm.init(jax.random.key(0))
    kernel = params["down_1_0_block"]["conv_0"]["kernel"]  # 3x3, 32 -> 64
    limit = np.sqrt(3 / (9 * (32 + 64) / 2))  # uniform of variance 1 / fan_avg
    assert 0.99 * limit < float(jnp.abs(kernel).max()) <= limit
    np.testing.assert_allclose(float(kernel.std()), limit / np.sqrt(3), rtol=0.02)
    for zeroed in (
        params["down_1_0_block"]["conv_1"],
        params["mid_attention"]["out"],
        params["out_conv"],
    ):
        assert 0 < float(jnp.abs(zeroed["kernel"]).max()) < 1e-4
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key == "bias":
            assert not leaf.any()
        if path[-1].key == "scale":
            assert (leaf == 1).all()


def test_group_norm_is_flaxs_and_survives_a_large_mean(rng):
    x = jnp.asarray(rng.normal(100, 1, (2, 6, 6, 8)), jnp.float32)
    reference = nn.GroupNorm(4, epsilon=1e-6, use_fast_variance=False)
    params = random_like(reference.init(jax.random.key(0), x), rng)
    np.testing.assert_allclose(GroupNorm(4).apply(params, x), reference.apply(params, x), atol=3e-4)
    tiny_spread = 1e-3 * (x - 100)  # Here epsilon is as large as the variance: 1e-5 would be seen.
    np.testing.assert_allclose(
        GroupNorm(4).apply(params, tiny_spread), reference.apply(params, tiny_spread), atol=1e-5
    )


def test_the_time_embedding_is_sines_then_cosines_of_the_raw_step():
    t = np.array([0, 1, 999])
    frequencies = 10000.0 ** (-np.arange(64) / 63)
    expected = np.concatenate(
        [np.sin(t[:, None] * frequencies), np.cos(t[:, None] * frequencies)], axis=1
    )
    np.testing.assert_allclose(timestep_embedding(jnp.asarray(t), 128), expected, atol=1e-4)


def test_dropout_takes_each_mask_from_the_examples_own_key():
    x = jnp.ones((4, 16, 16, 16))
    dropped = dropout(x, keys(4), 0.25)
    assert set(np.unique(dropped)) == {0, np.float32(1 / 0.75)}
    np.testing.assert_allclose(float((dropped == 0).mean()), 0.25, atol=0.03)
    assert not (dropped[0] == dropped[1]).all()
    np.testing.assert_array_equal(dropout(x[2:3], keys(4)[2:3], 0.25)[0], dropped[2])


def test_dropout_is_drawn_anew_in_every_block_and_only_with_keys(tiny, rng, monkeypatch):
    ddpm = DDPM(tiny)
    params = random_like(jax.eval_shape(ddpm.init, jax.random.key(0)), rng)
    seen = []
    monkeypatch.setattr(
        layers, "dropout", lambda x, keys, rate: seen.append(jax.random.key_data(keys)) or x
    )
    apply = partial(
        ddpm.network.apply, {"params": params}, jnp.ones((2, 8, 8, 1)), jnp.zeros(2, jnp.int32)
    )
    apply()
    assert not seen
    apply(keys(2))
    assert len(seen) == sum(name.endswith("block") for name in params) == 5
    assert len({key.tobytes() for block in seen for key in np.asarray(block)}) == 10


def test_bfloat16_computes_in_it_and_keeps_the_rest_in_float32(tiny, rng):
    ddpm = DDPM(tiny)
    half = DDPM(dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, dtype="bfloat16")))
    shapes = jax.eval_shape(half.init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    params = random_like(shapes, rng)
    x, t = jnp.asarray(rng.normal(size=(2, 8, 8, 1)), jnp.float32), jnp.array([998, 999])
    full, rough = ddpm.denoise(params, x, t), half.denoise(params, x, t)
    assert rough.dtype == jnp.float32 and not (full == rough).all()
    np.testing.assert_allclose(rough, full, atol=0.05 * float(jnp.abs(full).max()))
    # Neither the input nor the output is rounded to it: two x that are one in bfloat16 differ.
    near = jnp.full((1, 8, 8, 1), 1.001)
    assert (near.astype(jnp.bfloat16) == 1).all()
    assert not (half.denoise(params, near, t[:1]) == half.denoise(params, near / near, t[:1])).all()
    assert not (rough == rough.astype(jnp.bfloat16)).all()
    # 998 and 999 are one number in bfloat16: the embedding must not be.
    assert not (half.denoise(params, x[:1], t[:1]) == half.denoise(params, x[:1], t[1:])).all()


@pytest.mark.parametrize("name", shipped_configs())
def test_the_shapes_are_those_that_the_network_makes(name):
    """Against Flax, which traces the network for them."""
    ddpm = DDPM(load_config(name))
    assert ddpm.shapes == jax.eval_shape(ddpm.init, jax.random.key(0))
