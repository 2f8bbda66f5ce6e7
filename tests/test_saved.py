"""A run that was saved by version 0.1, before the package had rooms: it still does all it did.

`data/run_0_1` is two updates of a tiny network on the embedded digits; `data/values_0_1.npz` holds
what that version made of it. Bits differ between CPUs, so stored values are met to 1e-5.
"""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import lines, on_one_device

from ddpm_jax import ddpm as ddpm_module
from ddpm_jax import fit, load
from ddpm_jax.cli import main
from ddpm_jax.config import Config, from_dict, meanings, to_dict, value_of
from ddpm_jax.ddpm import DDPM
from ddpm_jax.storage.run import read_config
from ddpm_jax.weights.load import load_weights

DATA = Path(__file__).parent / "data"
CONFIG = json.loads((DATA / "run_0_1/config.json").read_text())


@pytest.fixture(scope="module")
def values():
    with np.load(DATA / "values_0_1.npz") as arrays:
        return dict(arrays)


@pytest.fixture
def saved(tmp_path):
    """A copy of the run, to write into."""
    return shutil.copytree(DATA / "run_0_1", tmp_path / "run")


@pytest.fixture(scope="module")
def model():
    ddpm, params = load(DATA / "run_0_1", weights="raw")
    # After two updates the network's output is almost nothing.
    kernel = params["out_conv"]["kernel"]
    params["out_conv"]["kernel"] = 0.1 * jax.random.normal(jax.random.key(1), kernel.shape)
    return ddpm, params


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ancestral", {}),
        ("ddim", {"sampler": "ddim", "steps": 5, "eta": 0.5, "grid": "quad"}),
        # Its default grid then.
        ("dpm-solver++", {"sampler": "dpm-solver++", "steps": 4, "grid": "trailing"}),
    ],
)
def test_a_key_gives_the_same_images(model, values, name, options):
    ddpm, params = model
    x = ddpm.sample(params, jax.random.key(3), 3, **options)
    np.testing.assert_allclose(x, values[name], atol=1e-5)


def test_a_key_gives_the_same_loss_and_likelihood(model, values):
    ddpm, params = model
    loss = ddpm.loss(params, jax.random.key(3), values["x_0"], train=True)
    np.testing.assert_allclose(loss, values["loss"], rtol=1e-5)
    bits = ddpm.bits_per_dim(params, jax.random.key(3), values["x_0"])
    for name, value in bits._asdict().items():
        np.testing.assert_allclose(value, values[f"bits_{name}"], rtol=1e-5, atol=1e-6)


def test_its_identity_is_the_same(values):
    """Folders of samples and measurements compare it."""
    assert load_weights(DATA / "run_0_1").label == json.loads(str(values["label"]))


def test_it_resumes(saved, values):
    config = on_one_device(read_config(saved), train={"steps": 4})
    state = fit(config, saved)
    losses = [line["loss"] for line in lines(saved)]
    np.testing.assert_allclose(losses, values["loss_lines"], rtol=1e-4)
    for name in ("params", "ema_params"):
        leaves = jax.tree.leaves(getattr(state, name))
        flat = np.concatenate([np.ravel(leaf) for leaf in leaves])
        # Adam divides by the gradient's size: where that is almost 0, rounding decides the sign.
        assert np.mean(np.abs(flat - values[f"{name}_4"]) > 1e-5) < 0.01


def test_it_is_exported_and_read_back(saved, tmp_path):
    file = tmp_path / "model.safetensors"
    assert main(["export", str(saved), "--out", str(file)]) == 0
    ddpm, params = load(file)
    before, expected = load(saved)
    assert ddpm.process_digest == before.process_digest
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize("name", meanings(Config))
def test_a_config_that_lacks_a_field_is_the_one_with_its_default(name):
    """As runs that were saved before the field was there."""
    stored = to_dict(Config())
    group, _, field = name.rpartition(".")
    del (stored[group] if group else stored)[field]
    assert from_dict(stored) == Config()


def test_a_new_field_changes_the_process_digest_only_where_it_is_not_the_default(monkeypatch):
    """`clip` stands for a field that the first digests did not hash."""
    first = [name for name in ddpm_module.HASHED_FIRST if name != "diffusion.clip"]
    monkeypatch.setattr(ddpm_module, "HASHED_FIRST", first)
    config = Config()
    clipped = DDPM(config).process_digest
    others = [dataclasses.replace(config.diffusion, clip=clip) for clip in (False, "dynamic")]
    hashed = hashlib.blake2b(
        repr(tuple(value_of(config, name) for name in first)).encode(), digest_size=8
    )
    hashed.update(np.asarray(DDPM(config).schedule.betas))
    assert clipped == hashed.hexdigest()
    digests = {
        DDPM(dataclasses.replace(config, diffusion=other)).process_digest for other in others
    }
    assert len(digests) == 2 and clipped not in digests


def test_a_field_without_a_meaning_is_refused():
    @dataclasses.dataclass
    class Group:
        field: int = 0

    with pytest.raises(TypeError, match="field: say what the field decides"):
        meanings(Group)


def test_new_fields_leave_the_saved_config_as_it_was():
    """Those that this run lacks; and what is there is read as it was written."""
    config = read_config(DATA / "run_0_1")
    for name in meanings(Config):
        group, _, field = name.rpartition(".")
        stored = CONFIG[group] if group else CONFIG
        value = value_of(config, name)
        if field not in stored:
            assert value == value_of(Config(), name), name
        else:
            assert json.loads(json.dumps(value)) == stored[field], name
