"""Weights out into one file, back in, and into a new run."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import messages, refused, with_
from safetensors.numpy import load_file, save_file
from test_train import assert_equal_trees

from ddpm_jax import DDPM, fit, load
from ddpm_jax.cli import main
from ddpm_jax.devices.mesh import make_mesh
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.splits import read_split
from ddpm_jax.training import train
from ddpm_jax.weights.load import load_weights, weights_for
from ddpm_jax.weights.single_file import read_single_file, write_single_file


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The averaged weights of `run` in one file."""
    out = tmp_path_factory.mktemp("exported") / "model.safetensors"
    assert main(["export", str(run), "--format", "safetensors", "--out", str(out)]) == 0
    return out


def test_a_file_holds_the_run_bit_for_bit(run, exported):
    ddpm, params = load(exported)
    of_run, params_of_run = load(run)
    assert (
        ddpm.config.model == of_run.config.model
        and ddpm.config.diffusion == of_run.config.diffusion
    )
    assert ddpm.image_shape == of_run.image_shape
    assert_equal_trees(params, params_of_run)


def test_a_file_says_where_it_comes_from(run, exported):
    _, _, about = read_single_file(exported)
    assert (about["weights"], about["step"]) == ("ema", 2) and about["versions"]["jax"]
    assert (
        about["data_fingerprint"] == json.loads((run / "run.json").read_text())["data_fingerprint"]
    )
    assert load_weights(exported).words == "ema weights of step 2"
    assert str(run.parent).encode() not in exported.read_bytes()
    tensors = load_file(exported)  # Any reader of the format finds the network's names.
    np.testing.assert_array_equal(
        tensors["mid_0_block.conv_0.kernel"], load(run)[1]["mid_0_block"]["conv_0"]["kernel"]
    )


def test_the_same_weights_make_the_same_file(run, exported, tmp_path):
    assert main(["export", str(run), "--out", f"{tmp_path}/again.safetensors"]) == 0
    assert (tmp_path / "again.safetensors").read_bytes() == exported.read_bytes()


def test_a_file_knows_what_was_held_out(run, exported, tmp_path, pictures):
    data = f"npz:{run.parent}/pictures.npz"
    for split in ("train", "holdout"):
        of_file, of_run = (
            read_split(load_weights(path), split, data).indices for path in (exported, run)
        )
        np.testing.assert_array_equal(of_file, of_run)
    np.savez(tmp_path / "other.npz", images=pictures[:40])
    with pytest.raises(UserError, match="does not hold the images that this model was trained on"):
        read_split(load_weights(exported), "train", f"npz:{tmp_path}/other.npz")


