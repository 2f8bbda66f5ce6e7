"""compress and decompress as a whole, with a model that is one formula."""

import dataclasses

import jax
import numpy as np
import pytest
from coded import LABELS, images, model
from conftest import with_

from ddpm_jax import DDPM
from ddpm_jax.compression import Asked, compress, compressed, decompress
from ddpm_jax.compression.format import read_head
from ddpm_jax.compression.plan import rmse_of
from ddpm_jax.devices.mesh import make_mesh, replicated
from ddpm_jax.errors import UserError

QUICK = {"group_bits": 4, "labels": LABELS}


@pytest.fixture(scope="module")
def coder(tiny):
    return model(tiny)


@pytest.fixture(scope="module")
def lossy(coder):
    """All but the lossless layer."""
    return compressed(*coder, images(), Asked(**QUICK))


@pytest.fixture(scope="module")
def lossless(coder):
    return compressed(*coder, images(), Asked(**QUICK, lossless=True))


@pytest.fixture(scope="module")
def shown(coder, lossy):
    """The pictures of the lossy file."""
    return decompress(*coder, lossy.data)


def within_a_level(found, expected):
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_a_file_gives_the_pictures_that_the_sender_saw(lossy, lossless, shown, coder):
    np.testing.assert_allclose(rmse_of(shown, images()), lossy.rmse[-1], atol=0.05)
    assert lossy.rmse[-1].mean() < 10 < 20 < lossy.rmse[0].mean()
    np.testing.assert_array_equal(decompress(*coder, lossless.data), images())
    # The labels are kept: class and picture fit, also where nothing but the head is read.
    head, end = read_head(lossy.data)
    assert head.labels == LABELS
    start = decompress(*coder, lossy.data[:end]).mean(axis=(1, 2, 3))
    assert start[[0, 4]].max() < start[3] < start[[1, 2]].min()


def test_any_batch_gives_the_same(coder, lossy, lossless, shown):
    within_a_level(decompress(*coder, lossy.data, batch_size=2), shown)
    np.testing.assert_array_equal(decompress(*coder, lossless.data, batch_size=1), images())


def test_any_devices_give_the_same(coder, lossy, lossless, shown):
    ddpm, params = coder
    spread = jax.device_put(params, replicated(make_mesh(4)))
    within_a_level(decompress(ddpm, spread, lossy.data, batch_size=4), shown)
    np.testing.assert_array_equal(decompress(ddpm, spread, lossless.data), images())
    # Sent by four devices, received by one.
    data = compress(ddpm, spread, images(), **QUICK, lossless=True)
    np.testing.assert_array_equal(decompress(ddpm, params, data), images())


@pytest.mark.parametrize("off", [1e-5, -1e-5])
def test_a_denoiser_that_is_off_a_little_gives_the_same(tiny, coder, lossy, lossless, shown, off):
    other, params = model(tiny, off=off)
    within_a_level(decompress(other, params, lossy.data), shown)
    np.testing.assert_array_equal(decompress(other, params, lossless.data), images())


def test_every_prefix_gives_the_pictures_of_its_whole_layers(coder, lossless):
    data = lossless.data
    _, start = read_head(data)
    assert lossless.ends[0] == start and lossless.ends[-1] == len(data)
    for end in range(start):
        with pytest.raises(UserError, match=r"written by|ends within its head"):
            decompress(*coder, data[:end])
    for number, end in enumerate(lossless.ends):
        found = decompress(*coder, data[:end])
        np.testing.assert_allclose(rmse_of(found, images()), lossless.rmse[number], atol=0.05)
        following = lossless.ends[min(number + 1, len(lossless.ends) - 1)]
        last = decompress(*coder, data[: following - 1])
        if end < len(data):
            np.testing.assert_array_equal(last, found)
        flow = decompress(*coder, data[:end], picture="flow")
        assert flow.shape == found.shape and flow.dtype == np.uint8
    np.testing.assert_array_equal(flow, images())


def test_a_flow_spreads_as_images_do_and_the_least_error_does_not(coder, lossy):
    head = lossy.data[: lossy.ends[0]]
    flow, x_0 = (decompress(*coder, head, picture=kind) for kind in ("flow", "x_0"))
    inside = [images().std(axis=(1, 2, 3)), flow.std(axis=(1, 2, 3)), x_0.std(axis=(1, 2, 3))]
    np.testing.assert_allclose(inside[1].mean(), inside[0].mean(), rtol=0.25)
    assert inside[2].mean() < 0.5 * inside[0].mean()


def test_seeds_and_images_decide_the_bytes(coder, lossy):
    again = compress(*coder, images(), **QUICK)
    assert again == lossy.data
    others = [
        compress(*coder, images(), **QUICK, seed=2**32 - 1),
        compress(*coder, images(seed=1), **QUICK),
    ]
    for other in others:
        assert other != lossy.data
    assert read_head(others[0])[0].seed == 2**32 - 1


@pytest.mark.parametrize("goal", [1.8, 2.2, 3.0])
def test_a_file_is_never_larger_than_asked(coder, goal):
    found = compressed(*coder, images(), Asked(**QUICK, bits_per_dim=goal))
    assert 8 * len(found.data) <= goal * images().size
    shown = decompress(*coder, found.data)
    np.testing.assert_allclose(rmse_of(shown, images()), found.rmse[-1], atol=0.05)
    assert len(found.rmse) == len(found.ends) and found.ends[-1] == len(found.data)


