"""Values other than 8-bit levels: how they become the model's units, and back."""

import dataclasses
import pickle

import numpy as np
import pytest

from ddpm_jax.config import Config, Data, Diffusion
from ddpm_jax.data.order_statistics import quantiles_of
from ddpm_jax.data.scaled import scaled
from ddpm_jax.data.scaling import Scaling
from ddpm_jax.data.sources import Source
from ddpm_jax.data.survey import with_units
from ddpm_jax.errors import UserError

SHAPE = (4, 6, 2)


def source_of(values, labels=None):
    """A Source of an array as it stands."""
    names = [str(i) for i in range(len(values))]
    return Source(names, values.__getitem__, labels, "")


def field(rng, n=50):
    """float32 [n,4,6,2]: two channels of different sizes."""
    return (rng.normal(size=(n, *SHAPE)) * [3, 0.01] + [280, 0.5]).astype(np.float32)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("int7", "must be uint8, uint16, range LOW HIGH"),
        ("range 3", "must be uint8"),
        ("uint16 0 1", "must be uint8"),
        ("", "must be uint8"),
        ("range 3 1", "needs LOW below HIGH, got 3 and 1"),
        ("range 1 1", "needs LOW below HIGH"),
        ("range a b", "needs two numbers, got 'a b'"),
        ("range 0 nan", "needs two finite numbers"),
        ("quantiles -0.1 1", "quantiles are from 0 to 1"),
    ],
)
def test_other_words_are_refused(values, message):
    with pytest.raises(UserError, match=f"^data.values: .*{message}"):
        Data(values=values)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"per_channel": True}, "data.per_channel: values uint8 measures nothing"),
        ({"nonfinite": "zero"}, "data.nonfinite: values uint8 are always finite"),
        ({"values": "range 2 3", "nonfinite": "zero"}, "data.nonfinite: 0 is not in the range"),
        ({"values": "range 0 1", "scale": (1.0,)}, "data.scale: values range already says it"),
        ({"values": "standardise", "scale": (1.0,)}, "data.offset and data.scale: give both"),
        (
            {"values": "standardise", "offset": (1.0, 2.0), "scale": (1.0,)},
            "data.offset: must be one number, or one for each of the 3 channels, got 2",
        ),
        ({"values": "standardise", "offset": (1.0,), "scale": (0.0,)}, "data.scale: must be above"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(UserError, match=f"^{message}"):
        Data(**fields)


def test_values_without_bounds_are_not_clipped():
    assert not Config(data=Data(values="standardise")).diffusion.clip
    assert Config(data=Data(values="quantiles 0 1")).diffusion.clip is True
    with pytest.raises(UserError, match="dynamic clips to bounds"):
        Config(data=Data(values="standardise"), diffusion=Diffusion(clip="dynamic"))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "float16", "float32"])
def test_values_come_back_as_they_were(rng, dtype):
    """Integers exactly, and floats to the precision of float32, or of their own type."""
    kind = np.dtype(dtype)
    low, high = (-4.0, 9.0) if kind.kind == "f" else (np.iinfo(kind).min, np.iinfo(kind).max)
    values = rng.uniform(low, high, (3, *SHAPE)).astype(kind)
    scaling = Scaling(Data(values=f"range {low} {high}", image_shape=SHAPE, dtype=dtype))
    x = scaling.from_data(values)
    expected = 2 * (np.float64(values) - low) / (high - low) - 1
    np.testing.assert_allclose(x, expected, atol=1e-6)
    assert x.dtype == np.float32
    back = scaling.to_data(x)
    assert back.dtype == kind
    if kind.kind == "f":
        np.testing.assert_allclose(back, values, atol=1e-5 if dtype == "float32" else 1e-2)
    else:
        np.testing.assert_array_equal(back, values)


def test_levels_come_back_as_they_were():
    for values, count in (("uint8", 256), ("uint16", 65_536)):
        scaling = Scaling(Data(values=values, image_shape=(1, 1, 1)))
        levels = np.arange(count).astype(values).reshape(-1, 1, 1, 1)
        x = np.asarray(scaling.from_data(levels))
        np.testing.assert_allclose(x.ravel(), np.linspace(-1, 1, count), atol=1e-7)
        np.testing.assert_array_equal(scaling.to_data(x), levels)
        assert scaling.to_data(x).dtype == values


def test_bools_come_back_as_they_were(rng):
    values = rng.random((3, *SHAPE)) < 0.5
    scaling = Scaling(Data(values="range 0 1", image_shape=SHAPE, dtype="bool"))
    assert set(np.unique(scaling.from_data(values))) == {-1, 1}
    np.testing.assert_array_equal(scaling.to_data(scaling.from_data(values)), values)


def test_whole_numbers_end_where_their_type_does():
    data = Data(values="standardise", offset=(0.0,), scale=(100.0,), image_shape=SHAPE)
    scaling = Scaling(dataclasses.replace(data, dtype="int8"))
    assert scaling.to_data(np.full((1, *SHAPE), 5.0, np.float32)).max() == 127
    with pytest.raises(UserError, match="not finite"):
        scaling.to_data(np.full((1, *SHAPE), np.nan, np.float32))


