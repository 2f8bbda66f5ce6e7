"""Results that are kept in files and used again: a damaged file is named, and never used."""

import functools
import io
import json
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from etils import epath

from ddpm_jax import UserError
from ddpm_jax.evaluation import bound_parts
from ddpm_jax.evaluation.evaluate import _likelihood_in
from ddpm_jax.evaluation.features import _folder, features_of, reference_of
from ddpm_jax.evaluation.inception_weights import load_inception
from ddpm_jax.storage.files import npz
from ddpm_jax.storage.kept import Kept, read_kept

ONE = np.zeros((3, 2), np.float32)


@pytest.fixture
def file(tmp_path):
    return epath.Path(tmp_path) / "00000000-0003-x.npz"


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"b": ONE},
        {"a": ONE, "b": ONE},
        {"a": ONE.astype(np.float64)},
        {"a": ONE[:2]},
        {"a": ONE[..., None]},
        {"a": np.float32(0)},
    ],
)
def test_only_the_arrays_that_were_written_are_read(file, arrays):
    file.write_bytes(npz(arrays))
    with pytest.raises(UserError) as refused:
        read_kept(file, {"a": Kept("float32", (3, None))})
    assert str(file) in str(refused.value) and "delete the file" in str(refused.value)


def test_what_was_written_is_read(file):
    file.write_bytes(npz({"a": ONE, "b": np.array(3)}))
    found = read_kept(file, {"a": Kept("float32", (3, None)), "b": Kept("int64", ())})
    assert np.array_equal(found["a"], ONE) and found["b"] == 3


def test_an_array_whose_header_has_become_smaller_is_damaged(file):
    """All else is right, the checksum too: the numbers would move to other places."""
    with zipfile.ZipFile(io.BytesIO(npz({"a": ONE}))) as archive:
        member = archive.read("a.npy")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", member.replace(b"(3, 2)", b"(3, 1)"))
    with pytest.raises(UserError, match="too long"):
        read_kept(file, {"a": Kept("float32", (3, None))})


DAMAGED_FEATURES = {
    "no logits": {"features": ONE},
    "fewer images": {"features": ONE[:2], "logits": ONE},
    "another type": {"features": ONE, "logits": ONE.astype(np.float64)},
}


@pytest.mark.parametrize("arrays", DAMAGED_FEATURES.values(), ids=DAMAGED_FEATURES)
def test_damaged_features_of_samples_are_named(file, arrays):
    extractor = SimpleNamespace(kind="proxy")
    file.write_bytes(npz({"features": ONE, "logits": ONE}))
    features = functools.partial(features_of, extractor, None, 3, file.parent, lambda indices: "x")
    assert features().features.shape == (3, 2)
    file.write_bytes(npz(arrays))
    with pytest.raises(UserError, match=file.name):
        features()


def test_damaged_statistics_of_real_images_are_named(tmp_path):
    extractor = SimpleNamespace(kind="proxy", sha256="0")
    source = SimpleNamespace(fingerprint="0", units="")
    indices = np.arange(3)
    folder = _folder(epath.Path(tmp_path), source, indices, "0")
    folder.mkdir()
    whole = {
        "mean": np.zeros(2),
        "covariance": np.eye(2),
        "count": np.array(3),
        "features": ONE,
    }
    for damage in ({}, {"covariance": np.eye(3)}, {"features": ONE[:, :1]}, {"mean": np.zeros(())}):
        (folder / "statistics.npz").write_bytes(npz(whole | damage))
        if not damage:
            reference_of(extractor, source, indices, epath.Path(tmp_path))
            continue
        with pytest.raises(UserError, match=r"statistics\.npz"):
            reference_of(extractor, source, indices, epath.Path(tmp_path))


def test_damaged_parts_of_a_likelihood_are_named(tmp_path):
    model = SimpleNamespace(ddpm=SimpleNamespace(schedule=SimpleNamespace(num_timesteps=4)))
    file = tmp_path / "parts/000-00000000.npz"
    file.parent.mkdir()
    each = dict.fromkeys(("total", "prior", "distortion"), np.ones(3, np.float32))
    whole = {**each, "terms": np.ones(4), "mse": np.ones(4)}
    file.write_bytes(npz(whole))
    (read,) = bound_parts.read_parts(epath.Path(tmp_path), 0, model, 3)
    assert read.keys() == whole.keys()
    for damage in (
        {"total": np.ones((3, 1), np.float32)},
        {"prior": np.ones(2, np.float32)},
        {"terms": np.ones(8)},
        {"mse": np.array(["x"] * 4)},
        {"total": np.float32(1)},
    ):
        file.write_bytes(npz(whole | damage))
        with pytest.raises(UserError, match=file.name):
            bound_parts.read_parts(epath.Path(tmp_path), 0, model, 3)


@pytest.mark.parametrize("record", [[], 1, {}, {"values": []}, {"values": {"nll_test": 1.0}}])
def test_a_damaged_record_of_an_evaluation_is_named(tmp_path, record):
    file = epath.Path(tmp_path) / "evaluation.json"
    file.write_text(json.dumps(record))
    with pytest.raises(UserError, match=file.name):
        _likelihood_in(file, SimpleNamespace(label={}))


def test_a_member_that_is_no_array_is_no_weight(tmp_path):
    """NumPy gives such a member as bytes."""
    content = io.BytesIO(npz({"Conv2d_1a_3x3.conv.weight": np.zeros(3)}))
    content = content.getvalue().replace(b"weight.npy", b"weight.npx")
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.npz"):
        load_inception(tmp_path / "x.npz")
