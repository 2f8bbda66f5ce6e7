"""Evaluation from end to end, on a model that draws noise."""

import functools
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
from conftest import made_since, make_old, refused
from PIL import Image

from ddpm_jax.cli import main
from ddpm_jax.config import Data, load_config
from ddpm_jax.data import load_source
from ddpm_jax.devices.mesh import make_mesh
from ddpm_jax.evaluation import evaluate as module
from ddpm_jax.evaluation import features, paper
from ddpm_jax.evaluation.evaluate import _name, evaluate, table
from ddpm_jax.evaluation.features import Extractor
from ddpm_jax.evaluation.proxy import train_classifier
from ddpm_jax.sampler import Sampler
from ddpm_jax.weights.load import load_weights


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """150 labelled digits in an npz: npz:PATH."""
    source = load_source(Data(source="digits", image_shape=(8, 8, 1)))
    file = tmp_path_factory.mktemp("digits") / "digits.npz"
    np.savez(file, images=source.read(np.arange(150)), labels=source.labels[:150])
    return f"npz:{file}"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few steps for the proxy, and files of few images."""
    monkeypatch.setattr(features, "train_classifier", functools.partial(train_classifier, steps=5))
    monkeypatch.setattr(features, "PART", 16)


def loaded(path):
    """The model, on all devices as the command has it."""
    return load_weights(path, mesh=make_mesh())


def only(folder, pattern):
    (path,) = folder.glob(pattern)
    return path


def test_a_row_is_printed_written_and_made_of_all_images(copy, digits, capsys):
    """37 samples fill neither a batch nor a file; FID against scipy, from the pictures on disk."""
    command = ["evaluate", str(copy), "--data", digits, "-n", "37", "--no-likelihood"]
    assert main(command) == 0
    out = capsys.readouterr()
    assert (
        "37 samples of seed 0 against 150 images of train" in out.out
        and "ema weights of step 2, ancestral" in out.out
    )
    assert (
        "proxy FID (train)" in out.out
        and "the paper" not in out.out
        and "37 samples for 64 features" in out.err
    )
    result = json.loads(only(copy, "evaluation/*/proxy-37-*.json").read_text())
    assert list(result["values"]) == [
        f"proxy_{name}"
        for name in ("is", "fid_train", "kid_train", "precision_train", "recall_train")
    ]
    assert (result["weights"], result["step"], result["sampler"], result["seed"]) == (
        "ema",
        2,
        "ancestral",
        0,
    )
    assert result["features"]["kind"] == "proxy" and len(result["features"]["sha256"]) == 64

    source = load_source(Data(source=digits, image_shape=(8, 8, 1)))
    extractor = features.proxy(
        source, np.arange(150), features.cache_root(source, None), make_mesh(1)
    )
    assert extractor.sha256 == result["features"]["sha256"]
    files = sorted(only(copy, "evaluation/*/samples").glob("*.png"))
    drawn = np.stack([np.asarray(Image.open(file))[..., None] for file in files])
    assert len(drawn) == 37
    a, b = (
        np.float64(extractor.apply(extractor.params, images)[0])
        for images in (drawn, source.read(np.arange(150)))
    )
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    fid = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    np.testing.assert_allclose(result["values"]["proxy_fid_train"]["value"], fid, rtol=1e-3)


def test_a_killed_evaluation_goes_on_to_the_same_numbers(copy, digits):
    once = evaluate(loaded(copy), digits, 37, likelihood=False)
    folder = only(copy, "evaluation/*")
    make_old(folder)
    for file in [
        folder / "samples/000020.png",
        only(folder, "features-*/00000016-0016-*.npz"),
        *folder.glob("*.json"),
    ]:
        file.unlink()
    assert evaluate(loaded(copy), digits, 37, likelihood=False) == once
    assert made_since(folder, "*.png") == ["000020.png"]
    assert [name[:13] for name in made_since(folder, "*.npz")] == ["00000016-0016"]
    # Images that somebody else put there are not taken for those that were compared before.
    for file in (folder / "samples").glob("*.png"):
        file.write_bytes((folder / "samples/000000.png").read_bytes())
    copies = evaluate(loaded(copy), digits, 37, likelihood=False)["values"]
    assert copies["proxy_is"]["value"] == pytest.approx(1) != once["values"]["proxy_is"]["value"]


def test_sample_and_evaluate_share_images(copy, digits, tmp_path):
    assert main(["sample", str(copy), "-n", "30", "--out", f"{tmp_path}/drawn/"]) == 0
    make_old(tmp_path / "drawn")
    shared = evaluate(loaded(copy), digits, 37, likelihood=False, samples=tmp_path / "drawn")
    assert made_since(tmp_path / "drawn", "*.png") == [f"{i:06d}.png" for i in range(30, 37)]
    assert shared == evaluate(loaded(copy), digits, 37, likelihood=False)


def test_a_runs_own_images_are_the_reference_and_its_holdout_the_bound(copy, digits, monkeypatch):
    monkeypatch.setattr(features, "proxy", _mean_colour)
    result = evaluate(loaded(copy), n=24)
    assert [each["split"] for each in result["references"]] == ["train", "holdout"]
    assert list(result["values"])[-1] == "nll_holdout" and "proxy_fid_holdout" in result["values"]
    likelihood = json.loads(only(copy, "likelihood/*/likelihood.json").read_text())
    value = result["values"]["nll_holdout"]
    assert (
        value["value"] == likelihood["total"]
        and value["error"] == likelihood["standard_error_over_images"] > 0
    )
    # Without measuring it again what was measured stays; and other images have a file of their own.
    assert evaluate(loaded(copy), n=24, likelihood=False)["values"]["nll_holdout"] == value
    assert "nll_holdout" not in evaluate(loaded(copy), digits, 24, likelihood=False)["values"]
    assert len(list(copy.glob("evaluation/*/*.json"))) == 2


def _mean_colour(*_):
    """An extractor of two features."""

    def apply(_, images):
        x = np.asarray(images, np.float32).reshape(len(images), -1) / 255
        two = np.stack([x.mean(1), x.std(1)], axis=1)
        return two, two

    return Extractor("proxy", apply, {}, make_mesh(1), "0" * 64, {"accuracy": 0.5})


def test_only_inceptions_numbers_stand_beside_the_papers(copy, digits, monkeypatch):
    monkeypatch.setattr(
        features, "inception", lambda *_: _mean_colour()._replace(kind="inception", about={})
    )
    monkeypatch.setattr(
        module, "results_of", lambda *_: paper.results_of(load_config("cifar10"), "tfds:cifar10")
    )
    result = evaluate(loaded(copy), digits, 24, likelihood=False, inception_file="x.npz")
    words = table(result)
    assert (
        "the paper" in words
        and "3.17" in words
        and "9.46 +- 0.11" in words
        and "proxy" not in words
    )
    assert (
        paper.results_of(load_config("cifar10_mean_vlb_learned"), "folder:cifar-10.zip")[
            "fid_train"
        ]
        == "23.69"
    )
    assert paper.results_of(load_config("lsun_cat"), load_config("lsun_cat").data.source) == {
        "fid_train": "19.75"
    }
    assert paper.results_of(load_config("cifar10"), "tfds:cifar10")["nll_test"] == "<= 3.75"
    for data in (
        "digits",
        "tfds:cifar100",
        "tfds:cifar10_corrupted/fog",
        "folder:/location/lsun_tower",
        "tfds:lsun/cat",
    ):
        assert paper.results_of(load_config("cifar10"), data) == {}


def test_raw_weights_are_evaluated_only_where_that_is_said(copy, digits, tmp_path, capsys):
    file = tmp_path / "raw.safetensors"
    assert main(["export", str(copy), "--weights", "raw", "--out", str(file)]) == 0
    assert "pass --weights raw" in refused(
        capsys, "evaluate", file, "--data", digits, "--out", tmp_path / "e"
    )
    result = evaluate(loaded(file), digits, 24, likelihood=False, out=tmp_path / "e")
    assert result["weights"] == "raw" and "raw weights of step 2" in table(result)


def test_neighbours_are_searched_in_the_same_features(run, digits, tmp_path, capsys):
    """Of a model that does not say what it was trained on: it may have copied any of the images."""
    model, picture = tmp_path / "model", tmp_path / "x.png"
    assert main(["export", str(run), "--format", "diffusers", "--out", str(model)]) == 0
    command = ["figure", "neighbours", model, "--data", digits, "--n", "4", "--out", picture]
    assert main([str(word) for word in [*command, "--features"]]) == 0
    numbers = np.load(picture.with_suffix(".npz"))
    source = load_source(Data(source=digits, image_shape=(8, 8, 1)))
    extractor = features.proxy(
        source, np.arange(150), features.cache_root(source, None), make_mesh(1)
    )
    images = [numbers["samples"], numbers["samples"][:, :, ::-1], source.read(np.arange(150))]
    drawn, mirrored, real = (
        np.asarray(extractor.apply(extractor.params, some)[0]) for some in images
    )
    distances = np.minimum(
        *(scipy.spatial.distance.cdist(some, real) for some in (drawn, mirrored))
    )
    np.testing.assert_allclose(numbers["distance"][:, 0], distances.min(axis=1), rtol=1e-4)
    np.testing.assert_array_equal(
        numbers["neighbours"][:, 0], source.read(distances.argmin(axis=1))
    )
    assert "add --features" in refused(capsys, *command, "--inception", "x.npz")


def test_what_cannot_be_evaluated_is_refused(run, digits, tmp_path, capsys):
    for arguments, says in [
        (("-n", 19), "n: must be at least 20 and at most 4294967296, got 19"),
        (("--batch-size", 0), "batch_size: must be at least 1"),
        (
            ("-n", 24),
            "have no labels to train the proxy on; pass FID's InceptionV3 with --inception PATH",
        ),
        (("--inception", tmp_path / "no.safetensors"), "no.safetensors: cannot be read"),
        (("--inception", tmp_path / "x.pth"), "convert_inception.py"),
        (("--data", "npz:/nowhere.npz"), "cannot read /nowhere.npz"),
        (("--steps", 11), "steps: must be from 1 to 10"),
        (("--seed", -1), "seed: must be at least 0"),
    ]:
        assert says in refused(capsys, "evaluate", run, *arguments)
    assert "not a model; name a run directory" in refused(capsys, "evaluate", tmp_path)
    np.savez(tmp_path / "few.npz", images=np.zeros((19, 8, 8, 1), np.uint8), labels=np.arange(19))
    few = f"npz:{tmp_path}/few.npz"
    assert "at least 20 images are needed" in refused(
        capsys, "evaluate", run, "--data", few, "-n", 24
    )
    other = tmp_path / "other"
    other.mkdir()
    (other / "picture.png").write_bytes(b"")
    assert "is not empty and was not written by this command" in refused(
        capsys, "evaluate", run, "--data", digits, "-n", 24, "--samples", other
    )


def test_steps_that_were_chosen_one_by_one_have_a_short_name():
    """A file's name has at most 255 bytes."""
    model = SimpleNamespace(step=3, kind="ema")
    names = [
        _name(model, Sampler("unipc", timesteps=tuple(range(first, 1000))), 0) for first in (0, 1)
    ]
    assert len(set(names)) == 2 and all(re.fullmatch(r"[\w.-]{1,60}", name) for name in names)
    assert _name(model, Sampler("ddim", steps=20, eta=0.5), 0) == "00000003-ema-ddim-20-0.5-seed0"
