"""A run on values other than 8-bit levels, from the array to its samples and its likelihood."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import on_one_device
from PIL import Image

from ddpm_jax import fit
from ddpm_jax.cli import main
from ddpm_jax.cli.parsing import with_numbers
from ddpm_jax.compression import compress
from ddpm_jax.data.images import grid
from ddpm_jax.data.view import View
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.features import check_inception
from ddpm_jax.evaluation.splits import read_split
from ddpm_jax.weights.load import load_weights

SHAPE = (8, 8, 2)


@pytest.fixture(scope="module")
def fields():
    """float32 [40,8,8,2] with numbers far from 0."""
    noise = np.random.default_rng(3).normal(size=(40, *SHAPE))
    return (280 + noise * [3.0, 0.5]).astype(np.float32)


@pytest.fixture(scope="module")
def field_config(tiny):
    data = {"image_shape": SHAPE, "values": "standardise", "per_channel": True}
    return on_one_device(tiny, data=data, train={"steps": 2})


@pytest.fixture(scope="module")
def field_run(field_config, fields, tmp_path_factory):
    """A run of two steps on the fields, which lie in an npy file."""
    folder = tmp_path_factory.mktemp("fields")
    np.save(folder / "fields.npy", fields)
    data = dataclasses.replace(field_config.data, source=f"npy:{folder}/fields.npy")
    fit(dataclasses.replace(field_config, data=data), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def model(field_run):
    return load_weights(field_run)


@pytest.fixture(scope="module")
def samples(model):
    """Samples 0, 1 and 2 of seed 5 in the model's units."""
    return model.ddpm.sample(model.params, jax.random.key(5), 3, steps=3)


def sample(run, out, *options):
    return main(
        ["sample", str(run), "-n", "3", "--seed", "5", "--steps", "3", "--out", str(out), *options]
    )


def test_the_run_keeps_where_the_models_units_lie(model, fields):
    data = model.ddpm.config.data
    assert data.dtype == "float32"
    np.testing.assert_allclose(data.offset, [280, 280], atol=0.2)
    np.testing.assert_allclose(data.scale, [3, 0.5], rtol=0.1)
    assert not model.ddpm.config.diffusion.clip
    x = model.ddpm.from_data(fields)
    np.testing.assert_allclose(model.ddpm.to_data(x), fields, rtol=1e-6)


def test_samples_are_not_clipped_and_come_out_in_the_datas_units(
    field_run, model, samples, tmp_path
):
    expected = model.ddpm.to_data(samples)
    assert np.abs(samples).max() > 1
    assert expected.dtype == np.float32 and 200 < expected.mean() < 360
    for name in ("some.npy", "some.npz"):
        assert sample(field_run, tmp_path / name) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "some.npy"), expected)
    np.testing.assert_array_equal(np.load(tmp_path / "some.npz")["images"], expected)


