"""Tuning without a named sampler: every family compiled, the choice kept and drawn by."""

import json

import numpy as np
import pytest
from conftest import with_source

from ddpm_jax import fit, load
from ddpm_jax.cli import main
from ddpm_jax.evaluation.choice import STOCHASTIC
from ddpm_jax.evaluation.tune import COMPETITORS

pytestmark = pytest.mark.slow


def test_the_choice_is_explained_kept_and_drawn_by(copy, capsys, tmp_path):
    args = ["tune", str(copy), "--steps", "3", "--images", "8"]
    assert main(args) == 0
    out, err = capsys.readouterr()
    assert "and its calibration on " in err and "KID is that of pixels" in err
    for name in (*COMPETITORS, *(each.name for each in STOCHASTIC)):
        assert f"  {name}" in out
    assert "on pixels, with its error:" in out and "\nchosen: " in out
    kept = (copy / "tuned.json").read_bytes()
    (choice,) = json.loads(kept)["choices"]
    assert len(choice["timesteps"]) == 3
    assert json.loads(kept)["about"]["choice 3"]["reason"] in out
    images = {}
    for name, options in {
        "tuned": ["--steps", "3", "--grid", "tuned"],
        "itself": ["--sampler", choice["sampler"], "--timesteps", *map(str, choice["timesteps"])],
    }.items():
        given = [("--eta", choice["eta"]), ("--variance", choice["variance"])]
        if name == "itself":
            options += [str(each) for pair in given if pair[1] is not None for each in pair]
        file = tmp_path / f"{name}.npz"
        assert main(["sample", str(copy), *options, "-n", "3", "--out", str(file)]) == 0
        images[name] = np.load(file)["images"]
    np.testing.assert_array_equal(images["tuned"], images["itself"])
    # With the calibration there, and other batches: the same bytes.
    (copy / "tuned.json").unlink()
    assert main([*args, "--batch-size", "4"]) == 0
    assert (copy / "tuned.json").read_bytes() == kept
    # An export carries the choice along, and steps of other weights are not used.
    file = tmp_path / "model.safetensors"
    assert main(["export", str(copy), "--out", str(file)]) == 0
    assert load(file)[0].tuned == load(copy)[0].tuned != load(copy, weights="raw")[0].tuned


def test_labels_make_the_proxy_the_judge(tiny, tmp_path, capsys, rng, monkeypatch):
    from ddpm_jax.evaluation import features

    trained = features.train_classifier
    monkeypatch.setattr(features, "train_classifier", lambda *args: trained(*args, steps=3))
    pictures = rng.integers(0, 256, (48, 8, 8, 1), dtype=np.uint8)
    config = with_source(tiny, pictures, tmp_path, train={"steps": 2})
    np.savez(tmp_path / "pictures.npz", images=pictures, labels=np.arange(48) % 3)
    fit(config, tmp_path / "run")
    assert main(["tune", str(tmp_path / "run"), "--steps", "2", "--images", "8"]) == 0
    assert "on the features of a proxy" in capsys.readouterr().out
