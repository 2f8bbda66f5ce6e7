"""Arrays of images and labels: right, or refused with what would make them right."""

import re
import struct
import warnings
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import UserError
from ddpm_jax.calls.inputs import checked_images
from ddpm_jax.config import Data
from ddpm_jax.data import from_array, load_source
from ddpm_jax.data.images import to_float


def refusal(images, image_shape, labels=None):
    """The one line that refuses the array."""
    with pytest.raises(UserError) as error:
        from_array(images, image_shape, labels)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("height_width", [(8, 8), (6, 9)])
def test_images_of_other_libraries_are_told_their_transposition(channels, height_width, rng):
    image_shape = (*height_width, channels)
    x = rng.integers(0, 256, (5, *image_shape), dtype=np.uint8)
    before = from_array(x, image_shape).fingerprint
    for axes in ((0, 3, 1, 2), (1, 2, 3, 0), (3, 1, 2, 0)):
        foreign = x.transpose(axes)
        # The shape that the old remedy named, and the default one.
        for wanted in (image_shape, foreign.shape[1:], (32, 32, 3)):
            if wanted == foreign.shape[1:] and (axes != (0, 3, 1, 2) or channels in (2, 4)):
                continue  # It was meant to be so.
            line = refusal(foreign, wanted)
            back = re.search(r"give x.transpose(\(.*?\))", line)
            turned = foreign.transpose([int(i) for i in back[1].strip("()").split(",")])
            assert from_array(turned, image_shape).fingerprint == before
            named = f"--data.image-shape {' '.join(map(str, image_shape))}"
            assert (named in line) == (wanted != image_shape)


def test_shapes_that_only_look_so_are_taken():
    for shape in ((5, 1, 1, 1), (5, 3, 4, 3), (5, 8, 8, 8), (5, 1, 16, 2), (5, 2, 9, 9)):
        assert len(from_array(np.zeros(shape, np.uint8), shape[1:])) == 5


def test_other_mistakes_are_told_what_to_do():
    x = np.zeros((5, 4, 4, 3), np.uint8)
    assert "one image [4, 4, 3]; give x[None]" in refusal(x[0], (4, 4, 3))
    assert "reshape them" in refusal(x.reshape(5, 48), (4, 4, 3))
    assert "x.astype('uint8') * 255" in refusal(x > 1, (4, 4, 3))
    assert "(x * 255).round()" in refusal(x / 255, (4, 4, 3))
    assert "(x >> 8)" in refusal(x.astype(np.uint16), (4, 4, 3))
    assert "all of one size" in refusal([x[0], x[0, :2]], (4, 4, 3))


def test_black_images_of_a_lost_scale_are_warned_of(caplog):
    from_array(np.arange(5, dtype=np.uint8).reshape(5, 1, 1), (1, 1, 1))
    assert not caplog.text
    from_array(np.float32([0.1, 1, 0, 0.5]).astype(np.uint8).reshape(4, 1, 1), (1, 1, 1))
    assert "no image has a level above 1 of 255" in caplog.text


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.int8, np.int32, np.uint8])
def test_labels_keep_their_value(dtype):
    x = np.zeros((3, 1, 1), np.uint8)
    most = min(int(np.iinfo(dtype).max), 2**31 - 1)
    least = max(int(np.iinfo(dtype).min), -(2**31))
    labels = [most, 0, least]
    assert from_array(x, (1, 1, 1), np.array(labels, dtype)).labels.tolist() == labels


def test_labels_that_do_not_fit_are_refused():
    x = np.zeros((3, 1, 1), np.uint8)
    for labels, named in (
        ([0, 2**31, 1], "label 2147483648 of image 1"),
        (np.array([0, 1, -(2**31) - 1]), "label -2147483649 of image 2"),
        (np.array([2**63, 1, 1], np.uint64), "label 9223372036854775808 of image 0"),
        ([0.0, 1.0, 2.0], "labels must be 3 integers"),
        (["a", "b", "c"], "labels must be 3 integers"),
        ([0, 1, 2**70], "labels must be 3 integers"),
        ([[0], [1], [2]], "labels must be 3 integers"),
        ([[0], [1, 1], [2]], "labels must be 3 integers"),
    ):
        assert named in refusal(x, (1, 1, 1), labels)


