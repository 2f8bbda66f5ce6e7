"""Likelihood of a split: every image counts, a kill costs nothing, the numbers add up."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import refused

from ddpm_jax import UserError, load
from ddpm_jax.cli import main
from ddpm_jax.data import split
from ddpm_jax.devices.mesh import make_mesh
from ddpm_jax.evaluation import bound, bound_parts
from ddpm_jax.evaluation.splits import default_split, read_split
from ddpm_jax.storage.run import read_config
from ddpm_jax.weights.load import load_weights


def test_the_splits_are_the_runs_own(run, tmp_path, pictures):
    config, model = read_config(run), load_weights(run)
    _, source, train = read_split(model, "train")
    held_out = read_split(model, "holdout").indices
    assert sorted([*train, *held_out]) == list(range(48)) and 0 < len(held_out) < len(train)
    np.testing.assert_array_equal(held_out, split(source, 0.2)[1])
    # The same images elsewhere will do, others will not; for the test split any.
    np.savez(tmp_path / "same.npz", images=pictures)
    np.savez(tmp_path / "other.npz", images=pictures[:5])
    assert len(read_split(model, "train", f"npz:{tmp_path}/same.npz").indices) == len(train)
    with pytest.raises(UserError, match="does not hold the images"):
        read_split(model, "train", f"npz:{tmp_path}/other.npz")
    assert default_split(config) == "holdout"
    with_test = dataclasses.replace(config, data=dataclasses.replace(config.data, test="folder:x"))
    without = dataclasses.replace(config, data=dataclasses.replace(config.data, holdout=0.0))
    assert default_split(with_test) == default_split(without) == "test"
    _, test, indices = read_split(model, "test", f"npz:{tmp_path}/other.npz")
    np.testing.assert_array_equal(test.read(indices), pictures[:5])


def measure(run, split=None, data=None, **options):
    """The bound of a run, as the command measures it."""
    model = load_weights(run, mesh=make_mesh())
    return bound.measure(model, read_split(model, split, data), **options)


@pytest.fixture(scope="module", autouse=True)
def small_parts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bound_parts, "PART", 3)
        yield


@pytest.fixture(scope="module")
def measured(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("likelihood") / "whole"
    return out, measure(run, draws=2, batch_size=3, out=out)


def test_every_image_counts_once_a_draw(run, measured, pictures):
    _, result = measured
    ddpm, params = load(run)
    held_out = read_split(load_weights(run), "holdout").indices
    assert len(held_out) % 3  # The last batch is not full.
    x_0 = np.float32(pictures[held_out]) / 127.5 - 1
    draws = [
        ddpm.bits_per_dim(params, jax.random.fold_in(jax.random.key(0), draw), x_0)
        for draw in range(2)
    ]
    totals = np.array([bits.total.mean() for bits in draws])
    assert result.summary["images"] == len(held_out)
    np.testing.assert_allclose(result.summary["total"], totals.mean(), rtol=1e-4)
    # The standard error of the mean of two: half their difference.
    np.testing.assert_allclose(
        result.summary["standard_error"]["total"], abs(np.diff(totals)[0]) / 2, rtol=1e-2
    )
    np.testing.assert_allclose(
        result.mse, np.mean([bits.mse.mean(0) for bits in draws], axis=0), rtol=1e-4
    )


def test_the_parts_add_up(measured):
    out, result = measured
    summary = result.summary
    np.testing.assert_allclose(summary["rate"] + summary["distortion"], summary["total"], rtol=1e-6)
    np.testing.assert_allclose(result.rate[-1], summary["rate"], rtol=1e-4)
    np.testing.assert_allclose(result.rate[0], summary["prior"], rtol=1e-6)
    np.testing.assert_allclose(result.rmse[-1], summary["rmse"], rtol=1e-6)
    saved, curves = json.loads((out / "likelihood.json").read_text()), np.load(out / "curves.npz")
    assert saved.items() >= summary.items()
    np.testing.assert_array_equal(curves["rate"], result.rate)


def test_a_killed_measurement_goes_on_to_the_same_answer(run, measured, tmp_path, monkeypatch):
    _, expected = measured
    calls, most = [], 3

    def until_killed(*args, whole=bound_parts.bits_of_each):
        for images, bits in whole(*args):
            if len(calls) == most:
                raise KeyboardInterrupt
            calls.append(images.start)
            yield images, bits

    monkeypatch.setattr(bound_parts, "bits_of_each", until_killed)
    with pytest.raises(KeyboardInterrupt):
        measure(run, draws=2, batch_size=3, out=tmp_path / "out")
    done = len(list((tmp_path / "out/parts").glob("*.npz")))
    assert done == 3 and not (tmp_path / "out/likelihood.json").exists()

    most = None
    again = measure(run, draws=2, batch_size=3, out=tmp_path / "out")
    batches = -(-expected.summary["images"] // 3)
    assert again.summary == expected.summary and len(calls) == 2 * batches
    np.testing.assert_array_equal(again.terms, expected.terms)
    # Fewer draws take nothing new and throw nothing away.
    assert measure(run, draws=1, batch_size=3, out=tmp_path / "out").summary == expected.summary
    assert len(calls) == 2 * batches
    # Nor does another batch size or number of devices.
    assert measure(run, draws=1, batch_size=6, out=tmp_path / "out").summary == expected.summary
    assert len(calls) == 2 * batches


def test_the_command_prints_a_table_and_writes_it(run, copy, capsys, measured):
    out, result = measured
    args = ["likelihood", str(run), "--batch-size", "3", "--out", str(out)]
    assert main([*args, "--draws", "2"]) == 0
    printed = capsys.readouterr().out
    assert (
        f"{result.summary['total']:.5f}" in printed and "ema weights of step 2, 2 draws" in printed
    )
    assert main(["likelihood", str(copy), "--split", "train", "--batch-size", "64"]) == 0
    assert (
        "1 draw\n" in (text := capsys.readouterr().out)
        and text.count("needs --draws 2 or more") == 1
    )
    assert (copy / "likelihood/train-00000002-ema-seed0/likelihood.json").exists()


def test_other_processes_and_test_sets_do_not_share_parts(copy, measured, tmp_path, pictures):
    out, _ = measured
    written = (copy / "config.json").read_text()
    config = json.loads(written)
    config["diffusion"]["variance"] = "fixed_small"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"diffusion.variance 'fixed_large', not 'fixed_small'; choose another"
    ):
        measure(copy, "holdout", out=out)
    (copy / "config.json").write_text(written)
    for n in (2, 3):
        np.savez(tmp_path / f"{n}.npz", images=pictures[:n])
        assert measure(copy, "test", data=f"npz:{tmp_path}/{n}.npz").summary["images"] == n
    # What a kill leaves before the first file is whole is in nobody's way.
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed/.label.json.tmp").touch()
    assert (
        measure(copy, "test", data=f"npz:{tmp_path}/2.npz", out=tmp_path / "killed").summary[
            "images"
        ]
        == 2
    )


def test_what_cannot_be_measured_is_refused_in_one_line(run, measured, tmp_path, capsys):
    out, _ = measured
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    for args, says in [
        (
            ["--split", "test"],
            "no test images; name some with --split test --data folder:PATH, "
            "or choose --split holdout",
        ),
        (["--split", "test", "--data", "npz:/nowhere"], "cannot read /nowhere"),
        (
            ["--split", "test", "--data", "digits"],
            "data.test: must be folder:PATH, npz:PATH, npy:PATH, hf:PATH or tfds:NAME, "
            "got 'digits'",
        ),
        (["--draws", "0"], "draws: must be at least 1, got 0"),
        (["--batch-size", "0"], "batch_size: must be at least 1, got 0"),
        (["--seed", "-1"], "seed: must be at least 0"),
        (
            ["--out", out, "--seed", "1", "--batch-size", "3"],
            "holds results made with seed 0, not 1; choose another folder or move this one away",
        ),
        (["--out", tmp_path / "mine"], "is not empty and was not written by this command"),
        (["--step", "7"], "no checkpoint of step 7"),
    ]:
        assert says in refused(capsys, "likelihood", run, *args)
    part = min((out / "parts").iterdir())
    whole = part.read_bytes()
    part.write_bytes(whole[:100])
    try:
        assert "delete it to compute it again" in refused(
            capsys, "likelihood", run, "--out", out, "--batch-size", "3"
        )
    finally:
        part.write_bytes(whole)
