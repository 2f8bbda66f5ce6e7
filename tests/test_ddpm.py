"""What users call: sampling that depends on key and index alone, losses, hashing."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import messages, with_

from ddpm_jax import DDPM, losses, samplers, to_uint8
from ddpm_jax.calls.conditions import FREE
from ddpm_jax.calls.programs import advance, sample_batch
from ddpm_jax.devices.mesh import batch_sharding, make_mesh, replicated
from ddpm_jax.errors import UserError
from ddpm_jax.keys import NOISE, TIME, example_keys, random_flip
from ddpm_jax.sampler import Sampler, Tuned, _log_variance, as_sampler, log_found


@pytest.fixture(scope="module")
def model(tiny):
    ddpm = DDPM(tiny)
    params = ddpm.init(jax.random.key(0))
    # At the start the network's output is almost zero: give it something to say.
    params["out_conv"]["kernel"] = 0.1 * jax.random.normal(
        jax.random.key(1), params["out_conv"]["kernel"].shape
    )
    return ddpm, params


def test_samples_are_images(model):
    ddpm, params = model
    x = ddpm.sample(params, jax.random.key(0), 3)
    assert x.shape == (3, 8, 8, 1) and x.dtype == np.float32
    assert np.abs(x).max() <= 1 and len({image.tobytes() for image in x}) == 3
    assert ddpm.sample(params, jax.random.key(0), 0).shape == (0, 8, 8, 1)
    assert not np.allclose(x, ddpm.sample(params, jax.random.key(1), 3))


def test_image_i_is_the_same_for_any_n_start_and_batch_size(model):
    ddpm, params = model
    x = ddpm.sample(params, jax.random.key(0), 11)
    for n, start, batch_size in [(1, 0, None), (1, 7, None), (5, 3, 2), (11, 0, 8)]:
        again = ddpm.sample(params, jax.random.key(0), n, start=start, batch_size=batch_size)
        np.testing.assert_allclose(again, x[start : start + n], atol=1e-5)
    np.testing.assert_array_equal(ddpm.sample(params, jax.random.key(0), 11), x)
    last = ddpm.sample(params, jax.random.key(0), 1, start=2**32 - 1)
    assert np.isfinite(last).all()


@pytest.mark.parametrize(
    ("devices", "options"), [(2, {}), (3, {"sampler": "sde-dpm-solver++", "steps": 4})]
)
def test_image_i_is_the_same_on_any_number_of_devices(model, devices, options):
    ddpm, params = model
    spread = jax.device_put(params, replicated(make_mesh(devices)))
    x = ddpm.sample(params, jax.random.key(0), 7, **options)
    again = ddpm.sample(spread, jax.random.key(0), 7, **options)
    np.testing.assert_allclose(again, x, atol=1e-5)
    again = ddpm.sample(spread, jax.random.key(0), 5, batch_size=2, start=2, **options)
    np.testing.assert_allclose(again, x[2:], atol=1e-5)


def test_several_devices_share_the_work(model):
    ddpm, params = model
    spread = jax.device_put(params, replicated(make_mesh(4)))
    indices = jax.device_put(np.arange(8, dtype=np.uint32), batch_sharding(make_mesh(4)))
    x = sample_batch(ddpm, Sampler(), spread, FREE, jax.random.key(0), indices)
    assert {shard.data.shape[0] for shard in x.addressable_shards} == {2}


def test_programs_do_not_multiply_with_n(model):
    ddpm, params = model
    advance.clear_cache()
    for n in range(1, 20):
        ddpm.sample(params, jax.random.key(0), n, batch_size=4)
    assert advance._cache_size() == 3  # batches of 1, 2 and 4


def test_nonsense_counts_are_refused(model):
    ddpm, params = model
    for arguments in [
        dict(n=-1),
        dict(n=1, start=-1),
        dict(n=1, batch_size=0),
        dict(n=2, start=2**32 - 1),
    ]:
        with pytest.raises(ValueError, match=r"n and start|batch_size"):
            ddpm.sample(params, jax.random.key(0), **arguments)


def test_keys_whose_draws_depend_on_the_batch_are_refused(model):
    ddpm, params = model
    with pytest.raises(ValueError, match="rng: must be a threefry key"):
        ddpm.sample(params, jax.random.key(0, impl="rbg"), 1)


def test_old_style_keys_and_numpy_counts_do(model):
    ddpm, params = model
    x = ddpm.sample(params, jax.random.key(0), 1)
    np.testing.assert_array_equal(ddpm.sample(params, jax.random.PRNGKey(0), np.int64(1)), x)


def test_sampling_uses_no_dropout_and_clips_a_predicted_mean(tiny):
    diffusion = dataclasses.replace(tiny.diffusion, prediction="mean", variance="fixed_small")
    ddpm = DDPM(dataclasses.replace(tiny, diffusion=diffusion))
    params = ddpm.init(jax.random.key(0))
    params["out_conv"]["bias"] += 3.0
    np.testing.assert_array_equal(ddpm.sample(params, jax.random.key(0), 1), np.ones((1, 8, 8, 1)))
    assert "random_bits" not in str(
        jax.make_jaxpr(ddpm.denoise)(params, jnp.zeros((1, 8, 8, 1)), jnp.zeros(1, int))
    )


def test_the_loss_is_eq_14_with_each_examples_own_draws(model):
    """Row i, whatever batch it stands in: t and noise from fold_in(rng, i), drawn here by hand."""
    ddpm, params = model
    x_0 = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (6, 8, 8, 1)), jnp.float32)
    rng = jax.random.key(5)
    keys = [jax.random.fold_in(rng, i) for i in range(6)]
    t = jnp.stack([jax.random.randint(jax.random.fold_in(key, TIME), (), 0, 10) for key in keys])
    # gaussian_noise(keys, NOISE) folds the number in.
    noise = jnp.stack(
        [jax.random.normal(jax.random.fold_in(key, NOISE), (8, 8, 1)) for key in keys]
    )
    denoise_fn = partial(ddpm.denoise, params)
    expected = jax.jit(
        lambda: losses.simple(ddpm.schedule, denoise_fn, x_0, t, noise, prediction="eps")
    )()
    loss = jax.jit(ddpm.loss)
    np.testing.assert_allclose(loss(params, rng, x_0), expected, rtol=1e-4)
    np.testing.assert_allclose(loss(params, rng, x_0[:3]), expected[:3], rtol=1e-4)
    assert len(set(t.tolist())) > 2


def test_training_drops_out_and_evaluation_does_not(model):
    ddpm, params = model
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    x_0, rng = jnp.zeros((4, 8, 8, 1)), jax.random.key(2)
    loss = jax.jit(ddpm.loss, static_argnames="train")
    plain, dropped = loss(params, rng, x_0), loss(params, rng, x_0, train=True)
    assert not np.allclose(plain, dropped, rtol=1e-3)
    np.testing.assert_array_equal(plain, loss(params, rng, x_0))


def test_bytes_are_refused_as_images_to_learn_from(model):
    ddpm, params = model
    with pytest.raises(TypeError, match="uint8"):
        ddpm.loss(params, jax.random.key(0), np.zeros((1, 8, 8, 1), np.uint8))


def test_ddpm_is_frozen_hashable_and_equal_by_config(tiny):
    assert DDPM(tiny) == DDPM(tiny) and hash(DDPM(tiny)) == hash(DDPM(tiny))
    assert DDPM(tiny) != DDPM(dataclasses.replace(tiny, seed=1)) != tiny
    with pytest.raises(dataclasses.FrozenInstanceError):
        DDPM(tiny).config = None


def test_models_that_no_program_tells_apart_are_equal(tiny):
    """Every other field makes another model; `programs_read_what_counts` holds programs to that."""
    around = {
        "data": {"source": "npz:x", "test": "npz:y", "dir": "d", "manual_dir": "m"},
        "train": {"steps": 5, "log_every": 3, "eval_every": 1, "eval_images": 7},
        "checkpoint": {"every": 1, "keep": 9},
        "parallel": {"devices": 2},
    }
    around["data"] |= {"skip_unfit": True, "class_names": ("a", "b"), "workers": 0}
    around["data"] |= {"cache_mb": 1, "on_device": True}
    around["train"] |= {"sample_every": 1, "num_samples": 2}
    other = with_(tiny, **around)
    assert other != tiny and DDPM(other) == DDPM(tiny) and hash(DDPM(other)) == hash(DDPM(tiny))
    assert DDPM(other).config == other
    counting = {
        "model": {"dropout": 0.1, "remat": (0,), "num_classes": 2},
        "data": {"flip": False, "image_shape": (8, 8, 3)},
        "train": {"batch_size": 16, "accumulate": 2, "label_dropout": 0.0},
        "optim": {"learning_rate": 1e-4, "ema_decay": 0.5},
        "diffusion": {"clip": False, "num_timesteps": 11},
    }
    for group, fields in counting.items():
        for name, value in fields.items():
            assert DDPM(with_(tiny, **{group: {name: value}})) != DDPM(tiny), name


def test_flips_hit_half_of_the_images_and_mirror_them():
    images = jnp.arange(12.0).reshape(1, 2, 6, 1).repeat(900, axis=0)
    flipped = random_flip(example_keys(jax.random.key(0), jnp.arange(900)), images)
    mirrored = (flipped == images[:, :, ::-1]).all(axis=(1, 2, 3))
    assert bool((mirrored | (flipped == images).all(axis=(1, 2, 3))).all())
    assert 360 < int(mirrored.sum()) < 540  # 6 standard errors.


def test_to_uint8_rounds_and_inverts():
    levels = np.arange(256, dtype=np.uint8)
    for xp in (np, jnp):
        x = xp.asarray(levels, xp.float32) / 127.5 - 1
        np.testing.assert_array_equal(to_uint8(x), levels)
        np.testing.assert_array_equal(to_uint8(x + 0.003), levels)
        assert to_uint8(xp.asarray([-2.0, 2.0], xp.float32)).tolist() == [0, 255]
    assert isinstance(to_uint8(np.zeros(1)), np.ndarray) and isinstance(
        to_uint8(jnp.zeros(1)), jax.Array
    )


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "ddim", "steps": 4},
        {"sampler": "ddim", "steps": 5, "eta": 0.7, "grid": "quad"},
        {"sampler": "dpm-solver++", "steps": 4},
        {"sampler": "unipc", "timesteps": [1, 3, 4, 8, 9]},
        {"sampler": "deis", "steps": 4, "order": 2},
        {"sampler": "heun", "steps": 3},
        {"steps": 3, "grid": "leading"},
    ],
)
def test_every_sampler_draws_the_same_image_in_any_batch(model, options):
    ddpm, params = model
    images = ddpm.sample(params, jax.random.key(1), 4, **options)
    assert np.isfinite(images).all() and np.abs(images).max() <= 1
    one = ddpm.sample(params, jax.random.key(1), 2, start=2, batch_size=1, **options)
    np.testing.assert_allclose(one, images[2:], atol=1e-5)
    assert np.abs(images - ddpm.sample(params, jax.random.key(1), 4)).max() > 0.01


def test_a_whole_grid_is_the_whole_chain(model):
    ddpm, params = model
    for options in ({"sampler": "ancestral"}, {"sampler": "ddim", "eta": 0.0}):
        images = ddpm.sample(params, jax.random.key(1), 2, **options)
        np.testing.assert_array_equal(
            images, ddpm.sample(params, jax.random.key(1), 2, steps=10, **options)
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sampler": "euler"},
            f"sampler: must be one of {', '.join(samplers.SAMPLERS)}, got 'euler'",
        ),
        ({"steps": 0}, "steps: must be at least 1, got 0"),
        ({"steps": 11}, "steps: must be from 1 to 10, got 11"),
        (
            {"steps": 5, "grid": "cubic"},
            "grid: must be one of linspace, leading, trailing, quad, squares, likelihood, "
            "tuned, got 'cubic'",
        ),
        (
            {"steps": 1, "grid": "leading"},
            "grid: leading with --steps 1 visits step 0 alone, and pure noise stays noise; choose "
            "--grid trailing or linspace, or more steps",
        ),
        (
            {"sampler": "heun", "steps": 1, "grid": "quad"},
            "grid: quad with --steps 1 visits step 0 alone, and pure noise stays noise; choose "
            "--grid trailing or linspace, or more steps",
        ),
        ({"grid": "quad"}, "grid: quad requires --steps; add it, or leave --grid out"),
        ({"eta": 0.5}, "eta: ancestral does not take it; leave it out or choose ddim"),
        ({"sampler": "ddim", "eta": 1.5}, "eta: must be at least 0 and at most 1, got 1.5"),
        ({"sampler": "unipc", "order": 4}, "order: this sampler takes 2 or 3, got 4"),
        ({"sampler": "deis", "order": 5}, "order: must be at least 2 and at most 4, got 5"),
        (
            {"sampler": "ipndm", "order": 2},
            "order: ipndm does not take it; leave it out or choose unipc or deis",
        ),
        (
            {"sampler": "deis", "b_h": "b1"},
            "b_h: deis does not take it; leave it out or choose unipc",
        ),
        (
            {"sampler": "ddim", "variance": "fixed_small"},
            "variance: ddim does not take it; leave it out or choose ancestral",
        ),
        (
            {"variance": "optimal"},
            "variance: these weights have no calibration, which this needs; run ddpm-jax "
            "calibrate RUN first, with the same --weights and --step",
        ),
        (
            {"steps": 4, "grid": "likelihood"},
            "grid: these weights have no calibration, which this needs; run ddpm-jax "
            "calibrate RUN first, with the same --weights and --step",
        ),
        (
            {"steps": 4, "grid": "tuned"},
            "grid: no 4 steps were tuned for these weights; run ddpm-jax tune RUN --steps 4 with "
            "the same --weights and --step, or choose another grid",
        ),
        (
            {"sampler": "unipc", "steps": 4, "grid": "tuned"},
            "grid: no 4 steps of unipc were tuned for these weights; run ddpm-jax tune RUN "
            "--steps 4 --sampler unipc with the same --weights and --step, or choose another grid",
        ),
        (
            {"steps": 4, "grid": "tuned", "variance": "fixed_small"},
            "variance: --grid tuned takes the variance of tune's choice; leave --variance out, or "
            "choose another grid",
        ),
        (
            {"timesteps": [0, 9], "steps": 2},
            "timesteps: are themselves the grid; leave out --steps and --grid",
        ),
        (
            {"timesteps": [0, 9], "grid": "quad"},
            "timesteps: are themselves the grid; leave out --steps and --grid",
        ),
        ({"timesteps": []}, "timesteps: must be one or more, in ascending order, got ()"),
        (
            {"timesteps": np.array([9, 0])},
            "timesteps: must be one or more, in ascending order, got (9, 0)",
        ),
        (
            {"timesteps": (3, 3)},
            "timesteps: must be one or more, in ascending order, got (3, 3)",
        ),
        ({"timesteps": [-1, 9]}, "timesteps: must be at least 0, got -1"),
        ({"timesteps": [0, 10]}, "timesteps: must be from 0 to 9, got 10"),
        ({"timesteps": [0.0, 9.0]}, "timesteps: must be of type int, got 0.0"),
        ({"timesteps": [[0], [3, 9]]}, "timesteps: must be of type int, got (0,)"),
        ({"timesteps": 9}, "timesteps: must be a tuple of numbers, got 9"),
        (
            {"timesteps": [0]},
            "timesteps: visits step 0 alone, and pure noise stays noise; choose --grid "
            "trailing or linspace, or more steps",
        ),
    ],
)
def test_a_sampler_that_cannot_be_is_refused(tiny, options, message):
    with pytest.raises(ValueError) as error:
        DDPM(tiny).sample({"x": np.zeros(1)}, jax.random.key(0), 1, **options)
    assert str(error.value) == message


def test_it_is_said_once_which_sampler_was_tuned(tiny, caplog):
    caplog.set_level("INFO")
    log_found.cache_clear()
    choice = Sampler("ddim", timesteps=(2, 5, 9), eta=0.5)
    ddpm = DDPM(tiny, tuned=Tuned(choices=(choice,)))
    for _ in range(2):
        assert ddpm.resolve(Sampler(steps=3, grid="tuned")) == choice
    assert messages(caplog) == ["grid tuned, 3 steps: ddim, eta 0.5, at the steps 2 5 9"]


def test_timesteps_may_be_any_array_of_numbers(tiny):
    """And those of a grid are the grid's steps."""
    expected = Sampler("unipc", timesteps=(0, 3, 6, 9))
    for timesteps in ((0, 3, 6, 9), [0, 3, 6, 9], np.arange(0, 10, 3), jnp.arange(0, 10, 3)):
        assert as_sampler("unipc", timesteps=timesteps) == expected
    assert Sampler.from_options(json.loads(json.dumps(expected.options))) == expected
    np.testing.assert_array_equal(
        expected.timesteps_of(tiny.diffusion),
        Sampler("unipc", steps=4, grid="linspace").timesteps_of(tiny.diffusion),
    )
    every = DDPM(tiny).resolve(as_sampler("unipc", timesteps=range(10)))
    assert every == DDPM(tiny).resolve(Sampler("unipc"))


