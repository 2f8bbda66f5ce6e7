"""DDPM.inpaint, vary and restore against the pure functions, on any batches and devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import with_

from ddpm_jax import DDPM, editing, operators
from ddpm_jax.devices.mesh import make_mesh, replicated
from ddpm_jax.errors import UserError
from ddpm_jax.keys import example_keys
from ddpm_jax.samplers import SAMPLERS, time_grid
from ddpm_jax.schedule import strided

KEY = jax.random.key(3)
COUNT = 5


@pytest.fixture(scope="module")
def model(tiny):
    """A model with two classes whose output is no zero."""
    ddpm = DDPM(with_(tiny, model={"num_classes": 2}))
    params = ddpm.init(jax.random.key(0))
    kernel = params["out_conv"]["kernel"]
    params["out_conv"]["kernel"] = 0.1 * jax.random.normal(jax.random.key(1), kernel.shape)
    params["class_embedding"]["embedding"] += jnp.arange(3.0)[:, None]
    return ddpm, params


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(-1, 1, (COUNT, 8, 8, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def masks():
    return np.random.default_rng(1).random((COUNT, 8, 8, 1)) > 0.5


def network(model, label=None):
    ddpm, params = model
    return lambda x_t, t: ddpm.denoise(params, x_t, t, label)


def keys():
    return example_keys(KEY, np.arange(COUNT, dtype=np.uint32))


def options(ddpm, **changed):
    diffusion = ddpm.config.diffusion
    given = {"prediction": diffusion.prediction, "variance": diffusion.variance, "clip": True}
    return {**given, **changed}


def close(actual, expected):
    np.testing.assert_allclose(actual, np.clip(expected, -1, 1), atol=2e-5)


def test_inpainting_is_the_pure_function(model, images, masks):
    ddpm, params = model
    drawn = ddpm.inpaint(params, KEY, images, masks, resample=2, jump=3, labels=1)
    inpainted = jax.jit(
        lambda keys: editing.inpaint(
            ddpm.schedule,
            network(model, 1),
            keys,
            images,
            masks,
            resample=2,
            jump=3,
            **options(ddpm),
        )
    )(keys())
    close(drawn, inpainted)
    np.testing.assert_array_equal(np.where(masks, drawn, 0), np.where(masks, images, 0))


def test_inpainting_takes_one_mask_or_one_each_in_any_batch(model, images, masks):
    ddpm, params = model
    few = {"steps": 4, "resample": 2, "jump": 2}
    whole = ddpm.inpaint(params, KEY, images, masks, **few)
    for first, last in [(0, 2), (2, 5)]:
        part = slice(first, last)
        again = ddpm.inpaint(
            params, KEY, images[part], masks[part], start=first, batch_size=2, **few
        )
        np.testing.assert_allclose(again, whole[part], atol=1e-5)
    one = ddpm.inpaint(params, KEY, images, masks[0, :, :, 0].astype(float), **few)
    np.testing.assert_allclose(one[:1], whole[:1], atol=1e-5)


@pytest.mark.parametrize("name", ["ancestral", "unipc"])
def test_variations_are_the_pure_function(model, images, name):
    ddpm, params = model
    drawn = ddpm.vary(params, KEY, images, 0.6, sampler=name, steps=4, batch_size=2)
    times = time_grid(6, 4, SAMPLERS[name].grid)
    schedule = strided(ddpm.schedule, times)
    varied = jax.jit(
        lambda keys: editing.vary(
            schedule,
            network(model),
            keys,
            images,
            4,
            SAMPLERS[name],
            original=ddpm.schedule,
            **options(ddpm, variance="fixed_small"),
        )
    )(keys())
    close(drawn, varied)


def test_variations_by_all_steps_keep_the_models_variance(model, images):
    ddpm, params = model
    drawn = ddpm.vary(params, KEY, images, 0.3)
    varied = jax.jit(
        lambda keys: editing.vary(
            ddpm.schedule,
            network(model),
            keys,
            images,
            3,
            SAMPLERS["ancestral"],
            **options(ddpm),
        )
    )(keys())
    close(drawn, varied)


def test_named_steps_are_those_below_the_strength(model, images):
    ddpm, params = model
    named = ddpm.vary(params, KEY, images, 0.5, sampler="ddim", timesteps=(0, 2, 4, 7, 9))
    below = ddpm.vary(params, KEY, images, 1.0, sampler="ddim", timesteps=(0, 2, 4))
    np.testing.assert_array_equal(named, below)


@dataclasses.dataclass(frozen=True)
class Halved:
    """An operator of a user's own, which jax does not know as a tree."""

    def A(self, x):
        return x / 2

    def pinv(self, y):
        return 2 * y

    def solve(self, r2, n2):
        return lambda u: u / (r2 / 4 + n2)


