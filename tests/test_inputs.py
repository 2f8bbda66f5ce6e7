"""What users pass to a model from Python works, or one line says what is wrong and what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import with_
from jax.sharding import NamedSharding, PartitionSpec

from ddpm_jax import DDPM, UserError, load
from ddpm_jax.calls.inputs import check_key, check_keys
from ddpm_jax.devices.mesh import mesh_of, place, with_auto_axes

KEY = 'jax.random.key(seed, impl="threefry2x32")'


@pytest.fixture(scope="module")
def model(tiny):
    """(ddpm, params, key), nothing compiled but fresh parameters."""
    ddpm = DDPM(tiny)
    return ddpm, ddpm.init(jax.random.key(0)), jax.random.key(1, impl="threefry2x32")


@pytest.fixture(scope="module")
def calls(model):
    """Each method that takes images, as a function of them, and the name of its argument."""
    ddpm, params, key = model
    return {
        "loss": ("x_0", lambda x: ddpm.loss(params, key, x)),
        "bits_per_dim": ("x_0", lambda x: ddpm.bits_per_dim(params, key, x)),
        "encode": ("x_0", lambda x: ddpm.encode(params, x)),
        "decode": ("x_T", lambda x: ddpm.decode(params, x)),
        "reverse": ("x", lambda x: ddpm.reverse(params, jax.random.split(key, 2), x, 2)),
        "denoise": ("x_t", lambda x: ddpm.denoise(params, x, jnp.zeros(2, int))),
    }


METHODS = ["loss", "bits_per_dim", "encode", "decode", "reverse", "denoise"]


def refusal(call):
    """The one line that `call` is refused with."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("shape", "remedy"),
    [
        ((8, 8, 1), "[None]"),
        ((2, 8, 8), "data.image_shape"),
        ((2, 16, 16, 1), "data.image_shape"),
        ((2, 1, 8, 8), ".transpose(0, 2, 3, 1)"),
        ((2, 8, 8, 3), "data.image_shape"),
    ],
)
def test_wrong_shapes_name_the_right_one(calls, method, shape, remedy):
    name, call = calls[method]
    said = refusal(lambda: call(jnp.zeros(shape)))
    assert said.startswith(f"{name}: must be [B, 8, 8, 1], got {list(shape)}; ") and remedy in said


@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_array_of_floats_is_a_type_error(calls, method):
    name, call = calls[method]
    with pytest.raises(TypeError, match=rf"{name}: must be floats in \[-1, 1\], got uint8"):
        call(np.zeros((2, 8, 8, 1), np.uint8))
    with pytest.raises(TypeError, match=f"{name}: must be an array of jax or NumPy, got list"):
        call([[0.0]])


@pytest.mark.parametrize("bad", [4.0, np.float32(4), "4", None, True, np.True_, np.zeros(2, int)])
@pytest.mark.parametrize("name", ["n", "start", "batch_size"])
def test_counts_are_whole_numbers(model, name, bad):
    ddpm, params, key = model
    if name == "batch_size" and bad is None:
        return  # The default.
    said = refusal(lambda: ddpm.sample(params, key, **{"n": 2, name: bad}))
    assert said.startswith(f"{name}: must be a whole number, got ")


@pytest.mark.parametrize(
    "kind",
    [int, np.int64, np.uint8, jnp.int32, np.array, jnp.array],
    ids=["int", "numpy int64", "numpy uint8", "jax int32", "numpy array", "jax array"],
)
def test_counts_may_be_of_any_integer_type(model, kind):
    ddpm, params, key = model
    assert ddpm.sample(params, key, kind(0)).shape == (0, 8, 8, 1)
    images = ddpm.sample(
        params, key, kind(2), start=kind(1), batch_size=kind(2), sampler="ddim", steps=kind(2)
    )
    assert images.shape == (2, 8, 8, 1)


def test_a_key_of_another_kind_is_told_how_to_make_one(model):
    ddpm, params, key = model
    x = jnp.zeros((2, 8, 8, 1))
    calls = [
        lambda rng: ddpm.sample(params, rng, 1),
        lambda rng: ddpm.bits_per_dim(params, rng, x),
        lambda rng: ddpm.loss(params, rng, x),
        ddpm.init,
    ]
    for call in calls:
        for bad in (0, np.int64(3), None, jax.random.key(0, impl="rbg"), np.zeros(3, np.uint32)):
            said = refusal(lambda call=call, bad=bad: call(bad))
            assert said.startswith("rng: must be a threefry key, got ") and KEY in said
        said = refusal(lambda call=call: call(jax.random.split(key, 3)))
        assert "got keys of shape [3]; pass one of them" in said
    said = refusal(lambda: ddpm.reverse(params, key, x, 1))
    assert said.startswith("keys: must be 2 threefry keys") and f"split({KEY}, 2)" in said
    with jax.default_prng_impl("rbg"):
        said = refusal(lambda: ddpm.sample(params, jax.random.key_data(key), 1))
    assert 'jax.random.wrap_key_data(rng, impl="threefry2x32")' in said


