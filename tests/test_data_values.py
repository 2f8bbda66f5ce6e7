"""Arrays of other numbers than 8-bit levels, and vectors beside them."""

import hashlib
import re
import typing
from pathlib import Path

import numpy as np
import pytest

from ddpm_jax import UserError
from ddpm_jax.config import Data, places
from ddpm_jax.config.choices import DataDtype
from ddpm_jax.config.values import parse_values
from ddpm_jax.data import from_array, load_source

DTYPES = typing.get_args(DataDtype)
SHAPE = (2, 4, 5)


def array(dtype, n=6, shape=SHAPE):
    return (np.random.default_rng(0).normal(size=(n, *shape)) * 50).astype(dtype)


def refusal(images, values, image_shape=SHAPE, **beside):
    with pytest.raises(UserError) as error:
        from_array(images, image_shape, values=parse_values(values), **beside)
    assert "\n" not in str(error.value)
    return str(error.value)


def npz(path, values, shape=SHAPE, **arrays):
    np.savez(path, **arrays)
    return load_source(Data(source=f"npz:{path}", image_shape=shape, values=values))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_of_number_is_read_as_it_is(tmp_path, dtype, order):
    x = array(dtype)
    stored = x.astype(x.dtype.newbyteorder(order))
    given = from_array(stored, SHAPE, range(6), values=parse_values("standardise"))
    read = npz(tmp_path / "x.npz", "standardise", images=stored, labels=np.arange(6))
    places = np.array([4, 0])
    for source in (given, read):
        assert source.dtype == source.read(places).dtype == x.dtype and source.dtype.isnative
        np.testing.assert_array_equal(source.read(places), x[places])
        assert source.fingerprint == given.fingerprint
        np.testing.assert_array_equal(source.marks(), given.marks())


def test_the_fingerprint_of_8_bit_images_is_that_of_older_versions_and_others_name_their_dtype():
    x = array("uint8")
    old = hashlib.blake2b(b"(6, 2, 4, 5)", digest_size=16)
    old.update(x.tobytes())
    for values in ("uint8", "range 0 255", "standardise"):
        assert from_array(x, SHAPE, values=parse_values(values)).fingerprint == old.hexdigest()
    values = parse_values("standardise")
    zeros = [from_array(np.zeros((6, *SHAPE), dtype), SHAPE, values=values) for dtype in DTYPES]
    assert len({source.fingerprint for source in zeros}) == len(DTYPES)


def test_any_number_of_channels_is_taken_where_the_shape_says_so():
    values = parse_values("range -1 1")
    for shape in ((128, 128, 5), (64, 64, 13), (1, 64, 13), (3, 16, 16), (8, 8, 1), (1, 1, 300)):
        for n in (1, 3, 6):
            assert len(from_array(np.zeros((n, *shape), np.float32), shape, values=values)) == n
    flat = from_array(np.zeros((6, 8, 9), np.float16), (8, 9, 1), values=values)
    assert flat.read(np.arange(2)).shape == (2, 8, 9, 1)
    line = refusal(np.zeros((6, 5, 16, 16), np.float32), "standardise", (16, 16, 5))
    assert "[N, C, H, W] [6, 5, 16, 16]; give x.transpose(0, 2, 3, 1), [N, H, W, C]" in line
    line = refusal(np.zeros((6, 16, 16, 13), np.float32), "standardise", (16, 16, 5))
    assert "pass --data.image-shape 16 16 13" in line


@pytest.mark.parametrize(
    ("dtype", "values", "words"),
    [
        ("float32", "uint8", "--data.values range LOW HIGH, quantiles LOW HIGH or standardise"),
        ("int16", "uint8", "--data.values range LOW HIGH, quantiles LOW HIGH or standardise"),
        ("bool", "uint8", "--data.values range 0 1"),
        ("uint16", "uint8", "--data.values uint16"),
        (">u2", "uint8", "got uint16"),
        (
            "int64",
            "uint8",
            "x.astype('uint8') if they are in [0, 255], or with x.astype('float32')",
        ),
        ("complex64", "uint8", "give the real and imaginary parts as channels"),
        ("uint8", "uint16", "--data.values uint8"),
        ("float64", "uint16", "(x * 65535).round().astype('uint16') if they are in [0, 1], or"),
        ("int32", "uint16", "x.astype('uint16') if they are in [0, 65535]"),
        ("bool", "uint16", "--data.values range 0 1"),
        ("int32", "range 0 9", "float16 or float32 or float64 [N, H, W, C], got int32"),
        ("uint64", "standardise", "convert them with x.astype('float32')"),
        ("complex128", "standardise", "real and imaginary parts as channels"),
        ("longdouble", "standardise", "convert them with x.astype('float32')"),
        ("object", "standardise", "give an array of numbers"),
        ("U3", "range 0 1", "give an array of numbers"),
        ("datetime64[s]", "quantiles 0 1", "give an array of numbers"),
    ],
)
def test_other_numbers_are_told_what_would_take_them(dtype, values, words):
    assert words in refusal(np.zeros((6, *SHAPE)).astype(dtype), values)