def test_options_that_are_the_defaults_make_the_same_sampler(tiny):
    """And so no program of its own."""
    ddpm = DDPM(tiny)
    for given, shorter in [
        (dict(sampler="unipc", order=3, b_h="b2"), dict(sampler="unipc")),
        (dict(sampler="unipc", steps=4, grid="squares"), dict(sampler="unipc", steps=4)),
        (dict(sampler="deis", order=3), dict(sampler="deis")),
        (dict(variance=tiny.diffusion.variance), dict()),
        (dict(steps=4, variance="fixed_small"), dict(steps=4)),
    ]:
        assert ddpm.resolve(Sampler(**given)) == ddpm.resolve(Sampler(**shorter))


def test_recorded_options_that_are_none_are_refused():
    for options, message in [
        ({"sampler": "ddim", "churn": 1}, "sampler: has no option 'churn'"),
        ({"timesteps": [3, 1]}, "timesteps: must be one or more, in ascending order"),
        ({"timesteps": "all"}, "timesteps: must be a tuple of numbers, got 'all'"),
        ({"sampler": "plms"}, "sampler: must be one of ancestral"),
        ({"sampler": "unipc", "b_h": "b3"}, "b_h: must be one of .*, got 'b3'"),
        ({"variance": "learned"}, "variance: must be one of .*, got 'learned'"),
    ]:
        with pytest.raises(UserError, match=message):
            Sampler.from_options(options)


