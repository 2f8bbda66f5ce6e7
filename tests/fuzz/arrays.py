"""Damaged npz files: images, and the parts that evaluation and likelihood keep."""

import functools
import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from etils import epath

from ddpm_jax.calibration import DECODER_VARIANCES, Calibration
from ddpm_jax.config import Data
from ddpm_jax.data import load_source, tfds
from ddpm_jax.data.sources import from_array
from ddpm_jax.evaluation import bound, errors, evaluate, features
from ddpm_jax.evaluation.bound_parts import PART
from ddpm_jax.evaluation.bound_place import label_of
from ddpm_jax.evaluation.splits import Images
from ddpm_jax.sampler import Sampler, Tuned
from ddpm_jax.storage import measured as measured_files
from ddpm_jax.storage.files import claim, read_npz
from ddpm_jax.storage.measured import Measured, identity_of
from ddpm_jax.weights.load import load_weights
from fuzz.formats import edit_npz
from fuzz.json_edits import edit_json
from fuzz.reader import Reader, edit_one

RUN = Path(__file__).parent.parent / "data/run_0_1"
N, D, K = 6, 5, 3
T = 10
"""Steps of the run."""


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _pictures():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (N, 8, 8, 1), dtype=np.uint8)


def _valid_images(rng):
    images = _pictures()
    labels = np.arange(N) % 3
    choices = ({"images": images}, {"images": images[..., 0]}, {"images": images, "labels": labels})
    return {"images.npz": npz(**rng.choice(choices))}


def _read_images(folder, rng):
    """The images and labels are those that NumPy reads."""
    source = load_source(Data(source=f"npz:{folder}/images.npz", image_shape=(8, 8, 1)))
    images = source.read(np.arange(len(source)))
    assert images.dtype == np.uint8 and images.shape == (len(source), 8, 8, 1), images.shape
    with np.load(folder / "images.npz", allow_pickle=False) as arrays:
        assert np.array_equal(images, arrays["images"].reshape(images.shape))
        labelled = "labels" in arrays.files
        assert labelled == (source.labels is not None)
        assert not labelled or np.array_equal(source.labels, arrays["labels"]), "other labels"
    return "read"


def _read_any(folder, rng):
    arrays = read_npz(epath.Path(folder / "images.npz"))
    assert all(array.dtype != object for array in arrays.values())
    return "read"


def _valid_features(rng):
    drawn = np.random.default_rng(0)
    part = npz(
        features=drawn.normal(size=(N, D)).astype(np.float32),
        logits=drawn.normal(size=(N, K)).astype(np.float32),
    )
    statistics = npz(
        mean=np.zeros(D),
        covariance=np.eye(D),
        count=np.array(N),
        features=np.zeros((N, D), np.float32),
    )
    return {f"00000000-{N:04d}-x.npz": part, "statistics.npz": statistics}


def _read_features(folder, rng):
    """As evaluate finds them; no network has to run, since every part is there."""
    extractor = SimpleNamespace(kind="proxy", sha256="0")
    if rng.random() < 0.7:
        found = features.features_of(extractor, None, N, epath.Path(folder), lambda indices: "x")
        assert found.features.shape == (N, D) and found.logits.shape == (N, K), "other shapes"
        assert found.features.dtype == np.float32 == found.logits.dtype, "other dtypes"
        return "read"
    source = SimpleNamespace(fingerprint="0", units="")
    root = features._folder(epath.Path(folder), source, np.arange(N), "0")
    (epath.Path(folder) / "statistics.npz").rename(_made(root) / "statistics.npz")
    reference = features.reference_of(extractor, source, np.arange(N), epath.Path(folder))
    assert reference.statistics.mean.shape == (D,), "other shapes"
    assert reference.statistics.covariance.shape == (D, D), "other shapes"
    assert reference.features.shape == (N, D), "other shapes"
    return "read"


