"""Settings that cannot act say so, and those of the shipped configs, which all act, say nothing."""

import numpy as np
import pytest
from conftest import lines, messages, on_one_device, with_

from ddpm_jax import DDPM, UserError, fit, load_config
from ddpm_jax.cli import main
from ddpm_jax.config import Diffusion, changed, shipped_configs
from ddpm_jax.devices.mesh import make_mesh
from ddpm_jax.sampler import Sampler, _log_idle_grid
from ddpm_jax.training.idle import idle_settings

ATTENTION = "model.attention_resolutions"
ALWAYS = {"num_classes": 10, "no_class": False}


def said(config, streamed=True, held_out=9, devices=8, given=(), has_no_class=False):
    """The lines about `config`, by the names of their settings."""
    found = idle_settings(
        config,
        streamed=streamed,
        held_out=held_out,
        devices=devices,
        given=given,
        has_no_class=has_no_class,
    )
    assert all("\n" not in line for line in found)
    return {line.partition(": ")[0]: line.partition(": ")[2] for line in found}


@pytest.mark.parametrize("name", [*shipped_configs()])
def test_a_shipped_config_is_not_warned_of(name):
    config = load_config(name)
    held_out = 9 if config.data.holdout else 0
    streamed = config.data.source != "digits"
    assert said(config, streamed, held_out, given=changed(config, config)) == {}


def test_the_first_look_that_small32_advises_is_not_warned_of():
    config = load_config("small32")
    shorter = with_(config, data={"image_shape": (16, 16, 3)}, train={"steps": 2500})
    assert said(shorter, streamed=False, given=changed(config, shorter)) == {}


@pytest.mark.parametrize(
    ("change", "where", "name", "words"),
    [
        ({"model": {"attention_resolutions": (7, 16, 64)}}, {}, ATTENTION, "7, 64"),
        ({"train": {"steps": 100}}, {}, "optim.warmup_steps", "only rises to 4e-06"),
        ({"data": {"workers": 8}}, {"streamed": False}, "data.workers", "in memory"),
        ({"data": {"workers": 0}}, {"streamed": False}, "data.workers", "in memory"),
        ({"data": {"source": "digits", "cache_mb": 9}}, {}, "data.cache_mb", "whatever it says"),
        (
            {"data": {"source": "npz:x", "disk_cache_mb": 9}},
            {},
            "data.disk_cache_mb",
            "only folders",
        ),
        ({"data": {"source": "npz:x", "dir": "y"}}, {}, "data.dir", "only tfds"),
        ({"data": {"source": "folder:x", "manual_dir": "y"}}, {}, "data.manual_dir", "only tfds"),
        ({"data": {"source": "npy:x", "workers": 8}}, {}, "data.workers", "a thread reads npy"),
        ({"parallel": {"mode": "pmap"}}, {"devices": 1}, "parallel.mode", "on one device"),
        ({"train": {"eval_every": 7}}, {"held_out": 0}, "train.eval_every", "no images are held"),
        (
            {"train": {"eval_every": 0, "eval_images": 7}},
            {},
            "train.eval_images",
            "no held-out loss",
        ),
        ({"train": {"sample_every": 10**6}}, {}, "train.sample_every", "than train.steps 800000"),
        ({"train": {"eval_every": 10**6}}, {}, "train.eval_every", "after the last step alone"),
        ({"train": {"evaluate_images": 99}}, {}, "train.evaluate_images", "nothing is evaluated"),
        ({"train": {"inception": "x.npz"}}, {}, "train.inception", "nothing is evaluated"),
        ({"train": {"evaluate_every": 10**6}}, {}, "train.evaluate_every", "after the last step"),
        ({"model": {"no_class": False}}, {}, "model.no_class", "no classes at all"),
        ({"data": {"class_names": ("a", "b")}}, {}, "data.class_names", "has no classes"),
        ({"train": {"label_dropout": 0.2}}, {}, "train.label_dropout", "has no classes"),
        ({"train": {"label_dropout": 0.0}}, {}, "train.label_dropout", "has no classes"),
        (
            {"model": ALWAYS, "train": {"label_dropout": 0.2}},
            {},
            "train.label_dropout",
            "keeps its label",
        ),
        (
            {"model": {"num_classes": 10}, "train": {"label_dropout": 0.0}},
            {},
            "train.label_dropout",
            "row of no class is never trained, so guidance",
        ),
        (
            {"model": {"num_classes": 10}, "train": {"label_dropout": 1.0}},
            {},
            "train.label_dropout",
            "no class is ever trained",
        ),
        ({"train": {"log_every": 10**6}}, {}, "train.log_every", "after the last step alone"),
        ({"checkpoint": {"every": 10**6}}, {}, "checkpoint.every", "after the last step alone"),
    ],
)
def test_a_setting_that_cannot_act_is_named(change, where, name, words):
    # All of it acts in this one.
    config = with_(load_config("cifar10"), data={"source": "tfds:cifar10", "test": None})
    other = with_(config, **change)
    found = said(other, **where, given=changed(config, other))
    assert list(found) == [name] and words in found[name]


