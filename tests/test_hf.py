"""Data sets of the datasets library: saved ones and parquet, without the network."""

import dataclasses
import importlib.util
import io
import pickle
import re
import shutil
import socket
import typing

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.config import Data
from ddpm_jax.config.choices import DataDtype
from ddpm_jax.config.values import parse_values
from ddpm_jax.data import from_array, load_source, open_batches
from ddpm_jax.data.decode import decode
from ddpm_jax.errors import DataLost, UserError

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        importlib.util.find_spec("datasets") is None,
        reason="datasets is not installed: scripts/test_interop.sh does that",
    ),
]
if importlib.util.find_spec("datasets"):
    import datasets
    from datasets import Array2D, Array3D, ClassLabel, Features, List, Value

N, SHAPE = 12, (4, 6, 3)


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No network, a cache of its own, no bars."""

    def refused(*_, **__):
        raise AssertionError("the network is used")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def pixels(rng):
    return rng.integers(0, 256, (N, *SHAPE), dtype=np.uint8)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def pictures(pixels, **columns):
    """A data set of pictures with labels that have names."""
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=["cat", "dog"])})
    rows = {"image": [Image.fromarray(each) for each in pixels], "label": [0, 1] * (N // 2)}
    return datasets.Dataset.from_dict(rows, features=features)


def loaded(path, shape=SHAPE, values="uint8", test=False, **options):
    data = Data(source=f"hf:{path}", test=f"hf:{path}", image_shape=shape, values=values, **options)
    return load_source(data, test)


def refusal(dataset, path, **options):
    dataset.save_to_disk(path)
    with pytest.raises(UserError) as error:
        loaded(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("cache_mb", [0, 1])
def test_saved_pictures_and_those_of_parquet_are_the_same(tmp_path, pixels, cache_mb):
    saved = pictures(pixels)
    both = datasets.DatasetDict({"train": saved, "test": saved.select([3, 4])})
    both.save_to_disk(tmp_path / "saved")
    (tmp_path / "files [1]/data").mkdir(parents=True)
    for split, rows in both.items():
        half = len(rows) // 2
        for i, part in enumerate((rows.select(range(half)), rows.select(range(half, len(rows))))):
            part.to_parquet(tmp_path / f"files [1]/data/{split}-0000{i}-of-00002.parquet")
    first = loaded(tmp_path / "saved")
    for place in (tmp_path / "saved", tmp_path / "files [1]"):
        source = loaded(place, cache_mb=cache_mb)
        assert source.streamed == (cache_mb == 0) and source.beside == tmp_path
        for some in (np.arange(N), np.array([7, 0, 7]), np.array([], int)):
            np.testing.assert_array_equal(source.read(some), pixels[some])
        assert source.labels.tolist() == [0, 1] * (N // 2)
        assert source.class_names == ("cat", "dog") and source.dtype == np.uint8
        assert source.fingerprint == first.fingerprint
        np.testing.assert_array_equal(source.marks(), first.marks())
        other = loaded(place, test=True, cache_mb=cache_mb)
        np.testing.assert_array_equal(other.read(np.arange(2)), pixels[3:5])
    np.testing.assert_array_equal(loaded(tmp_path / "saved/test").read(np.arange(2)), pixels[3:5])
    turned = loaded(tmp_path / "saved", class_names=("dog", "cat"))
    assert turned.labels.tolist() == [1, 0] * (N // 2)


def test_pictures_are_decoded_as_those_of_a_folder(tmp_path, rng):
    files = [png(rng.integers(0, 256, (9, 8 + i, 3), dtype=np.uint8)) for i in range(N)]
    expected = [decode(file, SHAPE, "x.png") for file in files]
    for name, rows in (
        ("img", [{"bytes": file, "path": None} for file in files]),
        ("anything", files),
    ):
        datasets.Dataset.from_dict({name: rows, "id": list(range(N))}).save_to_disk(tmp_path / name)
        source = loaded(tmp_path / name)
        np.testing.assert_array_equal(source.read(np.arange(N)), expected)
        assert source.labels is None and source.class_names is None


@pytest.mark.parametrize("dtype", typing.get_args(DataDtype))
def test_arrays_keep_their_numbers(tmp_path, rng, dtype):
    x = (rng.normal(size=(N, *SHAPE)) * 50).astype(dtype)
    vectors = rng.normal(size=(N, 2)).astype(np.float32)
    features = Features(
        {
            "field": Array3D(SHAPE, dtype),
            "labels": Value("int16"),
            "conditions": List(Value("float32")),
        }
    )
    rows = {"field": list(x), "labels": list(range(N)), "conditions": list(vectors)}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "train.parquet")
    array = from_array(x, SHAPE, range(N), values=parse_values("standardise"), conditions=vectors)
    for place in (tmp_path / "saved", tmp_path / "train.parquet"):
        for cache_mb in (0, 1):
            source = loaded(place, values="standardise", cache_mb=cache_mb)
            assert source.dtype == source.read(np.array([1])).dtype == x.dtype
            np.testing.assert_array_equal(source.read(np.array([5, 2, 5])), x[[5, 2, 5]])
            np.testing.assert_array_equal(source.conditions, vectors)
            assert source.labels.tolist() == list(range(N))
            assert source.fingerprint == array.fingerprint  # As of an npz file.


def test_deep_pictures_stay_deep(tmp_path, rng):
    grey = rng.integers(0, 65536, (N, 4, 6), dtype=np.uint16)
    files = [png(each) for each in grey]
    datasets.Dataset.from_dict({"image": files}).save_to_disk(tmp_path / "x")
    prints = set()
    for values, expected in (
        ("uint8", np.uint8(grey >> 8)),
        ("uint16", grey),
        ("range 0 65535", grey.astype(np.float32)),
    ):
        for cache_mb in (0, 1):
            source = loaded(tmp_path / "x", shape=(4, 6, 1), values=values, cache_mb=cache_mb)
            read = source.read(np.arange(N))[..., 0]
            assert read.dtype == source.dtype == expected.dtype
            np.testing.assert_array_equal(read, expected)
            prints.add(source.fingerprint)
    assert len(prints) == 3


def test_greys_and_nested_lists_are_arrays(tmp_path, rng):
    x = rng.normal(size=(N, 4, 6)).astype(np.float32)
    rows = {"x": x.tolist()}
    for number, features in enumerate((None, Features({"x": Array2D((4, 6), "float32")}))):
        dataset = datasets.Dataset.from_dict(rows, features=features)
        dataset.save_to_disk(tmp_path / str(number))
        source = loaded(tmp_path / str(number), shape=(4, 6, 1), values="range -9 9")
        np.testing.assert_array_equal(source.read(np.arange(N))[..., 0], x)


def test_streamed_batches_are_those_in_memory_also_of_other_processes(tmp_path, pixels):
    pictures(pixels).save_to_disk(tmp_path / "x")
    kept, streamed = (loaded(tmp_path / "x", cache_mb=mb) for mb in (1, 0))
    sent = pickle.dumps(dataclasses.replace(streamed, names=[], marks=None))
    assert len(sent) < 3000
    np.testing.assert_array_equal(pickle.loads(sent).read(np.arange(N)), pixels)
    data = Data(workers=0)
    stream = open_batches(streamed, np.arange(N), 5, 0, data)
    for step in range(4):
        expected = open_batches(kept, np.arange(N), 5, 0, data).batch_at(step)
        np.testing.assert_array_equal(stream.batch_at(step).image, expected.image)
    stream.close()


def test_what_changes_or_goes_is_lost_data(tmp_path, pixels):
    from ddpm_jax.data import hf

    def lost(words):
        hf._open.cache_clear()  # As in a process that has not opened it.
        with pytest.raises(DataLost) as error:
            source.read(np.arange(3))
        assert re.search(words, str(error.value)) and "\n" not in str(error.value)

    pictures(pixels).save_to_disk(tmp_path / "x")
    source = loaded(tmp_path / "x", cache_mb=0)
    shutil.rmtree(tmp_path / "x")
    lost("can no longer be read .* then run the same command again")
    pictures(255 - pixels).save_to_disk(tmp_path / "x")
    lost("image 0 of hf:.* has changed since the start")
    np.testing.assert_array_equal(loaded(tmp_path / "x").read(np.arange(N)), 255 - pixels)


def test_parquet_that_was_written_anew_is_read_anew(tmp_path, pixels):
    for x in (pixels, 255 - pixels):
        pictures(x).to_parquet(tmp_path / "x.parquet")
        np.testing.assert_array_equal(loaded(tmp_path / "x.parquet").read(np.arange(N)), x)


def test_columns_that_cannot_be_used_are_named(tmp_path, pixels, rng):
    of = datasets.Dataset.from_dict
    image = list(map(png, pixels))
    x = rng.normal(size=(N, *SHAPE)).astype(np.float32)

    def said(words, path, rows, features=None, **options):
        line = refusal(of(rows, features=features), tmp_path / path, **options)
        assert words in line, line

    said("no column of images (its columns: a, label)", "a", {"a": [1] * N, "label": [1] * N})
    said("several columns of images (its columns: a, b)", "b", {"a": image, "b": image})
    said("class_encode_column('label')", "c", {"image": image, "label": ["x"] * N})
    said("column label of", "d", {"image": image, "label": [None] + [1] * (N - 1)})
    said("label 4294967296 of image 0", "e", {"image": image, "label": [2**32] * N})
    said("cast_column('x', datasets.Array3D((4, 6, 3), 'uint8'))", "f", {"x": pixels.tolist()})
    said(
        "--data.values range LOW HIGH",
        "g",
        {"x": list(x)},
        Features({"x": Array3D(SHAPE, "float32")}),
    )
    said(
        "pass --data.image-shape 4 6 3",
        "h",
        {"x": x.tolist()},
        shape=(8, 8, 3),
        values="standardise",
    )
    said(
        "are not all [4, 6, 3]",
        "i",
        {"x": [*x[1:].tolist(), x[0, :2].tolist()]},
        values="standardise",
    )
    said("image 3 of hf:", "j", {"image": [*image[:3], b"GIF89a", *image[4:]]})
    said("smaller than data.image_shape", "k", {"image": image}, shape=(8, 8, 3))
    said("channels must be 1 (greyscale) or 3", "l", {"image": image}, shape=(4, 4, 5))
    said("image 0 of hf:", "n", {"image": [None] + image[1:]})
    said("conditions must be", "p", {"image": image, "conditions": [1.0] * N})
    said("of image 1,", "q", {"image": image, "conditions": [[1.0], [np.inf]] + [[1.0]] * (N - 2)})
    said(
        "are not all [1]",
        "r",
        {"image": image, "conditions": [[1.0], [1.0, 2.0]] + [[1.0]] * (N - 2)},
    )


def test_a_damaged_data_set_is_refused_in_one_line(tmp_path, pixels):
    pictures(pixels).save_to_disk(tmp_path / "x")
    (file,) = (tmp_path / "x").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:100])
    for damage in ("arrow", "json", "parquet"):
        if damage == "json":
            (tmp_path / "x/state.json").write_text("{")
        if damage == "parquet":
            shutil.rmtree(tmp_path / "x")
            (tmp_path / "x").mkdir()
            (tmp_path / "x/x.parquet").write_bytes(b"PAR1" + bytes(50))
        with pytest.raises(UserError) as error:
            loaded(tmp_path / "x")
        assert "\n" not in str(error.value) and "cannot be read" in str(error.value)
