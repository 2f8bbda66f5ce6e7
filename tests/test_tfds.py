"""Data sets of tfds, read without TensorFlow."""

import dataclasses
import io
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import prepared
import pytest
import tensorflow_datasets as tfds
from conftest import messages
from PIL import Image

from ddpm_jax import UserError
from ddpm_jax.config import Data
from ddpm_jax.data import load_source, open_batches
from ddpm_jax.data import tfds as tfds_source
from ddpm_jax.errors import DataLost

SHAPE = (6, 5, 3)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    prepared.prepare(folder)
    return folder


@pytest.fixture
def data(template, tmp_path):
    """A Data of the prepared set, in a folder of its own."""
    shutil.copytree(template, tmp_path / "tfds")
    return Data(
        source="tfds:own_pictures",
        test="tfds:own_pictures",
        dir=str(tmp_path / "tfds"),
        image_shape=SHAPE,
    )


@pytest.fixture(autouse=True)
def no_tensorflow(monkeypatch):
    """These tests never see it, installed or not."""
    monkeypatch.setattr(sys, "meta_path", [prepared.NoTensorFlow(), *sys.meta_path])


def everything(source):
    return source.read(np.arange(len(source)))


def cache_of(data):
    (file,) = prepared_folder(data).glob("*.npz")
    return file


def prepared_folder(data):
    return Path(data.dir) / "own_pictures/1.0.0"


def test_every_image_is_read_with_its_label(data):
    source = load_source(data)
    images = everything(source)
    assert (
        source.names == [str(i) for i in range(40)]
        and images.dtype == np.uint8
        and not source.streamed
    )
    assert source.class_names == ("0", "1", "2")
    original = prepared.pixels("train")
    keys = [int(np.flatnonzero((original == image).all((1, 2, 3)))[0]) for image in images]
    assert sorted(keys) == list(range(40)) and source.labels.tolist() == [key % 3 for key in keys]


def test_the_names_of_the_classes_number_them(data):
    source = load_source(data)
    turned = load_source(dataclasses.replace(data, class_names=("2", "1", "0", "3")))
    np.testing.assert_array_equal(turned.labels, 2 - source.labels)
    with pytest.raises(UserError, match=r"^data: tfds:own_pictures has images of the class 2, but"):
        load_source(dataclasses.replace(data, class_names=("0", "1")))


def test_test_reads_the_test_split_or_else_validation(data):
    images = everything(load_source(data, test=True))
    assert sorted(map(bytes, images)) == sorted(map(bytes, prepared.pixels("validation")))


def test_images_are_resized_and_cropped_as_those_of_a_folder(data, tmp_path):
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(everything(load_source(data))):
        Image.fromarray(image).save(tmp_path / f"folder/{i:02}.png")
    for shape in [(3, 3, 3), (4, 2, 1)]:
        smaller = dataclasses.replace(data, image_shape=shape)
        folder = load_source(dataclasses.replace(smaller, source=f"folder:{tmp_path}/folder"))
        np.testing.assert_array_equal(everything(load_source(smaller)), everything(folder))