def test_a_source_of_other_numbers_than_the_config_says_is_refused():
    with pytest.raises(UserError, match=r"images must be uint16 .*--data.values uint8"):
        load_source(Data(source="digits", image_shape=(8, 8, 1), values="uint16"))
    digits = load_source(Data(source="digits", image_shape=(8, 8, 1), values="range 0 255"))
    assert digits.dtype == np.uint8


def test_dark_images_are_warned_of_wherever_they_are(tmp_path, caplog):
    dark = np.arange(6, dtype=np.uint16).reshape(6, 1, 1, 1) * 800
    for values, x, words in (
        ("uint16", dark, "a level above 4000 of 65535, .* --data.values range 0 4095"),
        ("uint16", dark + 100, None),
        ("range 0 9999", dark, None),
        ("uint8", np.uint8(dark > 0), "a level above 1 of 255"),
    ):
        np.save(tmp_path / "x.npy", x)
        for read in (
            lambda x=x, values=values: from_array(x, (1, 1, 1), values=parse_values(values)),
            lambda values=values: load_source(
                Data(source=f"npy:{tmp_path}/x.npy", image_shape=(1, 1, 1), values=values)
            ),
        ):
            caplog.clear()
            read()
            assert bool(caplog.text) == (words is not None)
            assert words is None or re.search(words, caplog.text)


def test_vectors_travel_with_their_images(tmp_path):
    x = array("float32")
    vectors = np.random.default_rng(1).normal(size=(6, 3))
    values = parse_values("standardise")
    source = from_array(x, SHAPE, values=values, conditions=vectors)
    assert source.conditions.dtype == np.float32
    np.testing.assert_array_equal(source.conditions, vectors.astype(np.float32))
    read = npz(tmp_path / "x.npz", "standardise", images=x, conditions=vectors)
    np.testing.assert_array_equal(read.conditions, source.conditions)
    assert read.fingerprint == source.fingerprint
    bare = from_array(x, SHAPE, values=values)
    assert bare.conditions is None and bare.fingerprint != source.fingerprint
    vectors[4, 1] += 1
    other = from_array(x, SHAPE, values=values, conditions=vectors)
    assert other.fingerprint != source.fingerprint
    assert (other.marks() != source.marks()).tolist() == [False] * 4 + [True, False]
    assert from_array(x, SHAPE, values=values, conditions=x[:, 0, 0] > 0).conditions.max() == 1


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        (np.zeros(6), "give conditions[:, None]"),
        (np.zeros((5, 2)), "conditions must be numbers [6, D], a vector per image, got float64"),
        (np.zeros((6, 0)), "conditions must be numbers [6, D]"),
        (np.zeros((6, 2, 1)), "conditions must be numbers [6, D]"),
        (np.full((6, 2), "a"), "conditions must be numbers [6, D]"),
        (np.zeros((6, 2), complex), "conditions must be numbers [6, D]"),
        ([[1.0], [2.0, 3.0]], "conditions must be 6 vectors of one length"),
        ([[0]] * 4 + [[np.nan], [np.inf]], "conditions of image 4, and of 1 more, are NaN"),
        ([[1e39]] * 6, "too large for float32"),
    ],
)
def test_vectors_that_cannot_be_used_are_refused(conditions, words):
    assert words in refusal(array("uint8"), "uint8", conditions=conditions)


def test_the_kinds_of_sources_stand_in_the_help_of_the_config():
    """Messages and the other helps derive them; a field's help is written out."""
    fields = (Path(places.__file__).parent / "fields.py").read_text()
    words = fields.partition('source: Annotated[str, PLACE] = "digits"\n')[2].partition('"""\n')[0]
    for name in places.METAVAR.split("|"):
        assert name in words