def test_a_file_samples_what_the_run_samples(run, exported, tmp_path, capsys):
    for number, source in enumerate((run, exported)):
        assert main(["sample", str(source), "-n", "4", "--out", f"{tmp_path}/{number}/"]) == 0
        assert "ema weights of step 2" in capsys.readouterr().err
    # samples.json agrees that they are the same: the file can fill up a folder begun with the run.
    for name in ("000003.png", "samples.json"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()


def test_raw_weights_stay_raw(run, tmp_path):
    out = tmp_path / "raw.safetensors"
    assert (
        main(["export", str(run), "--format", "safetensors", "--out", str(out), "--weights", "raw"])
        == 0
    )
    assert load_weights(out).kind == "raw"
    assert_equal_trees(load(out, weights="raw")[1], load(run, weights="raw")[1])


def test_what_a_file_cannot_be_is_refused(run, exported, tmp_path, capsys):
    tensors, content = load_file(exported), exported.read_bytes()
    missing = {name: tensor for name, tensor in tensors.items() if name != "stem.bias"}
    metadata = {"ddpm_jax": _metadata(content)["ddpm_jax"]}
    without_provenance = {"config": json.loads(metadata["ddpm_jax"])["config"], "provenance": {}}
    save_file(missing, tmp_path / "missing.safetensors", metadata)
    save_file(tensors | {"more": np.zeros(2)}, tmp_path / "more.safetensors", metadata)
    save_file(tensors | {"stem.bias": np.zeros(4)}, tmp_path / "dtype.safetensors", metadata)
    save_file(tensors, tmp_path / "bare.safetensors")
    save_file(tensors, tmp_path / "half.safetensors", {"ddpm_jax": json.dumps(without_provenance)})
    (tmp_path / "short.safetensors").write_bytes(content[:-10])
    (tmp_path / "text.safetensors").write_bytes(b"hello")
    for name, says in {
        "missing": "stem.bias is absent, but must be float32 of shape (4,) by the file's config",
        "more": "more is float64 of shape (2,), but must be absent by the file's config",
        "dtype": "tensor stem.bias is float64 of shape (4,)",
        "bare": "does not describe its model",
        "half": "does not describe its model",
        "short": "cannot be read as safetensors",
        "text": "cannot be read as safetensors",
    }.items():
        assert says in refused(
            capsys, "sample", tmp_path / f"{name}.safetensors", "--out", tmp_path / "x.png"
        )
    assert not (tmp_path / "x.png").exists()
    (tmp_path / "model.pth").touch()
    for arguments, says in [
        (("sample", exported, "--weights", "raw"), "holds only ema weights; leave --weights out"),
        (("sample", exported, "--step", 4), "holds only the weights of step 2"),
        (
            ("likelihood", exported, "--split", "test", "--data", f"npz:{run.parent}/pictures.npz"),
            "choose one with --out",
        ),
        (
            ("likelihood", exported, "--split", "train", "--out", tmp_path / "x"),
            "this model was trained on an array",
        ),
        (("figure", "progressive", exported), "choose one with --out"),
        (
            ("export", run, "--format", "safetensors", "--out", tmp_path / "model.bin"),
            "to a file, --out NAME.safet",
        ),
        (
            ("export", run, "--format", "diffusers"),
            "to a folder, --out NAME, not to model.safetensors",
        ),
        (("export", run, "--out", exported), "model.safetensors exists already"),
        (
            ("export", run, "--format", "diffusers", "--out", tmp_path),
            "exists already; choose another --out or move",
        ),
        (
            ("export", run, "--format", "stablehlo", "--out", tmp_path),
            "exists already; choose another --out or move",
        ),
        (
            ("sample", tmp_path / "model.pth"),
            "model.pth: pickle files can run any code, so they are not read",
        ),
        (
            (
                "export",
                run,
                "--format",
                "safetensors",
                "--out",
                tmp_path / "x.safetensors",
                "--steps",
                2,
            ),
            "sampler: safetensors holds only weights",
        ),
        (
            ("export", tmp_path, "--format", "safetensors", "--out", tmp_path / "x.safetensors"),
            "not a model; name a run directory",
        ),
    ]:
        assert says in refused(capsys, *arguments)


def _metadata(content):
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


def test_a_run_starts_from_the_weights_of_another(run, exported, pictures, tmp_path, monkeypatch):
    """Its first state is theirs, the average too; and a run knows what it began from."""
    monkeypatch.setattr(train, "_train", lambda update, state, *_: state)
    config = load(run)[0].config
    for source in (exported, run):
        state = fit(config, tmp_path / "tuned", init_from=source)
        for params in (state.params, state.ema_params):
            assert_equal_trees(params, load(run)[1])
        assert state.step == 0
    with pytest.raises(
        UserError, match="no checkpoint yet; name the weights that it starts from with"
    ):
        fit(config, tmp_path / "tuned")
    fit(config, tmp_path / "fresh")
    with pytest.raises(UserError, match="started from other weights than --init-from"):
        fit(config, tmp_path / "fresh", init_from=exported)


def test_weights_of_another_network_are_refused_by_field(tiny, run, pictures, tmp_path, capsys):
    wide = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, base_channels=8))
    with pytest.raises(
        UserError, match=r"has another network: model.base_channels is 4 there, but 8 in"
    ):
        fit(wide, tmp_path / "wide", pictures, init_from=run)
    assert not (tmp_path / "wide").exists()
    v = dataclasses.replace(tiny, diffusion=dataclasses.replace(tiny.diffusion, prediction="v"))
    with pytest.raises(
        UserError, match=r"diffusion.prediction is 'eps' there, but 'v' in this config"
    ):
        fit(v, tmp_path / "v", pictures, init_from=run)
    assert "/nowhere: not found; name a run directory" in refused(
        capsys, "train", "digits", "--workdir", tmp_path / "x", "--init-from", "/nowhere"
    )


def test_other_betas_are_said(tiny, run, caplog):
    weights_for(load(run)[0], run, make_mesh(1))
    assert not messages(caplog)
    diffusion = dataclasses.replace(tiny.diffusion, schedule="const", beta_start=None)
    weights_for(DDPM(dataclasses.replace(tiny, diffusion=diffusion)), run, make_mesh(1))
    assert "other betas" in messages(caplog)[0]


FROM = {"weights": "ema", "step": 2, "data_fingerprint": None}


@pytest.mark.parametrize("no_class", [True, False])
def test_a_file_of_a_model_with_classes_draws_the_same(tiny, tmp_path, no_class):
    config = with_(tiny, model={"num_classes": 3, "no_class": no_class})
    rng = np.random.default_rng(0)
    ddpm = DDPM(config)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), ddpm.shapes)
    file = tmp_path / "x.safetensors"
    write_single_file(file, config, params, FROM)
    again, found = load(file)
    assert again.config == config
    assert_equal_trees(found, params)
    rows = load_file(file)["class_embedding.embedding"]
    np.testing.assert_array_equal(rows, params["class_embedding"]["embedding"])
    assert rows.shape == (3 + no_class, 16)
    if no_class:
        options = {"labels": [2, -1], "guidance": 3, "sampler": "ddim", "steps": 2}
        np.testing.assert_array_equal(
            again.sample(found, jax.random.key(0), 2, **options),
            ddpm.sample(params, jax.random.key(0), 2, **options),
        )


def test_a_file_whose_classes_are_not_counted_is_refused(tiny, tmp_path, capsys):
    file = tmp_path / "x.safetensors"
    config = with_(tiny, model={"num_classes": "auto"})
    write_single_file(file, config, {"a": np.zeros(1)}, FROM)
    assert "x.safetensors: does not describe its model" in refused(capsys, "sample", file)


def test_rows_of_classes_are_not_taken_for_those_of_no_class(tiny, tmp_path):
    """Four rows are four classes, or three and no class."""
    config = with_(tiny, model={"num_classes": 4, "no_class": False})
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), DDPM(config).shapes)
    write_single_file(tmp_path / "x.safetensors", config, params, FROM)
    ddpm = DDPM(with_(tiny, model={"num_classes": 3}))
    with pytest.raises(UserError, match=r"model\.num_classes is 4 there, but 3 in this config"):
        weights_for(ddpm, tmp_path / "x.safetensors", make_mesh(1))
    assert weights_for(DDPM(config), tmp_path / "x.safetensors", make_mesh(1)).step == 2