@pytest.mark.parametrize(
    ("network", "rate"), [({"num_classes": 10}, 0.3), (ALWAYS, 0.0), (ALWAYS, 0.1), ({}, 0.1)]
)
def test_what_acts_on_labels_and_what_is_off_is_not_named(network, rate):
    config = load_config("cifar10")
    assert said(with_(config, model=network, train={"label_dropout": rate})) == {}


def test_images_of_no_class_train_its_row_without_dropout(tiny, pictures, caplog):
    from ddpm_jax.data import from_array
    from ddpm_jax.training.prepare import Prepared, describe

    config = with_(tiny, model={"num_classes": 2}, train={"label_dropout": 0.0})
    for labels, count in [(np.arange(48) % 2, 1), (np.arange(48) % 3 - 1, 0)]:
        source = from_array(pictures, (8, 8, 1), labels)
        caplog.clear()
        nine = np.arange(9)
        describe(Prepared(DDPM(config), make_mesh(), source, nine, nine, None), ())
        assert len([x for x in messages(caplog) if x.startswith("train.label_dropout")]) == count


def test_what_suits_a_longer_run_is_named_where_it_was_asked_for():
    config = with_(load_config("cifar10"), train={"sample_every": 10**6})
    assert said(config) == {}
    assert list(said(config, given={"train.sample_every"})) == ["train.sample_every"]


def test_fewer_steps_than_a_run_has_made_are_refused(copy, caplog):
    """The run is as it was, its config included."""
    from ddpm_jax.storage.run import read_config

    config = read_config(copy)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"train\.steps: 1, but the run in .* is at step 2 already"):
        fit(with_(config, train={"steps": 1}), copy)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    assert lines(copy)[-1]["step"] == 2


def test_the_log_of_a_run_names_what_cannot_act(tiny, pictures, tmp_path, caplog, monkeypatch):
    """Before the run starts; this one does not."""
    from ddpm_jax.training import train

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "_first_state", stop)
    config = on_one_device(tiny, model={"attention_resolutions": (5,)}, train={"log_every": 99})
    with pytest.raises(KeyboardInterrupt):
        fit(config, tmp_path / "run", pictures, given={"train.log_every"})
    warned = [line for line in messages(caplog) if line.startswith(("model.", "train."))]
    assert [line.partition(":")[0] for line in warned] == [
        ATTENTION,
        "train.log_every",
    ]


def test_the_command_line_passes_on_what_was_asked_for(monkeypatch, tmp_path):
    from ddpm_jax.training import train

    calls = []
    monkeypatch.setattr(train, "fit", lambda *args, **options: calls.append(options["given"]))
    asked = ["--train.sample-every", "7", "--data.image-shape", "8", "8", "1"]
    assert main(["train", "digits", "--workdir", str(tmp_path), *asked]) == 0
    assert calls == [{"train.sample_every"}]


def test_a_grid_of_all_steps_makes_no_difference_and_says_so(caplog):
    _log_idle_grid.cache_clear()
    diffusion = Diffusion(num_timesteps=10)
    Sampler("ddim", 9, grid="quad").check(diffusion)
    assert messages(caplog) == []
    Sampler("ddim", 10, grid="quad").check(diffusion)
    assert messages(caplog) == ["grid: quad makes no difference, since all 10 steps are taken"]