def test_striding_a_fixed_large_model_takes_the_posteriors_variance_and_says_so(tiny, caplog):
    """And so the same weights draw the same images as under fixed_small."""
    _log_variance.cache_clear()  # It is said once.
    images = {}
    for variance in ("fixed_large", "fixed_small"):
        ddpm = DDPM(
            dataclasses.replace(
                tiny, diffusion=dataclasses.replace(tiny.diffusion, variance=variance)
            )
        )
        params = jax.tree.map(lambda leaf: leaf + 0.01, ddpm.init(jax.random.key(0)))
        caplog.clear()
        images[variance] = ddpm.sample(params, jax.random.key(1), 2, steps=6)
        ddpm.resolve(ddpm.resolve(Sampler(steps=6)))
        assert caplog.text.count("6 of 10 steps: sampling with the posterior's variance") == (
            variance == "fixed_large"
        )
    np.testing.assert_array_equal(images["fixed_large"], images["fixed_small"])


def test_reverse_is_the_chain_in_pieces(model):
    ddpm, params = model
    keys = samplers.example_keys(jax.random.key(1), np.arange(3, dtype=np.uint32))
    x = samplers.gaussian_noise(keys, samplers.START, ddpm.image_shape)
    expected = ddpm.sample(params, jax.random.key(1), 3)
    x_0, predicted = ddpm.reverse(params, keys, x, 10)
    np.testing.assert_allclose(x_0, expected, atol=1e-5)
    np.testing.assert_allclose(x_0, predicted, atol=1e-5)  # The last mean is the predicted image.
    halfway, predicted = ddpm.reverse(params, keys, x, 10, 4)
    np.testing.assert_allclose(ddpm.reverse(params, keys, halfway, 4)[0], expected, atol=1e-5)
    assert np.abs(halfway - predicted).max() > 0.1
    for start, stop in ((11, 0), (4, 4), (3, -1)):
        with pytest.raises(ValueError, match="start and stop"):
            ddpm.reverse(params, keys, x, start, stop)