def _made(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def model():
    """Two updates of a tiny network."""
    return load_weights(RUN)


@functools.cache
def _split():
    source = from_array(_pictures(), (8, 8, 1))
    return Images("test", source, np.arange(N))


def _valid_bound(rng):
    parts = {}
    for at in range(0, N, PART):
        count = min(PART, N - at)
        one = np.ones(count, np.float32)
        curves = {"terms": np.ones(T), "mse": np.ones(T)}
        content = npz(total=one, prior=one, distortion=one, **curves)
        parts[f"parts/000-{at:08d}.npz"] = content
    return parts


def _read_bound(folder, rng):
    """As likelihood finds its parts; nothing has to be measured, since every part is there."""
    (folder / "parts").rename(folder / "aside")
    claim(epath.Path(_made(folder / "out")), "label.json", label_of(model(), _split(), 0))
    (folder / "aside").rename(folder / "out/parts")
    result = bound.measure(model(), _split(), out=folder / "out")
    assert result.terms.shape == result.mse.shape == (T,), "other shapes"
    assert isinstance(result.summary["total"], float) and isinstance(result.prior, float)
    return "read"


def _valid_tfds(rng):
    labels = np.arange(N, dtype=np.int32)
    return {"x.npz": npz(fingerprint=np.array("abc"), images=_pictures(), labels=labels)}


def _read_tfds(folder, rng):
    """The decoded copy of a data set of tfds; a damaged one is written again."""
    expected = {"images": ((N, 8, 8, 1), np.uint8), "labels": ((N,), np.int32)}
    kept = tfds._load(epath.Path(folder / "x.npz"), "abc", expected)
    if kept is None:
        return "made again"
    found = {name: (array.shape, array.dtype) for name, array in kept.items()}
    assert found == expected, found
    return "read"


def _valid_evaluation(rng):
    values = {"nll_test": {"title": "NLL", "value": 1.0, "error": 0.1, "error_is": "x"}}
    return {"evaluation.json": json.dumps({**model().label, "values": values}).encode()}


def _read_evaluation(folder, rng):
    """What evaluate takes over from an earlier evaluation of the same model."""
    kept = evaluate._likelihood_in(epath.Path(folder / "evaluation.json"), model())
    for value in kept.values():
        assert isinstance(value["title"], str) and isinstance(value["value"], (int, float))
    return "read"


@functools.cache
def measured():
    """Something of everything that can be measured of the tiny network."""
    drawn = np.random.default_rng(0)
    curves = drawn.uniform(0, 1, (2, T))
    cells = drawn.uniform(0, 1, (2, T, 8, 8, 1)).astype(np.float32)
    samplers = (Sampler("unipc", timesteps=(1, 4, 9), order=2), Sampler("ddim", timesteps=(9,)))
    about = {"seed": 3, "split": "holdout", "data_fingerprint": "abc"}
    return Measured(Calibration(*curves, *cells, 7), Tuned(samplers, samplers[:1]), about, {"n": 1})


def _valid_measured(rng):
    return measured_files.files_of(measured(), identity_of(model().ddpm, model().params))


def _edit_measured(rng, files):
    name = rng.choice(sorted(files))
    edit = edit_npz if name.endswith(".npz") else edit_json
    return files | {name: edit(rng, files[name])}


def _read_measured(folder, rng):
    """As load reads the files beside the weights; those of other weights say nothing."""
    found = measured_files.read_measured(folder, model().ddpm, model().params)
    if found.calibration is not None:
        assert found.calibration.mse.shape == (T,) and found.calibration.images >= 1
        assert found.calibration.cells.shape == (T, 8, 8, 1), "other cells"
    for sampler in (*found.tuned.grids, *found.tuned.choices):
        assert 0 <= sampler.timesteps[0] <= sampler.timesteps[-1] < T, "other steps"
    both = found.calibration is not None and found.tuned != Tuned()
    return "read" if both else "of other weights"


def _valid_errors(rng):
    curves, cells = np.ones(T), np.ones((T, 8, 8, 1))
    sums = {"mse": curves, "mse_squares": curves, "cells": cells, "cells_squares": cells}
    decoder = np.ones(len(DECODER_VARIANCES))
    return {"errors.npz": npz(images=np.array(5), **sums, decoder=decoder)}


def _read_errors(folder, rng):
    found = errors.read_errors(epath.Path(folder), model().ddpm, N)
    assert found.calibration().images <= N if found.images else True
    assert found.mse.shape == (T,) and found.cells.shape == (T, 8, 8, 1), "other shapes"
    return "read"


READERS = [
    Reader("images.npz", 600, _valid_images, edit_one(edit_npz), _read_images),
    Reader("any npz", 200, _valid_images, edit_one(edit_npz), _read_any),
    Reader("features.npz", 300, _valid_features, edit_one(edit_npz), _read_features, keeps=False),
    Reader("likelihood parts", 300, _valid_bound, edit_one(edit_npz), _read_bound, keeps=False),
    Reader("decoded tfds", 150, _valid_tfds, edit_one(edit_npz), _read_tfds),
    Reader("measurements", 400, _valid_measured, _edit_measured, _read_measured),
    Reader("errors.npz", 150, _valid_errors, edit_one(edit_npz), _read_errors),
    Reader("evaluation.json", 200, _valid_evaluation, edit_one(edit_json), _read_evaluation),
]