@pytest.mark.parametrize(
    ("kind", "noise"), [("downscale", 0.0), ("mask", 0.1), ("own", 0.1), ("own", 0.0)]
)
def test_restoration_is_the_pure_function_in_any_batch(model, images, masks, kind, noise):
    ddpm, params = model
    operator = {
        "downscale": operators.downscale(2),
        "mask": operators.mask(masks),
        "own": Halved(),
    }[kind]
    y = np.asarray(operator.A(images))
    drawn = ddpm.restore(params, KEY, y, operator, noise=noise, sampler="ddim", batch_size=2)
    restored = jax.jit(
        lambda keys: editing.restore(
            ddpm.schedule,
            network(model),
            keys,
            y,
            operator,
            SAMPLERS["ddim"],
            noise=noise,
            **options(ddpm),
        )
    )(keys())
    close(drawn, restored)


def test_edits_are_the_same_on_any_number_of_devices(model, images, masks):
    ddpm, params = model
    spread = jax.device_put(params, replicated(make_mesh(4)))
    for edit in (
        lambda params: ddpm.inpaint(params, KEY, images, masks, steps=3, resample=2, jump=1),
        lambda params: ddpm.vary(params, KEY, images, 0.5, labels=1, guidance=2.0),
        lambda params: ddpm.restore(
            params, KEY, images * masks, operators.mask(masks), noise=0.1, steps=3
        ),
    ):
        np.testing.assert_allclose(edit(spread), edit(params), atol=1e-5)


@pytest.mark.parametrize(
    ("call", "arguments", "words"),
    [
        ("inpaint", {"mask": np.ones((8, 7))}, r"mask: must be \[8, 8\].*got \[8, 7\]"),
        ("inpaint", {"mask": np.ones((3, 8, 8, 1))}, r"mask: must be .*\[5, 8, 8, 1\]"),
        ("inpaint", {"mask": np.ones((8, 8)), "resample": 0}, "resample: must be a whole"),
        ("inpaint", {"mask": np.ones((8, 8)), "labels": 7}, "labels: must be from 0 to 1"),
        ("vary", {"strength": 0.0}, "strength: must be above 0"),
        ("vary", {"strength": float("nan")}, "strength: must be above 0"),
        ("vary", {"strength": 0.2, "steps": 5}, "strength 0.2 goes up 2 steps, and 5 are more"),
        ("vary", {"strength": 0.1, "timesteps": (4, 9)}, "the sampler takes none of these"),
        ("restore", {"operator": operators.downscale(2)}, r"y: of \[8, 8, 1\] the operator makes"),
        ("restore", {"operator": 3}, "operator: 3 has not the functions"),
        ("restore", {"operator": operators.grey()}, "y: of"),
        ("restore", {"operator": Halved(), "noise": -1.0}, "noise: must be"),
    ],
)
def test_what_does_not_fit_is_one_line(model, images, call, arguments, words):
    ddpm, params = model
    with pytest.raises(UserError, match=words):
        getattr(ddpm, call)(params, KEY, images, **arguments)
    with pytest.raises(TypeError if call != "restore" else UserError, match="floats"):
        getattr(ddpm, call)(params, KEY, np.zeros((1, 8, 8, 1), np.uint8), **arguments)