@pytest.mark.parametrize("per_channel", [False, True])
def test_standardised_values_have_mean_zero_and_deviation_one(rng, per_channel):
    values = field(rng)
    train = np.arange(0, 50, 2)
    data = Data(values="standardise", image_shape=SHAPE, per_channel=per_channel)
    data = with_units(data, source_of(values), train)
    axes = (0, 1, 2) if per_channel else None
    of_train = np.float64(values[train])
    np.testing.assert_allclose(data.offset, np.ravel(of_train.mean(axes)), rtol=1e-7)
    np.testing.assert_allclose(data.scale, np.ravel(of_train.std(axes)), rtol=1e-7)
    assert data.dtype == "float32"
    x = scaled(source_of(values), data).read(np.arange(50))[train]
    np.testing.assert_allclose(x.mean(axes), 0, atol=1e-4)
    np.testing.assert_allclose(x.std(axes), 1, atol=1e-4)
    np.testing.assert_allclose(Scaling(data).to_data(x), of_train, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("per_channel", [False, True])
def test_quantiles_are_those_of_numpy(rng, per_channel):
    values = field(rng)
    train = np.arange(3, 50)
    data = Data(values="quantiles 0.05 0.9", image_shape=SHAPE, per_channel=per_channel)
    data = with_units(data, source_of(values), train)
    axes = (0, 1, 2) if per_channel else None
    low, high = np.quantile(np.float64(values[train]), [0.05, 0.9], axis=axes)
    np.testing.assert_allclose(data.offset, np.ravel((low + high) / 2), rtol=1e-6)
    np.testing.assert_allclose(data.scale, np.ravel((high - low) / 2), rtol=1e-5)
    x = scaled(source_of(values), data).read(np.arange(50))
    assert x.min() == -1 and x.max() == 1


@pytest.mark.parametrize("dtype", ["bool", "int16", "float16", "float32"])
def test_quantiles_of_pieces_are_exact(rng, dtype):
    values = (rng.normal(size=(1000, 2)) * 50).astype(dtype).astype(np.float32)
    values[:3, 0] = [-0.0, 0.0, np.inf]
    values[3, 1] = np.nan
    levels = [0, 0.001, 0.5, 0.77, 1]
    found = quantiles_of(lambda: np.split(values, 10), levels)
    for column in range(2):
        finite = values[:, column][np.isfinite(values[:, column])]
        expected = np.quantile(np.float64(finite), levels)
        np.testing.assert_allclose([level[column] for level in found], expected, rtol=1e-12)


def test_values_outside_the_range_are_refused(rng):
    data = Data(values="range 0 1", image_shape=SHAPE)
    with pytest.raises(UserError, match=r"from .* to .*, but data.values is range 0 1; widen"):
        with_units(data, source_of(field(rng)), np.arange(50))
    with pytest.raises(UserError, match="widen the range"):
        Scaling(data).from_data(field(rng))


def test_numbers_that_are_not_finite_are_counted_or_replaced(rng, caplog):
    values = field(rng)
    values[1, 2, 3, 0] = np.nan
    values[30, 0, 0, 1] = -np.inf
    data = Data(values="standardise", image_shape=SHAPE, per_channel=True)
    with pytest.raises(UserError, match="data: 2 numbers are NaN or infinite; repair them"):
        with_units(data, source_of(values), np.arange(50))
    for rule, expected in (("centre", None), ("zero", 0.0)):
        found = with_units(
            dataclasses.replace(data, nonfinite=rule), source_of(values), np.arange(50)
        )
        known = np.where(np.isfinite(values), np.float64(values), np.nan)
        mean = np.nanmean(known, axis=(0, 1, 2))
        np.testing.assert_allclose(found.offset, mean, rtol=1e-7)
        x = scaled(source_of(values), found).read(np.array([1]))
        back = Scaling(found).to_data(x)[0, 2, 3, 0]
        assert back == pytest.approx(mean[0] if expected is None else expected, abs=1e-4)
    assert "2 numbers are NaN or infinite; replaced as data.nonfinite zero says" in caplog.text


def test_values_that_do_not_vary_are_refused(rng):
    values = field(rng)
    values[..., 1] = 7
    for words in ("standardise", "quantiles 0.1 0.9"):
        data = Data(values=words, image_shape=SHAPE, per_channel=True)
        with pytest.raises(UserError, match=r"data\.values: channel 2 is 7 everywhere"):
            with_units(data, source_of(values), np.arange(50))


def test_given_statistics_are_kept(rng):
    data = Data(values="standardise", image_shape=SHAPE, offset=(1.0,), scale=(2.0,))
    found = with_units(data, source_of(field(rng)), np.arange(50))
    assert (found.offset, found.scale) == ((1.0,), (2.0,))


def test_a_scaled_source_can_be_sent_to_another_process(rng):
    data = Data(values="range 270 290", image_shape=SHAPE)
    values = field(rng)[..., :1].repeat(2, -1).clip(270, 290)
    read = scaled(source_of(values), data).read
    sent = pickle.loads(pickle.dumps(dataclasses.replace(read, read=values.__getitem__)))
    np.testing.assert_array_equal(sent(np.arange(3)), read(np.arange(3)))


def test_statistics_do_not_depend_on_the_pieces(rng, monkeypatch):
    values = field(rng)
    data = Data(values="standardise", image_shape=SHAPE)
    whole = with_units(data, source_of(values), np.arange(50))
    monkeypatch.setattr("ddpm_jax.data.survey.BLOCK", 500)
    assert with_units(data, source_of(values), np.arange(50)) == whole