@pytest.mark.parametrize(
    ("loss", "variance", "prediction"),
    [("vlb", "learned", "mean"), ("hybrid", "learned_range", "eps")],
)
def test_learned_variances_train_and_sample(tiny, pictures, loss, variance, prediction):
    diffusion = dataclasses.replace(
        tiny.diffusion, loss=loss, variance=variance, prediction=prediction
    )
    ddpm = DDPM(dataclasses.replace(tiny, diffusion=diffusion))
    params = ddpm.init(jax.random.key(0))
    x_0 = np.float32(pictures[:2]) / 127.5 - 1
    gradient = jax.jit(
        jax.grad(lambda params: ddpm.loss(params, jax.random.key(1), x_0, train=True).mean())
    )(params)
    last = gradient["out_conv"]["kernel"]
    assert last.shape[-1] == 2 and (np.abs(last).max(axis=(0, 1, 2)) > 0).all()
    assert ddpm.sample(params, jax.random.key(1), 2).shape == (2, 8, 8, 1)
    images = ddpm.sample(params, jax.random.key(1), 2, sampler="unipc", steps=4)
    assert images.shape == (2, 8, 8, 1) and np.isfinite(images).all()


def test_without_clip_the_predicted_image_stays_as_it_is(tiny, monkeypatch):
    """The network predicts x_0 = 3 x_t.

    Sampling and the bound use that as it is, or clipped to at most 1; the bound knows no dynamic
    clipping.
    """
    monkeypatch.setattr(DDPM, "denoise", lambda ddpm, params, x_t, t: 3 * x_t)
    # Its CDFs take seconds to compile.
    monkeypatch.setattr(losses, "bound_terms", lambda *_: jnp.zeros(2))
    keys = samplers.example_keys(jax.random.key(1), np.arange(2, dtype=np.uint32))
    x = samplers.gaussian_noise(keys, samplers.START, (8, 8, 1))
    images, errors = {}, {}
    for clip in (True, False, "dynamic"):
        diffusion = dataclasses.replace(tiny.diffusion, prediction="x_0", clip=clip)
        ddpm = DDPM(
            dataclasses.replace(tiny, diffusion=diffusion, seed=124)
        )  # A program of its own.
        params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), ddpm.shapes)
        x_0, predicted = ddpm.reverse(params, keys, x, 10)
        images[clip] = ddpm.sample(params, jax.random.key(1), 2)
        errors[clip] = ddpm.bits_per_dim(params, jax.random.key(1), jnp.zeros((2, 8, 8, 1))).mse
        np.testing.assert_allclose(images[clip], np.clip(x_0, -1, 1), atol=1e-5)
        clipped = clip is not False
        assert clipped == (np.abs(predicted).max() <= 1) == (errors[clip].max() <= 1)
    for one, other in ((True, False), (True, "dynamic"), (False, "dynamic")):
        assert np.abs(images[one] - images[other]).max() > 0.1
    np.testing.assert_array_equal(errors["dynamic"], errors[True])
