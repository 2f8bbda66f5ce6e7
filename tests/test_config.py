"""Configs refuse what makes no sense, in one line, and survive JSON."""

import dataclasses
import json
import runpy
from pathlib import Path

import pytest

from ddpm_jax import Config, UserError, load_config
from ddpm_jax.config import (
    Data,
    Diffusion,
    Model,
    Optim,
    Train,
    flatten,
    from_dict,
    shipped_configs,
    to_dict,
)


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_config_survives_json(name):
    config = load_config(name)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert hash(config) == hash(load_config(str(shipped_configs()[name])))


def test_runs_from_before_a_field_take_its_default(tiny):
    values = to_dict(tiny)
    del values["diffusion"]["clip"]
    assert from_dict(values) == tiny and tiny.diffusion.clip is True
    values["diffusion"]["clip"] = "dynamic"
    assert to_dict(from_dict(values)) == values


def test_the_defaults_are_the_papers_cifar10():
    config = load_config("cifar10")
    assert config.optim == Optim(
        learning_rate=2e-4, warmup_steps=5000, clip_norm=1.0, ema_decay=0.9999
    )
    assert (config.train.steps, config.train.batch_size, config.model.dropout) == (
        800_000,
        128,
        0.1,
    )
    assert (config.diffusion.variance, config.data.flip) == ("fixed_large", True)
    large = load_config("lsun_bedroom")
    assert (large.optim.learning_rate, large.train.batch_size, large.model.dropout) == (
        2e-5,
        64,
        0.0,
    )
    assert (large.diffusion.variance, large.data.flip) == ("fixed_small", False)
    assert load_config("lsun_cat").data.flip and load_config("lsun_church").train.steps == 1_200_000


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Optim(learning_rate=-1.0), "optim.learning_rate: must be above 0, got -1.0"),
        (
            lambda: Optim(learning_rate=float("nan")),
            "optim.learning_rate: must be above 0, got nan",
        ),
        (lambda: Optim(ema_decay=1.0), "optim.ema_decay: must be at least 0 and below 1, got 1.0"),
        (lambda: Train(batch_size="3"), "train.batch_size: must be of type int, got '3'"),
        (lambda: Train(steps=True), "train.steps: must be of type int, got True"),
        (lambda: Data(flip=1), "data.flip: must be of type bool, got 1"),
        (
            lambda: Data(source="imagenet"),
            "data.source: must be digits, folder:PATH, npz:PATH, npy:PATH, hf:PATH or tfds:NAME, "
            "got 'imagenet'",
        ),
        (
            lambda: Data(source="tfds:"),
            "data.source: must be digits, folder:PATH, npz:PATH, npy:PATH, hf:PATH or tfds:NAME, "
            "got 'tfds:'",
        ),
        (
            lambda: Data(image_shape=(3, 3)),
            "data.image_shape: must be a tuple of 3 numbers, got (3, 3)",
        ),
        (
            lambda: Data(image_shape=(8, 0, 3)),
            "data.image_shape: must be at least 1 and at most 65536, got 0",
        ),
        (
            lambda: Model(channel_multipliers=()),
            "model.channel_multipliers: must have one number per level, got none",
        ),
        (
            lambda: Model(base_channels=48),
            "model.norm_groups: 32 does not divide the 48 channels of a level; choose a divisor",
        ),
        (
            lambda: Model(dtype="float16"),
            "model.dtype: must be one of float32, bfloat16, got 'float16'",
        ),
        (
            lambda: Diffusion(schedule="cosine", beta_end=0.1),
            "diffusion.beta_end: schedule 'cosine' does not use it; leave it out",
        ),
        (
            lambda: Diffusion(variance="learned"),
            "diffusion.loss: the simple loss cannot train a learned variance (learned); "
            "choose hybrid or vlb, or a fixed variance",
        ),
        (
            lambda: Diffusion(loss="hybrid"),
            "diffusion.loss: hybrid needs a learned variance, and fixed_large is fixed; "
            "choose simple, or diffusion.variance learned_range",
        ),
        (
            lambda: Diffusion(loss="vlb", min_snr_gamma=5.0),
            "diffusion.min_snr_gamma: loss vlb has weights of its own; leave it out or choose "
            "another loss",
        ),
        (
            lambda: Diffusion(schedule="jsd", loss="vlb"),
            "diffusion.prediction: with schedule jsd, x_T has no trace of the image, and the "
            "bound with eps is infinite; choose x_0, mean or v, or diffusion.loss simple",
        ),
        (
            lambda: Diffusion(beta_end=1.0, loss="vlb"),
            "diffusion.prediction: with schedule linear of these betas, x_T has no trace of the "
            "image, and the bound with eps is infinite; choose x_0, mean or v, or diffusion.loss "
            "simple",
        ),
        (
            lambda: Diffusion(
                schedule="const", beta_end=0.2, loss="hybrid", variance="learned_range"
            ),
            "diffusion.prediction: with schedule const of these betas, x_T has no trace of the "
            "image, and the bound with eps is infinite in float32; choose x_0, mean or v, or "
            "diffusion.loss simple",
        ),
        (
            lambda: Diffusion(beta_start=1e-17),
            "diffusion.beta_start: must be at least 1e-11 and at most 1, got 1e-17",
        ),
        (lambda: Diffusion(min_snr_gamma=0.0), "diffusion.min_snr_gamma: must be above 0, got 0.0"),
        (
            lambda: Data(test="tfds"),
            "data.test: must be folder:PATH, npz:PATH, npy:PATH, hf:PATH or tfds:NAME, got 'tfds'",
        ),
        (
            lambda: Config(data=Data(image_shape=(36, 32, 3))),
            "data.image_shape: 36x32 is not divisible by 8, "
            "which the 4 levels of model.channel_multipliers need; choose another size",
        ),
        (
            lambda: Diffusion(clip="yes"),
            "diffusion.clip: must be True, False or dynamic, got 'yes'",
        ),
        (lambda: Diffusion(clip=1), "diffusion.clip: must be True, False or dynamic, got 1"),
        (lambda: Config(seed=-1), "seed: must be at least 0 and below 4294967296, got -1"),
        (
            lambda: from_dict({"optim": {"lr": 1}}),
            "optim.lr: unknown field; "
            "choose one of learning_rate, warmup_steps, clip_norm, clip, ema_decay, ema_warmup",
        ),
        (lambda: from_dict({"optim": 3}), "optim: must be a table of fields, got 3"),
    ],
)
def test_nonsense_is_refused_by_name(make, message):
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == message