def test_keys_of_the_old_style_are_taken(model):
    old = jax.random.key_data(model[2])
    check_key(old)
    check_key(np.asarray(old))
    check_keys(jnp.stack([old, old, old]), 3)
    assert "got keys of shape [2]" in refusal(lambda: check_key(jnp.stack([old, old])))


@pytest.mark.parametrize("method", METHODS)
def test_params_of_another_model_are_named(calls, model, tiny, method, monkeypatch):
    ddpm, params, key = model
    x = jnp.zeros((2, 8, 8, 1))
    wider = DDPM(with_(tiny, model={"base_channels": 8}))
    deeper = DDPM(with_(tiny, model={"num_res_blocks": 2}))
    call = {
        "loss": lambda ddpm, params: ddpm.loss(params, key, x),
        "bits_per_dim": lambda ddpm, params: ddpm.bits_per_dim(params, key, x),
        "encode": lambda ddpm, params: ddpm.encode(params, x),
        "decode": lambda ddpm, params: ddpm.decode(params, x),
        "reverse": lambda ddpm, params: ddpm.reverse(params, jax.random.split(key, 2), x, 2),
        "denoise": lambda ddpm, params: ddpm.denoise(params, x, jnp.zeros(2, int)),
    }[method]
    for other in (wider, deeper):
        assert "params: of another model: " in refusal(lambda other=other: call(other, params))
    # Flax ignores what the network does not ask for.
    assert ", which has " in refusal(lambda: call(ddpm, {**params, "more": jnp.zeros(3)}))
    assert "is missing" in refusal(lambda: call(ddpm, {"params": params}))
    assert "is missing" in refusal(lambda: ddpm.sample(None, key, 1))


def test_numbers_of_a_batch_are_one_per_image(model):
    ddpm, params, key = model
    x = jnp.zeros((2, 8, 8, 1))
    for t in (3, [1, 2], np.zeros(2), jnp.zeros((2, 1), int), jnp.zeros(3, int)):
        assert refusal(lambda t=t: ddpm.denoise(params, x, t)).startswith("t: must be ")
    said = refusal(lambda: ddpm.loss(params, key, x, rows=jnp.arange(3)))
    assert said == "rows: must be [2], one per image, got [3]"


def test_what_returns_to_the_host_is_no_part_of_a_program(model):
    ddpm, params, key = model
    x = jnp.zeros((2, 8, 8, 1))
    traced = {
        "sample": [
            lambda: jax.jit(lambda p: ddpm.sample(p, key, 2))(params),
            lambda: jax.jit(lambda k: ddpm.sample(params, k, 2))(key),
            lambda: jax.vmap(lambda k: ddpm.sample(params, k, 2))(jax.random.split(key, 2)),
        ],
        "bits_per_dim": [lambda: jax.jit(lambda x: ddpm.bits_per_dim(params, key, x))(x)],
    }
    for name, each in traced.items():
        for call in each:
            assert f"{name} returns arrays in the host's memory" in refusal(call)
    assert "pass it from outside jax.jit" in refusal(
        lambda: jax.jit(lambda n: ddpm.sample(params, key, n))(2)
    )
    # Nothing is wrong with the loss there.
    jax.eval_shape(jax.grad(lambda p: ddpm.loss(p, key, x).mean()), params)


def test_params_may_be_on_any_mesh_of_the_users(model):
    """jax.make_mesh makes axes of the type Explicit, with which a convolution is refused."""
    ddpm, params, key = model
    mesh = jax.make_mesh((2, 2), ("x", "y"))

    def divided(leaf):
        spec = ("x",) if leaf.ndim and leaf.shape[-1] % 2 == 0 else (None,) * min(leaf.ndim, 1)
        axes = (*(None,) * (leaf.ndim - len(spec)), *spec)
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*axes)))

    t = jnp.arange(4)
    x = jnp.ones((4, 8, 8, 1))
    on_mesh = jax.tree.map(divided, params)
    assert "type Explicit; make it" in refusal(lambda: jax.jit(ddpm.denoise)(on_mesh, x, t))
    with jax.set_mesh(mesh):
        assert "type Explicit; make it" in refusal(lambda: ddpm.sample(on_mesh, key, 2))
        jax.eval_shape(ddpm.denoise, params, x, t)
    # Its devices share the images, however its axes are called.
    placed = place(np.zeros((8, 2)), mesh_of(with_auto_axes(on_mesh)))
    assert [shard.data.shape for shard in placed.addressable_shards] == [(2, 2)] * 4
    images = ddpm.sample(params, key, 2, batch_size=2, sampler="ddim", steps=2)
    shared = ddpm.sample(on_mesh, key, 2, batch_size=2, sampler="ddim", steps=2)
    np.testing.assert_allclose(shared, images, atol=1e-5)


def test_a_model_loads_whatever_jaxs_default_kind_of_key(run):
    with jax.default_prng_impl("rbg"):
        ddpm, params = load(run)
        seeded = jax.random.key(0, impl="threefry2x32")
        assert ddpm.sample(params, seeded, 1, sampler="ddim", steps=1).shape == (1, 8, 8, 1)