def test_floats_of_another_range_are_warned_of(rng):
    def look_at(x_0):
        checked_images("x_0", x_0, (8, 8, 3))

    levels = rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    for wrong, named in ((levels / np.float32(255), "x_0 is in [0"), (levels * 1.0, ", 25")):
        with pytest.warns(UserWarning, match=re.escape("in [-1, 1]; use 2 * x - 1")) as told:
            look_at(wrong)
        assert named in str(told[0].message)
    # Inside jit, arrays are looked at as well, and what is traced is not.
    array = jnp.float32(levels)
    with pytest.warns(UserWarning, match="x_0 is in"):
        jax.jit(lambda: look_at(array))()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(look_at)(array)
        look_at(to_float(levels))
        look_at(np.ones((1, 8, 8, 3), np.float32))


def npy(shape, descr="|u1", pixels=b""):
    """An array's file that claims `shape`."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + pixels


def refused_npz(path):
    with pytest.raises(UserError) as error:
        load_source(Data(source=f"npz:{path}", image_shape=(4, 4, 3)))
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (npy((2**40, 4, 4, 3), pixels=bytes(96)), "the file is too short"),
        (npy((10**30, 4, 4, 3)), "the file is too short"),
        (npy((3, 4, 4, 3), pixels=bytes(96)), "the file is too short"),
        (npy((2, 4, 4, 3), descr="|O", pixels=bytes(96)), "Python objects"),
        (npy((-2, 4, 4, 3)), "its shape is"),
        (b"\x93NUMPY\2\0" + struct.pack("<I", 2**32 - 1) + bytes(99), "too long"),
        (b"\x93NUMPY\1\0" + struct.pack("<H", 9_999) + b"(" * 9_999, "too long"),
        (b"\x93NUMPY\1\0" + struct.pack("<H", 999) + b"-" * 999, "images: "),
        (b"\x93NUMPY\1\0", "cut short"),
        (b"\x93NUM", "does not begin as"),
        (b"", "does not begin as"),
    ],
    ids=list("0123456789a"),
)
def test_no_memory_is_taken_for_what_a_header_claims(tmp_path, method, content, words):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", method) as archive:
        archive.writestr("images.npy", content)
    assert words in refused_npz(tmp_path / "x.npz")


def test_other_compression_than_numpys_is_refused(tmp_path):
    """LZMA would take as much memory as the file declares."""
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("images.npy", npy((2, 4, 4, 3), pixels=bytes(96)))
    assert "not compressed as numpy.savez does" in refused_npz(tmp_path / "x.npz")


def test_a_length_that_the_archive_claims_is_not_believed(tmp_path):
    """Both lengths are changed to 2^31 in the zip's directory, at its end."""
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("images.npy", npy((2**31 // 48, 4, 4, 3), pixels=bytes(96)))
    whole = bytearray((tmp_path / "x.npz").read_bytes())
    at = whole.index(b"PK\1\2")
    whole[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
    (tmp_path / "x.npz").write_bytes(whole)
    said = refused_npz(tmp_path / "x.npz")
    # Newer Pythons find it first.
    assert "the file is too short" in said or "Overlapped entries" in said


def test_more_than_the_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "x.npz", images=np.zeros((2, 4, 4, 3), np.uint8))
    monkeypatch.setattr("ddpm_jax.data.npz._memory", lambda: 95)
    assert "more than this machine has" in refused_npz(tmp_path / "x.npz")


def test_a_single_array_and_a_file_without_images_are_told_apart(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 4, 4, 3), np.uint8))
    assert "it holds a single array (npy)" in refused_npz(tmp_path / "x.npy")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("cat/0.png", b"")
    assert "no array named images, only nothing" in refused_npz(tmp_path / "x.zip")