@pytest.mark.parametrize("schedule", ["linear", "cosine", "const", "jsd"])
def test_every_schedule_can_be_configured(schedule):
    assert Diffusion(schedule=schedule).schedule_parameters == {}
    if schedule == "linear":
        assert Diffusion(beta_start=0.1).schedule_parameters == {"beta_start": 0.1}


def test_a_config_file_that_is_none_is_named(tmp_path):
    file = tmp_path / "mine.py"
    for content, message in [
        ("x = 1", "must define CONFIG"),
        ("1 / 0", r"cannot be loaded \(ZeroDivisionError: .*\); fix it"),
    ]:
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            load_config(str(file))
    with pytest.raises(UserError, match=r"the shipped ones are .*cifar10"):
        load_config("cifar11")


def test_flatten_names_every_field():
    flat = flatten(to_dict(Config()))
    groups = [field for field in dataclasses.fields(Config) if field.name != "seed"]
    assert len(flat) == 1 + sum(len(dataclasses.fields(group.type)) for group in groups)
    assert flat["optim.learning_rate"] == 2e-4


TABLE_2 = {
    "cifar10_mean_vlb_learned": ("mean", "vlb", "learned"),
    "cifar10_mean_vlb_fixed": ("mean", "vlb", "fixed_large"),
    "cifar10_mean_mse": ("mean", "simple", "fixed_large"),
    "cifar10_eps_vlb_learned": ("eps", "vlb", "learned"),
    "cifar10_eps_vlb_fixed": ("eps", "vlb", "fixed_large"),
    "cifar10": ("eps", "simple", "fixed_large"),
}


def test_the_rows_of_table_2_differ_in_what_they_learn_alone():
    cifar10 = load_config("cifar10")
    for name, row in TABLE_2.items():
        config = load_config(name)
        assert (
            config.diffusion.prediction,
            config.diffusion.loss,
            config.diffusion.variance,
        ) == row
        clip_norm = (
            1000.0 if config.diffusion.loss == "vlb" else 1.0
        )  # The bound is T times the released code's.
        optim = dataclasses.replace(cifar10.optim, clip_norm=clip_norm)
        assert config == dataclasses.replace(cifar10, diffusion=config.diffusion, optim=optim)


@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "cifar10"])
def test_a_config_with_classes_differs_in_them_alone(name):
    base = load_config(name)
    model = dataclasses.replace(base.model, num_classes=10)
    assert load_config(f"{name}_class") == dataclasses.replace(base, model=model)


def test_the_script_of_table_2_trains_the_same_six_on_the_digits():
    script = runpy.run_path(str(Path(__file__).parent.parent / "scripts/table2.py"))
    assert [name for name, _ in script["ROWS"].values()] == list(TABLE_2)
    for name in TABLE_2:
        config = script["config_of"](name, 7)
        assert (
            config.diffusion == load_config(name).diffusion
            and config.data == load_config("digits").data
        )
        assert (config.train.steps, config.optim.clip_norm) == (
            7,
            load_config(name).optim.clip_norm,
        )