def test_a_folder_of_samples_is_filled_up_with_the_same_files(
    field_run, model, samples, tmp_path, capsys
):
    folder = f"{tmp_path}/folder/"
    for kind in ("npy", "tif"):
        assert sample(field_run, f"{folder}{kind}/", "--files", kind) == 0
    file = tmp_path / "folder/npy/000001.npy"
    np.testing.assert_array_equal(np.load(file), model.ddpm.to_data(samples)[1])
    before = file.read_bytes()
    file.write_bytes(before[:-1])
    assert sample(field_run, f"{folder}npy/") == 0
    assert "drawing the missing 1 of 3 images" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_pictures_show_chosen_channels_and_say_how(field_run, model, samples, tmp_path, capsys):
    assert sample(field_run, tmp_path / "grid.png", "--channels", "2", "1", "2") == 0
    shown = samples[..., [1, 0, 1]] / 3
    expected = grid(np.clip(np.rint((shown + 1) * 127.5), 0, 255).astype(np.uint8))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "grid.png")), expected)
    data = model.ddpm.config.data
    black = [f"{data.offset[c] - 3 * data.scale[c]:.5g}" for c in (1, 0, 1)]
    assert f"in the picture, black is {', '.join(black)} and white" in capsys.readouterr().err
    with pytest.raises(UserError, match="channels: these images have the channels 1 to 2, got 3"):
        View(data, (3,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--files", "png"], "out: a PNG has 1 or 3 channels, not 2"),
        (["--channels", "1"], "channels: only applies to a grid"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(field_run, tmp_path, capsys, options, message):
    assert sample(field_run, f"{tmp_path}/folder/", *options) == 2
    assert message in capsys.readouterr().err


def test_the_likelihood_is_a_density_in_the_datas_units(field_run, model, fields, capsys):
    """Against the bound in the model's units and the change of variables by hand."""
    assert main(["likelihood", str(field_run)]) == 0
    printed = capsys.readouterr().out
    summary = json.loads(next(field_run.glob("likelihood/*/likelihood.json")).read_text())
    ddpm = model.ddpm
    held_out = sorted(set(range(40)) - set(trained_on(model)))
    key = jax.random.fold_in(jax.random.key(0), 0)
    bits = ddpm.bits_per_dim(model.params, key, ddpm.from_data(fields[held_out])).total.mean()
    np.testing.assert_allclose(summary["total"], bits, rtol=1e-5)
    # Of the model's units, without bins of 2/255, and then of the data's.
    nats = -(bits + np.log2(2 / 255)) * 128 * np.log(2)
    nats -= 64 * np.log(ddpm.config.data.scale).sum()
    np.testing.assert_allclose(summary["log_density"], nats, rtol=1e-4)
    np.testing.assert_allclose(
        summary["resolution"], 2 / 255 * np.array(ddpm.config.data.scale), rtol=1e-6
    )
    assert "nats an image, in the data's units" in printed

    assert main(["likelihood", str(field_run), "--resolution", "0.01"]) == 0
    coarse = json.loads(next(field_run.glob("likelihood/*/likelihood.json")).read_text())
    np.testing.assert_allclose(coarse["log_density"], summary["log_density"])
    expected = -coarse["log_density"] / 128 / np.log(2) - np.log2(0.01)
    np.testing.assert_allclose(coarse["total"], expected, rtol=1e-6)
    assert "bins of 0.01 in the data's units" in capsys.readouterr().out


def trained_on(model):
    """The places of the images that the run trained on."""
    return read_split(model, "train").indices


def test_an_export_keeps_the_units(field_run, tmp_path, samples):
    file = tmp_path / "model.safetensors"
    assert main(["export", str(field_run), "--out", str(file)]) == 0
    exported = load_weights(file)
    data = load_weights(field_run).ddpm.config.data
    assert exported.ddpm.config.data.offset == data.offset
    assert exported.ddpm.config.data.scale == data.scale
    np.testing.assert_array_equal(
        exported.ddpm.sample(exported.params, jax.random.key(5), 3, steps=3), samples
    )


def test_a_diffusers_folder_keeps_the_units(field_run, model, tmp_path):
    folder = tmp_path / "folder"
    assert main(["export", str(field_run), "--format", "diffusers", "--out", str(folder)]) == 0
    data = load_weights(folder).ddpm.config.data
    for name in ("values", "per_channel", "offset", "scale", "dtype"):
        assert getattr(data, name) == getattr(model.ddpm.config.data, name)
    (folder / "data_values.json").write_text("{}")
    with pytest.raises(UserError, match=r"data_values\.json: must have the fields values, "):
        load_weights(folder)


def test_other_values_do_not_resume(field_config, field_run, fields):
    data = dataclasses.replace(
        field_config.data, source=f"npy:{field_run.parent}/fields.npy", per_channel=False
    )
    with pytest.raises(UserError, match=r"data\.per_channel was True and is False"):
        fit(dataclasses.replace(field_config, data=data), field_run)


def test_the_codec_and_inception_refuse_what_they_were_not_made_for(model):
    with pytest.raises(UserError, match=r"inception: .* 2 channels of values standardise"):
        check_inception(model.ddpm.config.data)
    with pytest.raises(UserError, match=r"compression: is for 8-bit images, .* standardise"):
        compress(model.ddpm, model.params, np.zeros((1, *SHAPE), np.uint8))


def test_16_bit_images_keep_their_levels(tiny, tmp_path):
    images = np.random.default_rng(4).integers(0, 2**16, (40, 8, 8, 1), dtype=np.uint16)
    config = on_one_device(tiny, data={"values": "uint16"}, train={"steps": 2})
    fit(config, tmp_path / "run", images)
    model = load_weights(tmp_path / "run")
    x = model.ddpm.from_data(images)
    np.testing.assert_allclose(x, images / 32_767.5 - 1, atol=1e-6)
    assert sample(tmp_path / "run", f"{tmp_path}/folder/") == 0
    drawn = model.ddpm.sample(model.params, jax.random.key(5), 3, steps=3)
    expected = np.rint((drawn + 1) * 32_767.5).astype(np.uint16)
    for i in range(3):
        picture = np.asarray(Image.open(tmp_path / f"folder/00000{i}.png"))
        np.testing.assert_array_equal(picture, expected[i, ..., 0])


def test_numbers_after_data_values_belong_to_it():
    args = ["--data.values", "range", "-5", "1e3", "--train.steps", "5"]
    assert with_numbers(args) == ["--data.values", "range -5 1e3", "--train.steps", "5"]
    assert with_numbers(["--data.values", "uint16", "--n", "2"]) == [
        "--data.values",
        "uint16",
        "--n",
        "2",
    ]