def test_a_file_ends_where_the_error_asked_for_is_reached(coder):
    many = images(np.arange(16) % 2)
    found = compressed(*coder, many, Asked(np.arange(16) % 2, rmse=20, group_bits=4))
    np.testing.assert_allclose(np.sqrt(np.square(found.rmse[-1]).mean()), 20, rtol=0.15)


NO = "labels: this model was trained"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"images": images().astype(np.float32)}, "images: must be uint8 .*float32"),
        ({"images": images()[0]}, r"images: must be uint8 \[N, 8, 8, 1\].* \[8, 8, 1\]"),
        ({"images": images().transpose(0, 3, 1, 2)}, r"images: must be uint8 .*\[5, 1, 8, 8\]"),
        ({"images": images()[:, :7]}, "images: must be uint8"),
        ({"images": images()[:0]}, "images: must be from 1 to .* got 0"),
        ({"images": "a.png"}, "images: must be uint8"),
        ({"rmse": 5, "bits_per_dim": 1}, "exclude each other"),
        ({"rmse": 5, "lossless": True}, "exclude each other"),
        ({"bits_per_dim": 5, "lossless": True}, "exclude each other"),
        ({"rmse": 0.001}, "rmse: this model comes to .* at its last step"),
        ({"rmse": 0}, "rmse: must be above 0 and finite, got 0"),
        ({"rmse": -1}, "rmse: must be above 0"),
        ({"rmse": float("nan")}, "rmse: must be above 0 and finite, got nan"),
        ({"rmse": float("inf")}, "rmse: must be above 0"),
        ({"rmse": "5"}, "rmse: must be above 0 and finite, got '5'"),
        ({"bits_per_dim": float("nan")}, "bits_per_dim: must be above 0"),
        ({"bits_per_dim": -0.5}, "bits_per_dim: must be above 0"),
        ({"bits_per_dim": [1]}, "bits_per_dim: must be above 0"),
        ({"bits_per_dim": 0.1}, "bits_per_dim: the file's head alone takes"),
        ({"bits_per_dim": 1e-30}, "bits_per_dim: the file's head alone takes"),
        ({"seed": -1}, "seed: must be at least 0"),
        ({"seed": 2**32}, "seed: must be at least 0 and below"),
        ({"seed": 1.5}, "seed: must be a whole number"),
        ({"group_bits": 3}, "group_bits: must be from 4 to 16, got 3"),
        ({"group_bits": 17}, "group_bits: must be from 4 to 16, got 17"),
        ({"group_bits": 8.0}, "group_bits: must be a whole number"),
        ({"labels": (0, 1)}, r"labels: must be one or \[5\]"),
        ({"labels": 2}, "labels: must be from 0 to 1, or -1 .* got 2"),
        ({"labels": (0.5,) * 5}, "labels: must be integers"),
    ],
)
def test_what_cannot_be_compressed_is_one_line(coder, changed, words):
    arguments = {"images": images(), **QUICK, **changed}
    with pytest.raises(UserError, match=words) as told:
        compress(*coder, **arguments)
    assert "\n" not in str(told.value)


def test_a_model_needs_a_calibration_steps_and_finite_weights(tiny, coder):
    ddpm, params = coder
    bare = dataclasses.replace(ddpm, calibration=None)
    with pytest.raises(UserError, match="needs the model's calibration; make it with ddpm-jax"):
        compress(bare, params, images(), **QUICK)
    one = dataclasses.replace(ddpm, config=with_(ddpm.config, diffusion={"num_timesteps": 1}))
    with pytest.raises(UserError, match="needs a model of two or more steps"):
        compress(one, params, images(), **QUICK)
    with pytest.raises(UserError, match="not finite"):
        compress(ddpm, {"spread": np.float32(np.nan)}, images(), **QUICK)
    with pytest.raises(UserError, match="params: of another model"):
        compress(ddpm, {"other": np.float32(1)}, images(), **QUICK)


@pytest.mark.parametrize("data", ["a.ddpm", None, np.zeros(9), 5])
def test_only_bytes_are_decompressed(coder, data):
    with pytest.raises(UserError, match="data: must be the bytes of a file, got "):
        decompress(*coder, data)


def test_a_file_of_another_model_is_refused_before_any_work(tiny, coder, lossy):
    ddpm, params = coder
    broken = dataclasses.replace(ddpm, off=float("nan"))  # Its work would show.
    calibration = dataclasses.replace(ddpm.calibration, mse=2 * ddpm.calibration.mse)
    wide = DDPM(with_(tiny, data={"image_shape": (8, 16, 1)}), ddpm.calibration)
    others = {
        "another weights": (broken, {"spread": np.float32(0.21)}),
        "another calibration": (dataclasses.replace(broken, calibration=calibration), params),
        "another diffusion process": (
            dataclasses.replace(broken, config=with_(ddpm.config, diffusion={"clip": False})),
            params,
        ),
        r"holds images of \[8, 8, 1\], and this model's are \[8, 16, 1\]": (
            wide,
            wide.init(jax.random.key(0)),
        ),
        "needs the model's calibration": (dataclasses.replace(broken, calibration=None), params),
    }
    for words, (other, weights) in others.items():
        with pytest.raises(UserError, match=words):
            decompress(other, weights, lossy.data)
    with pytest.raises(ValueError, match="picture: 'x' is not one of x_0, flow"):
        decompress(broken, params, lossy.data, picture="x")