def test_the_cache_is_used_checked_and_done_without(data, monkeypatch, caplog):
    source = load_source(data)
    images, file = everything(source), cache_of(data)
    assert not list(file.parent.glob(".*"))

    written = dict(np.load(file))
    np.savez(file, **{**written, "images": 255 - written["images"]})
    np.testing.assert_array_equal(everything(load_source(data)), 255 - images)  # read, not decoded
    np.savez(
        file, **{**written, "images": 255 - written["images"], "fingerprint": np.array("another")}
    )
    np.testing.assert_array_equal(everything(load_source(data)), images)
    again = load_source(data)
    np.testing.assert_array_equal(everything(again), images)
    np.testing.assert_array_equal(again.labels, source.labels)
    assert again.fingerprint == source.fingerprint and not messages(caplog)

    whole = bytearray(file.read_bytes())
    whole[whole.index(images[20].tobytes())] ^= 1
    for damaged in (whole, whole[: len(whole) // 2], b""):
        file.write_bytes(damaged)
        np.testing.assert_array_equal(everything(load_source(data)), images)
        assert "is damaged and will be written again" in caplog.text
        caplog.clear()

    file.unlink()
    monkeypatch.setattr(np, "savez", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    caplog.set_level("INFO")
    np.testing.assert_array_equal(everything(load_source(data)), images)
    assert "cannot be written" in caplog.text and not list(file.parent.glob("*ddpm_jax*"))


def test_a_large_set_is_the_same_data_and_is_streamed(data):
    small, large = load_source(data), load_source(dataclasses.replace(data, cache_mb=0))
    assert large.streamed and large.fingerprint == small.fingerprint
    some = np.array([7, 0, 39, 7])
    np.testing.assert_array_equal(large.read(some), small.read(some))
    batches = open_batches(large, np.arange(40), 8, 0, dataclasses.replace(data, workers=0))
    np.testing.assert_array_equal(
        batches.batch_at(9).image,
        open_batches(small, np.arange(40), 8, 0, data).batch_at(9).image,
    )
    batches.close()


def test_the_fingerprint_tells_sets_and_shapes_apart_and_not_places(data, tmp_path):
    class OtherPictures(prepared.OwnPictures, skip_registration=True):
        """The same with another image."""

        name = "own_pictures"

        def _generate_examples(self, split):
            for key, example in super()._generate_examples(split):
                yield key, {**example, "image": Image.new("RGB", (5, 6))} if key == 5 else example

    prepared.prepare(tmp_path / "same")
    prepared.prepare(tmp_path / "other", OtherPictures)

    def fingerprint(**changes):
        return load_source(dataclasses.replace(data, **changes)).fingerprint

    assert fingerprint() == fingerprint(dir=str(tmp_path / "same"), cache_mb=0)
    assert (
        len(
            {
                fingerprint(),
                fingerprint(dir=str(tmp_path / "other")),
                fingerprint(image_shape=(4, 4, 3)),
            }
        )
        == 3
    )
    assert load_source(data, test=True).fingerprint != fingerprint()


def test_what_cannot_be_used_is_refused_in_one_line(data, tmp_path):
    def refuse(message, **changes):
        with pytest.raises(UserError, match=message) as error:
            load_source(dataclasses.replace(data, **changes))
        assert "\n" not in str(error.value)

    refuse("tfds has no data set 'cifra10'; did you mean .*cifar10", source="tfds:cifra10")
    refuse("tfds:lsun has no config 'bedrom'; did you mean bedroom", source="tfds:lsun/bedrom")
    refuse("tfds:cifar10:1.0.0 cannot be used .*only: 3", source="tfds:cifar10:1.0.0")
    missing = (
        f"tfds:cifar10 is not prepared in {tmp_path}/cifar10/.*; install TensorFlow to prepare it: "
        "pip install 'ddpm-jax.tfds"
    )
    refuse(missing, source="tfds:cifar10", dir=str(tmp_path))
    refuse("must be 1 .greyscale. or 3 .RGB., got 2", image_shape=(4, 4, 2))
    refuse(
        "image 0 of tfds:own_pictures is 5x6 pixels, smaller than data.image_shape 8x8",
        image_shape=(8, 8, 3),
    )


def test_other_features_and_formats_are_refused(data, tmp_path):
    class NoPictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Numbers."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"x": np.int64})
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield 0, {"x": 1}

    prepared.prepare(tmp_path, NoPictures)
    other = dataclasses.replace(data, source="tfds:no_pictures", dir=str(tmp_path))
    with pytest.raises(
        UserError, match=r"tfds:no_pictures has no feature `image` .* \(its features: x\)"
    ):
        load_source(other)
    with pytest.raises(
        UserError, match=r"tfds:no_pictures has no images in split test or validation .*: train\)"
    ):
        load_source(dataclasses.replace(other, test=other.source), test=True)
    info = prepared_folder(data) / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="was prepared as tfrecord, which only TensorFlow can read"):
        load_source(data)


def test_files_that_vanish_are_named(data):
    for file in prepared_folder(data).glob("*train*"):
        file.unlink()
    with pytest.raises(DataLost, match=r"tfds:own_pictures in .* can no longer be read"):
        load_source(dataclasses.replace(data, cache_mb=0))


def test_a_kept_file_that_lacks_images_or_labels_is_written_again(data, caplog):
    source = load_source(data)
    file = cache_of(data)
    whole = dict(np.load(file))
    for wrong in (
        {"labels": whole["labels"]},
        {"images": whole["images"][:-1]},
        {"images": whole["images"].astype(np.int16)},
        {"images": whole["images"], "labels": whole["labels"][1:]},
    ):
        np.savez(file, fingerprint=whole["fingerprint"], **wrong)
        again = load_source(data)
        np.testing.assert_array_equal(everything(again), everything(source))
        np.testing.assert_array_equal(again.labels, source.labels)
        assert "is damaged and will be written again" in caplog.text
        caplog.clear()


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json"])
def test_a_prepared_folder_that_is_damaged_is_named(data, name):
    (prepared_folder(data) / name).write_bytes(b"")
    with pytest.raises(
        UserError, match=r"tfds:own_pictures cannot be read in .*; restore"
    ) as error:
        load_source(data)
    assert "\n" not in str(error.value) and data.dir in str(error.value)


def test_a_label_beyond_32_bits_is_refused(monkeypatch):
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")

    class Records:
        def __getitems__(self, indices):
            return [{"image": file.getvalue(), "label": np.int64(label)} for label in (7, 2**31)]

    monkeypatch.setattr(tfds_source, "_open", lambda *_: Records())
    read = tfds_source._Reader("tfds:x", "folder", "train", (4, 4, 3), True)
    with pytest.raises(UserError, match="tfds:x has the label 2147483648, which does not fit"):
        read.read([0, 1])


def test_readers_travel_to_other_processes(data, tmp_path, rng):
    (tmp_path / "images").mkdir()
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (4, 4), dtype=np.uint8)).save(
                tmp_path / f"images/{i}.png"
            )
            archive.write(tmp_path / f"images/{i}.png", f"{i}.png")
    for kind in ("folder:{}/images", "folder:{}/images.zip", "tfds:own_pictures"):
        streamed = Data(
            source=kind.format(tmp_path), dir=data.dir, image_shape=(4, 4, 1), cache_mb=0
        )
        source = load_source(streamed)
        some = np.array([2, 0])
        np.testing.assert_array_equal(
            pickle.loads(pickle.dumps(source.read))(some), source.read(some)
        )
