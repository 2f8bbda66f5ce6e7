"""Tuning without a named sampler: every family compiled, the choice kept and drawn by."""

import json

import numpy as np
import pytest
from conftest import refused, with_source

from ddpm_jax import fit, load
from ddpm_jax.cli import main
from ddpm_jax.evaluation import tune as tuning
from ddpm_jax.evaluation.choice import STOCHASTIC
from ddpm_jax.evaluation.tune import COMPETITORS
from ddpm_jax.sampler import Sampler, Tuned

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


def test_a_model_that_is_no_run_is_written_with_its_result(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "EVALUATIONS", 2)
    file = tmp_path / "model.safetensors"
    args = ["--steps", "3", "--sampler", "unipc", "--images", "8", "--out", file]
    assert main(["tune", *map(str, [run, *args])]) == 0
    ddpm, _ = load(file)
    assert [len(each.timesteps) for each in ddpm.tuned.grids] == [3]
    assert ddpm.resolve(Sampler("unipc", 3, grid="tuned")) == ddpm.tuned.grids[0]
    assert load(run)[0].tuned == Tuned()


def test_the_command_keeps_what_sample_uses(copy, capsys, monkeypatch):
    monkeypatch.setattr(tuning, "EVALUATIONS", 5)
    args = ["tune", str(copy), "--sampler", "unipc", "--order", "3", "--images", "8"]
    assert main([*args, "--steps", "3"]) == 0
    out, err = capsys.readouterr()
    assert "unipc, 3 steps: RMSE of 255" in out and "the tuned steps: " in out
    assert "(ddim, 10 steps)" in out  # The model has no more than 10.
    assert "tuning takes at most " in err
    kept = json.loads((copy / "tuned.json").read_text())
    assert [each["sampler"] for each in kept["grids"]] == ["unipc"] and kept["choices"] == []
    ddpm, _ = load(copy)
    steps = tuple(kept["grids"][0]["timesteps"])
    for options in ({}, {"order": 3}):
        asked = Sampler("unipc", 3, grid="tuned", **options)
        assert ddpm.resolve(asked) == Sampler("unipc", timesteps=steps)
    assert main([*args, "--steps", "4"]) == 0
    kept = json.loads((copy / "tuned.json").read_text())
    assert [len(each["timesteps"]) for each in kept["grids"]] == [3, 4]
    missing = refused(capsys, "sample", copy, "--steps", 3, "--grid", "tuned")
    assert "run ddpm-jax tune RUN --steps 3 with the same" in missing
    noisy = refused(
        capsys, "sample", copy, "--steps", 3, "--grid", "tuned", "--sampler", "sde-dpm-solver++"
    )
    assert "tuned is for deterministic samplers, and sde-dpm-solver++ draws noise" in noisy
    wrong = refused(capsys, "tune", copy, "--steps", 3, "--order", 2)
    assert (
        wrong == "ddpm-jax: order: belongs to a --sampler; name that, too; see ddpm-jax tune --help"
    )
