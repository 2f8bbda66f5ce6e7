"""Sources and batches."""

import dataclasses
import io
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from ddpm_jax import UserError
from ddpm_jax.config import Data
from ddpm_jax.data import Batches, from_array, load_source, split
from ddpm_jax.errors import DataLost

SHAPE = (4, 4, 3)


def picture(rng, height=4, width=4, channels=3):
    pixels = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return pixels if channels > 1 else pixels[..., 0]


def folder(path, **options):
    options.setdefault("image_shape", SHAPE)
    return load_source(Data(source=f"folder:{path}", **options))


def only(path, **options):
    """The single image of a folder."""
    source = folder(path, **options)
    assert len(source) == 1
    return source.read(np.array([0]))[0]


@pytest.fixture
def images(tmp_path, rng):
    """Three classes of two PNGs and a text file; returns the pixels by name."""
    pixels = {}
    for name in ("cat", "dog", "eel"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(2):
            pixels[f"{name}/{i}.png"] = picture(rng)
            Image.fromarray(pixels[f"{name}/{i}.png"]).save(tmp_path / "images" / name / f"{i}.png")
    (tmp_path / "images" / "README.txt").write_text("not an image")
    return tmp_path / "images", pixels


def test_the_digits_are_the_real_ones():
    source = load_source(Data(source="digits", image_shape=(8, 8, 1)))
    x = source.read(np.arange(1797))
    assert x.shape == (1797, 8, 8, 1) and x.dtype == np.uint8
    # scikit-learn's load_digits: the first image's first rows, and the count of each digit.
    levels = np.array([[0, 0, 5, 13, 9, 1, 0, 0], [0, 0, 13, 15, 10, 15, 5, 0]])
    np.testing.assert_array_equal(x[0, :2, :, 0], np.round(levels * 255 / 16))
    assert np.bincount(source.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_a_folder_is_read_sorted_with_labels(images):
    path, pixels = images
    source = folder(path)
    assert source.names == sorted(pixels) and source.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for i, name in enumerate(source.names):
        np.testing.assert_array_equal(source.read(np.array([i]))[0], pixels[name])


def test_memory_and_disk_a_folder_and_its_zip_are_the_same_data(images, tmp_path):
    path, _ = images
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for file in path.rglob("*.*"):
            archive.write(file, file.relative_to(path))
        archive.writestr("__MACOSX/cat/._0.png", b"junk")
    cached, streamed, zipped = (
        folder(path),
        folder(path, cache_mb=0),
        folder(tmp_path / "images.zip", cache_mb=0),
    )
    assert cached.fingerprint == streamed.fingerprint == zipped.fingerprint
    some = np.array([5, 0, 0, 3])
    np.testing.assert_array_equal(cached.read(some), streamed.read(some))
    np.testing.assert_array_equal(cached.read(some), zipped.read(some))


def test_the_fingerprint_sees_every_change(images):
    path, _ = images
    before = folder(path).fingerprint
    assert folder(path, image_shape=(2, 2, 3)).fingerprint != before
    (path / "cat/0.png").rename(path / "cat/7.png")
    renamed = folder(path).fingerprint
    Image.new("RGB", (4, 4)).save(path / "cat/7.png")
    assert len({before, renamed, folder(path).fingerprint}) == 3


def test_a_file_that_does_not_decode_is_named_and_left_out(images, caplog):
    path, _ = images
    (path / "dog/bad.png").write_bytes(b"\x89PNG not really")
    whole = (path / "dog/1.png").read_bytes()
    (path / "dog/1.png").write_bytes(whole[: len(whole) // 2])
    source = folder(path)
    assert len(source) == 5 and "dog/1.png" not in source.names
    assert (
        "skipped 2 files" in caplog.text
        and "dog/bad.png" in caplog.text
        and "dog/1.png" in caplog.text
    )


def test_every_kind_of_pixel_becomes_rgb_or_grey(tmp_path, rng):
    file = tmp_path / "x.png"
    grey = picture(rng, channels=1)
    Image.fromarray(grey).save(file)
    np.testing.assert_array_equal(only(tmp_path), np.repeat(grey[..., None], 3, axis=2))
    np.testing.assert_array_equal(only(tmp_path, image_shape=(4, 4, 1))[..., 0], grey)

    Image.fromarray((grey.astype(np.uint16) << 8) + 255).save(file)  # 16 bits: scaled, not clipped
    np.testing.assert_array_equal(only(tmp_path, image_shape=(4, 4, 1))[..., 0], grey)

    rgba = picture(rng, channels=4)
    rgba[0, 0, 3], rgba[1, 1, 3] = 0, 255
    Image.fromarray(rgba).save(file)
    assert only(tmp_path)[0, 0].tolist() == [255] * 3  # transparent: over white
    np.testing.assert_array_equal(only(tmp_path)[1, 1], rgba[1, 1, :3])

    palette = Image.fromarray(picture(rng)).quantize(8)
    palette.save(file)
    np.testing.assert_array_equal(only(tmp_path), np.asarray(palette.convert("RGB")))

    palette.save(file, transparency=palette.getpixel((0, 0)))
    assert only(tmp_path)[0, 0].tolist() == [255] * 3


def test_images_are_turned_resized_to_cover_and_cropped_in_the_centre(tmp_path, rng):
    wide = Image.fromarray(picture(rng, 8, 24))
    wide.save(tmp_path / "x.png")
    by_hand = wide.resize((12, 4), Image.Resampling.BICUBIC).crop((4, 0, 8, 4))
    np.testing.assert_allclose(np.float32(only(tmp_path)), np.asarray(by_hand), atol=1)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn it clockwise
    lying = picture(rng)
    Image.fromarray(lying).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(only(tmp_path), np.rot90(lying, k=-1))


def bomb(side=70_000):
    """A PNG of 70,000 x 70,000 pixels in a hundred bytes."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def test_bad_folders_are_refused_in_one_line(tmp_path, images):
    def refuse(path, message, **options):
        with pytest.raises(UserError, match=message) as error:
            folder(path, **options)
        assert "\n" not in str(error.value)

    path, _ = images
    too_small = "cat/0.png is 4x4 pixels, smaller than data.image_shape 8x8"
    refuse(path, too_small, image_shape=(8, 8, 3))
    refuse(path, "must be 1 .greyscale. or 3 .RGB., got 2", image_shape=(4, 4, 2))
    (path / "cat/a.png").write_bytes(bomb())
    refuse(path, r"cat/a.png .*too .*70000|cat/a.png is too large to decode safely")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "no images found in")
    refuse(tmp_path / "absent", "absent does not exist")
    (tmp_path / "file").write_text("x")
    refuse(tmp_path / "file", "neither a folder nor a zip")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.jpg").write_text("x")
    refuse(tmp_path / "bad", "none of the 1 image files")


def test_large_but_not_huge_images_warn_in_pillow_and_are_refused_here(tmp_path, monkeypatch):
    Image.new("L", (20, 20)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with pytest.raises(UserError, match="has 20x20 pixels, too many"):
        folder(tmp_path)


def test_an_npz_is_read(tmp_path, rng):
    pixels = rng.integers(0, 256, (5, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=pixels, labels=np.arange(5))
    source = load_source(Data(source=f"npz:{tmp_path}/x.npz", image_shape=(4, 4, 1)))
    np.testing.assert_array_equal(source.read(np.array([3]))[0, ..., 0], pixels[3])
    assert source.labels.tolist() == [0, 1, 2, 3, 4]
    other = from_array(pixels, (4, 4, 1), [0, 1, 2, 3, 3])
    assert (
        other.fingerprint
        != source.fingerprint
        == from_array(pixels, (4, 4, 1), range(5)).fingerprint
    )


def test_bad_npz_files_are_refused_in_one_line(tmp_path):
    def refuse(message, **arrays):
        np.savez(tmp_path / "x.npz", **arrays)
        with pytest.raises(UserError, match=message):
            load_source(Data(source=f"npz:{tmp_path}/x.npz", image_shape=SHAPE))

    good = np.zeros((2, *SHAPE), np.uint8)
    refuse("no array named images, only pictures", pictures=good)
    refuse("images must be uint8 .*, got float32", images=good.astype(np.float32))
    refuse("pass --data.image-shape 4 4 1", images=good[..., 0])
    refuse("no images found", images=good[:0])
    refuse("labels must be 2 integers", images=good, labels=np.zeros(3, int))
    refuse(
        "not an npz file of plain arrays", images=np.array([{"a": 1}, None])
    )  # would need pickle
    with pytest.raises(UserError, match="cannot read"):
        load_source(Data(source="npz:/nowhere.npz"))
    (tmp_path / "x.npz").write_text("x")
    with pytest.raises(UserError, match="not an npz file"):
        load_source(Data(source=f"npz:{tmp_path}/x.npz"))


def numbered(n):
    """Images whose pixels tell their index."""
    return from_array(
        np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 1, 1, 1)), (1, 1, 1)
    )


def test_batches_are_a_function_of_seed_and_step():
    source = numbered(50)
    indices = np.arange(5, 45)
    batches = Batches(source, indices, 8, seed=3)
    stream = [batches.batch_at(step).image.ravel() for step in range(15)]
    for step in (14, 2, 7):
        np.testing.assert_array_equal(
            Batches(source, indices, 8, seed=3).batch_at(step).image.ravel(), stream[step]
        )
    epochs = np.concatenate(stream).reshape(3, 40)
    for epoch in epochs:
        assert sorted(epoch) == indices.tolist()
    assert not (epochs[0] == epochs[1]).all()
    assert not (Batches(source, indices, 8, seed=4).batch_at(0).image.ravel() == stream[0]).all()


def test_no_image_is_lost_where_epochs_meet_in_a_batch():
    batches = Batches(numbered(7), np.arange(7), 5, seed=0)
    stream = np.concatenate([batches.batch_at(step).image.ravel() for step in range(7)])
    assert all(sorted(epoch) == list(range(7)) for epoch in stream.reshape(5, 7))
    assert Batches(numbered(2), np.arange(2), 5, seed=0).batch_at(0).image.shape == (5, 1, 1, 1)


def test_labels_travel_with_their_images():
    source = from_array(
        np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1), (1, 1, 1), np.arange(20)
    )
    batch = Batches(source, np.arange(20), 6, seed=0).batch_at(1)
    assert batch.label.dtype == np.int32
    np.testing.assert_array_equal(batch.image.ravel(), batch.label)
    assert Batches(numbered(3), np.arange(3), 2, seed=0).batch_at(0).label is None


def test_the_holdout_is_a_fixed_tenth():
    train, held_out = split(numbered(200), 0.1)
    assert sorted([*train, *held_out]) == list(range(200)) and 10 < len(held_out) < 32
    fewer = split(numbered(100), 0.1)[1]
    np.testing.assert_array_equal(fewer, held_out[held_out < 100])  # an image keeps its side
    assert len(split(numbered(50), 0.0)[1]) == 0
    with pytest.raises(UserError, match="leaves none to train on"):
        split(dataclasses.replace(numbered(1), names=[source_name_held_out()]), 0.9)


def source_name_held_out():
    names = [str(i) for i in range(20)]
    return names[split(dataclasses.replace(numbered(20), names=names), 0.9)[1][0]]


def test_a_file_lost_while_reading_from_disk_is_named(images):
    path, _ = images
    source = folder(path, cache_mb=0)
    (path / "dog/0.png").unlink()
    with pytest.raises(DataLost, match=r"dog/0.png can no longer be read"):
        source.read(np.array([0, 2]))
    Image.new("RGB", (4, 4)).save(path / "cat/0.png")
    with pytest.raises(DataLost, match=r"cat/0.png has changed since the start"):
        source.read(np.array([0]))


def test_the_label_is_the_innermost_folder_and_links_are_followed(images, tmp_path, rng):
    path, _ = images
    for name in ("train/dog", "train/cat", "test/dog"):
        (tmp_path / "nested" / name).mkdir(parents=True)
        Image.fromarray(picture(rng)).save(tmp_path / "nested" / name / "0.png")
    (tmp_path / "nested/train/eel").symlink_to(path / "eel")
    (tmp_path / "nested/train/loop").symlink_to(tmp_path / "nested")
    source = folder(tmp_path / "nested")
    assert source.names == [
        "test/dog/0.png",
        "train/cat/0.png",
        "train/dog/0.png",
        *(f"train/eel/{i}.png" for i in "01"),
    ]
    assert source.labels.tolist() == [1, 0, 1, 2, 2]


def test_postscript_is_never_run(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "EPS")
    (tmp_path / "a.eps").write_bytes(file.getvalue())
    (tmp_path / "b.png").write_bytes(file.getvalue())
    with pytest.raises(UserError, match="none of the 1 image files"):
        folder(tmp_path)
