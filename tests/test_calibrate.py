"""`ddpm-jax calibrate`: what it measures, keeps, exports and loads again."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import messages, refused
from etils import epath
from scipy import stats

from ddpm_jax import DDPM, UserError, load
from ddpm_jax.calibration import DECODER_VARIANCES, Calibration, cell_grid
from ddpm_jax.cli import main
from ddpm_jax.devices.mesh import make_mesh
from ddpm_jax.diffusion import predict_x_0, q_sample
from ddpm_jax.evaluation import bound, bound_parts
from ddpm_jax.evaluation.calibrate import calibrate, table
from ddpm_jax.evaluation.errors import Errors, read_errors
from ddpm_jax.evaluation.splits import calibration_split, first_of, read_split
from ddpm_jax.keys import example_keys, gaussian_noise
from ddpm_jax.sampler import Sampler, Tuned
from ddpm_jax.storage.files import npz
from ddpm_jax.storage.measured import (
    NOTHING_MEASURED,
    Measured,
    identity_of,
    read_measured,
    write_calibration,
    write_tuned,
)
from ddpm_jax.weights.export import export
from ddpm_jax.weights.load import load_weights, with_measured

ABOUT = {"seed": 3, "split": "holdout", "data_fingerprint": "abc"}
TUNED = Tuned(
    grids=(Sampler("unipc", timesteps=(1, 4, 9), order=2),),
    choices=(Sampler("ddim", timesteps=(2, 9), eta=0.5), Sampler("heun", timesteps=(0, 9))),
)


@pytest.fixture(scope="module", autouse=True)
def small_parts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bound_parts, "PART", 3)
        yield


@pytest.fixture(scope="module")
def calibrated(run, tmp_path_factory):
    """(a copy of the run that is calibrated, what the command says)."""
    copy = shutil.copytree(run, tmp_path_factory.mktemp("calibrated") / "run")
    model = load_weights(copy, mesh=make_mesh())
    images, first = first_of(read_split(model, calibration_split(model)), 8)
    return copy, calibrate(model, images, first, seed=1, batch_size=3).ddpm


def random_calibration(ddpm, seed=0):
    rng = np.random.default_rng(seed)
    T = ddpm.schedule.num_timesteps
    shape = (T, *cell_grid(ddpm.image_shape))
    cells, cells_error = rng.uniform(0, 1, (2, *shape)).astype(np.float32)
    return Calibration(rng.uniform(0, 1, T), rng.uniform(0, 1, T), cells, cells_error, 7)


def test_the_errors_are_those_of_the_held_out_images(calibrated, pictures):
    copy, ddpm = calibrated
    found = ddpm.calibration
    model = load_weights(copy)
    held_out = read_split(model, "holdout").indices[:8]
    x_0 = np.float32(pictures[held_out]) / 127.5 - 1
    key = jax.random.fold_in(jax.random.key(1), 0)
    bits = model.ddpm.bits_per_dim(model.params, key, x_0, cells=True)
    mse, cells = np.float64(bits.mse), np.float64(bits.cells)
    np.testing.assert_allclose(found.mse, mse.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.error, mse.std(0, ddof=1) / np.sqrt(8), rtol=1e-3)
    np.testing.assert_allclose(found.cells, cells.mean(0), rtol=1e-3, atol=1e-6)
    expected = cells.std(0, ddof=1) / np.sqrt(8)
    np.testing.assert_allclose(found.cells_error, expected, rtol=1e-2, atol=1e-6)
    np.testing.assert_allclose(found.cells.mean(axis=(1, 2, 3)), found.mse, rtol=1e-6)
    assert found.images == 8 and found.cells.shape == (10, 8, 8, 1)


def test_the_decoders_variance_has_the_least_l_0(calibrated, pictures):
    """Eq. 13 in float64 by scipy, over many variances."""
    copy, ddpm = calibrated
    model = load_weights(copy)
    x_0 = np.float32(pictures[read_split(model, "holdout").indices[:8]]) / 127.5 - 1
    keys = example_keys(jax.random.fold_in(jax.random.key(1), 0), np.arange(8, dtype=np.uint32))
    t = jnp.zeros(8, jnp.int32)
    x_1 = q_sample(ddpm.schedule, x_0, t, gaussian_noise(keys, 0, x_0.shape[1:]))
    eps = ddpm.denoise(model.params, x_1, t)
    mean = np.float64(predict_x_0(ddpm.schedule, eps, x_1, t, prediction="eps")).clip(-1, 1)

    def bits(variance):
        upper = np.where(x_0 > 0.999, np.inf, x_0 + 1 / 255)
        lower = np.where(x_0 < -0.999, -np.inf, x_0 - 1 / 255)
        cdf = [stats.norm.cdf(end, mean, np.sqrt(variance)) for end in (lower, upper)]
        return -np.log2(np.maximum(cdf[1] - cdf[0], 1e-300)).mean()

    found = ddpm.calibration.decoder
    around = found * np.geomspace(0.5, 2, 201)
    measured = [bits(variance) for variance in around]
    assert bits(found) < min(measured) + 1e-4
    assert bits(found) < bits(ddpm.calibration.mse[0]) + 1e-4
    listed = model.ddpm.decoder_bits(
        model.params, jax.random.fold_in(jax.random.key(1), 0), x_0, around[::50]
    )
    np.testing.assert_allclose(listed.mean(0), measured[::50], rtol=1e-4)


def test_a_run_keeps_them_and_loads_them_with_these_weights_alone(calibrated, pictures):
    copy, ddpm = calibrated
    loaded = load_weights(copy)
    assert load(copy)[0] == ddpm and load(copy)[0].config == ddpm.config
    assert loaded.ddpm.calibration == ddpm.calibration
    fingerprint = loaded.data_fingerprint
    about = {"seed": 1, "split": "holdout", "data_fingerprint": fingerprint}
    assert loaded.measured.of_calibration == about
    with np.load(copy / "calibration.npz") as file:
        assert file["version"] == 1 and file["images"] == 8 and file["split"] == "holdout"
        assert file["parameters"] == loaded.label["parameters"]
        assert file["process"] == loaded.label["process"]
    assert load(copy, weights="raw")[0].calibration is None


BITS_OF_EACH = bound_parts.bits_of_each


def noted(monkeypatch, most=None):
    """The first image of each group that is measured; after `most` of them comes a Ctrl-C."""
    starts = []

    def bits_of_each(*args):
        for images, bits in BITS_OF_EACH(*args):
            if len(starts) == most:
                raise KeyboardInterrupt
            starts.append(images.start)
            yield images, bits

    monkeypatch.setattr(bound_parts, "bits_of_each", bits_of_each)
    return starts


def test_the_command_prints_the_errors_and_what_they_save(calibrated, capsys, monkeypatch):
    copy, ddpm = calibrated
    measured = noted(monkeypatch)
    args = ["calibrate", str(copy), "--images", "8", "--seed", "1", "--batch-size", "3"]
    assert main(args) == 0
    assert not measured, "every part is there"
    printed = capsys.readouterr().out
    assert printed.strip() == table(load_weights(copy)).strip()
    assert printed.startswith("holdout, 8 images, ema weights of step 2\n")
    rmse = 127.5 * np.sqrt(ddpm.calibration.mse[4])
    assert f"     4  {rmse:11.4f}" in printed
    assert "    10  fixed_large " in printed


def test_neither_a_kill_nor_another_batch_size_changes_them(
    calibrated, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO", "ddpm_jax")
    copy, ddpm = calibrated
    model = load_weights(copy, mesh=make_mesh())
    images, first = first_of(read_split(model, "holdout"), 8)
    calls = noted(monkeypatch, most=2)
    out = tmp_path / "x.npz"
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, images, first, seed=1, batch_size=3, out=out)
    assert read_errors(epath.Path(tmp_path / "x-parts"), ddpm, 8).images == 6 and not out.exists()
    calls = noted(monkeypatch)
    # The parts of images 0 to 5 are there; those of a killed batch were not written, its sums were.
    max((tmp_path / "x-parts/parts").iterdir()).unlink()
    again = calibrate(model, images, first, seed=1, batch_size=3, out=out).ddpm.calibration
    assert calls == [3, 6] and again == ddpm.calibration
    other = calibrate(model, images, first, seed=1, batch_size=8, out=tmp_path / "y.npz")
    assert "commands use it once it is calibration.npz in the model's folder" in messages(caplog)
    np.testing.assert_allclose(other.ddpm.calibration.mse, again.mse, rtol=1e-5)
    np.testing.assert_allclose(other.ddpm.calibration.cells, again.cells, rtol=1e-3, atol=1e-6)


def test_parts_without_errors_are_measured_again_for_them_alone(calibrated, tmp_path, monkeypatch):
    """Those of an older version are still the likelihood's."""
    copy, ddpm = calibrated
    model = load_weights(copy, mesh=make_mesh())
    images, _ = first_of(read_split(model, "holdout"), 8)
    options = {"seed": 1, "batch_size": 3, "out": tmp_path / "old"}
    (older,) = (copy / "likelihood").iterdir()
    shutil.copytree(older / "parts", tmp_path / "old/parts")
    label = json.loads((older / "label.json").read_text())
    del label["chain"]  # Of a version that knew the whole chain alone.
    (tmp_path / "old/label.json").write_text(json.dumps(label))
    calls = noted(monkeypatch)
    assert bound.measure(model, images, **options).calibration is None and not calls
    again = bound.measure(model, images, **options, calibrating=True)
    assert again.calibration == ddpm.calibration and len(calls) == 3
    with pytest.raises(UserError, match=r"chain.variance 'fixed_large', not 'optimal'"):
        bound.measure(model, images, **options, sampler=Sampler(variance="optimal"))


def test_likelihood_feeds_a_run_that_has_none(calibrated, tmp_path, caplog):
    copy, ddpm = calibrated
    caplog.set_level("INFO")
    shutil.copytree(copy, tmp_path / "run")
    (tmp_path / "run/calibration.npz").unlink()
    options = {"batch_size": 3}

    def likelihood(split, n, **given):
        model = load_weights(tmp_path / "run", mesh=make_mesh())
        images, first = first_of(read_split(model, split), n)
        bound.measure(model, images, first=first, **options, **given)
        return load_weights(tmp_path / "run").ddpm.calibration

    assert likelihood("train", 3) is None
    assert likelihood("holdout", 3, out=tmp_path / "elsewhere") is None
    assert likelihood("holdout", 8, seed=1) == ddpm.calibration
    assert any("calibration by 8 images" in line for line in messages(caplog))
    # It is not replaced by a measurement of fewer images, but by one of more.
    assert likelihood("holdout", 3) == ddpm.calibration
    (tmp_path / "run/calibration.npz").unlink()
    assert likelihood("holdout", 3, seed=2).images == 3
    assert likelihood("holdout", 8, seed=1) == ddpm.calibration


def test_a_chain_has_a_folder_of_its_own(calibrated, capsys):
    copy, _ = calibrated
    args = ["likelihood", str(copy), "--split", "holdout", "--images", "3", "--batch-size", "3"]
    assert main([*args, "--steps", "4", "--variance", "optimal"]) == 0
    printed = capsys.readouterr().out
    assert "holdout, 3 images" in printed
    assert "\n4 of 10 steps, variance optimal, by the calibration\n" in printed
    (folder,) = (copy / "likelihood").glob("*-first3-4-optimal-*")
    chain = json.loads((folder / "likelihood.json").read_text())["chain"]
    assert chain["timesteps"] == [0, 3, 6, 9] and chain["variance"] == "optimal"
    with np.load(folder / "curves.npz") as curves:
        np.testing.assert_array_equal(curves["timesteps"], [0, 3, 6, 9])
        assert curves["rate"].shape == (4,)
    for options, says in [
        (["--steps", "4", "--grid", "trailing"], "L_0 is of step 0"),
        (["--grid", "quad"], "grid: quad requires --steps"),
        (["--steps", "4", "--grid", "likelihood", "--weights", "raw"], "calibrate RUN"),
    ]:
        assert says in refused(capsys, *args, *options)


def test_a_folder_of_samples_is_of_one_calibration(model, tmp_path, monkeypatch):
    """Another one has other variances, and so other images."""
    from ddpm_jax.evaluation import sample

    monkeypatch.setattr(sample, "_draw", lambda *args: iter(()))
    draw = functools.partial(sample.fill_folder, n=0, seed=0, batch_size=1)
    optimal = Sampler(variance="optimal")
    folder = epath.Path(tmp_path / "x")
    draw(folder, model, sampler=optimal)
    draw(folder, model, sampler=optimal)
    other = model.calibrated(random_calibration(model.ddpm, seed=1), ABOUT)
    with pytest.raises(UserError, match="holds results made with calibration"):
        draw(folder, other, sampler=optimal)
    # Where the variance does not follow from it, it makes no difference.
    draw(epath.Path(tmp_path / "y"), model, sampler=Sampler())
    draw(epath.Path(tmp_path / "y"), other, sampler=Sampler())


def test_more_images_than_there_are_are_all_and_said(calibrated, caplog):
    copy, _ = calibrated
    caplog.set_level("INFO")
    images = read_split(load_weights(copy), "holdout")
    n = len(images.indices)
    assert first_of(images, n) == (images, None) and not messages(caplog)
    assert first_of(images, 100) == (images, None)
    assert messages(caplog) == [f"images: holdout has {n}, which are all taken"]
    some, first = first_of(images, 2)
    assert first == 2 and some.indices.tolist() == images.indices[:2].tolist()


@pytest.fixture(scope="module")
def model(tiny):
    """Weights that are saved nowhere, with all that can be known of them."""
    ddpm = DDPM(tiny)
    params = ddpm.init(jax.random.key(0))
    run = load_weights_like(ddpm, params)
    measured = Measured(random_calibration(ddpm), TUNED, ABOUT, {"seed": 4, "of": [1, "x"]})
    return with_measured(run, measured)


def load_weights_like(ddpm, params):
    from ddpm_jax.weights.load import Loaded

    return Loaded("nowhere", ddpm, params, "ema", 2, "abc")


@pytest.mark.parametrize("format", ["safetensors", "diffusers"])
def test_every_export_carries_what_was_measured(model, tmp_path, format):
    path = epath.Path(tmp_path / ("x.safetensors" if format == "safetensors" else "x"))
    export(path, model, format)
    again = load_weights(path)
    assert again.measured == model.measured
    assert again.ddpm.calibration == model.ddpm.calibration and again.ddpm.tuned == TUNED
    assert load(path)[0].calibration == model.ddpm.calibration
    # And the next export of it.
    export(epath.Path(tmp_path / "y.safetensors"), again, "safetensors")
    assert load_weights(tmp_path / "y.safetensors").measured == model.measured


def test_a_diffusers_folder_has_it_whatever_the_dtype(model, tmp_path):
    """The folder does not say the dtype, so that it is float32 when it is read."""
    config = model.ddpm.config
    half = dataclasses.replace(config.model, dtype="bfloat16")
    ddpm = dataclasses.replace(model.ddpm, config=dataclasses.replace(config, model=half))
    export(epath.Path(tmp_path / "x"), model._replace(ddpm=ddpm), "diffusers")
    assert load_weights(tmp_path / "x").measured == model.measured


def test_programs_have_it_beside_them(model, tmp_path, monkeypatch):
    from ddpm_jax.weights import stablehlo

    class Program:
        def serialize(self):
            return b"program"

    for name in ("sampler_program", "denoiser_program"):
        monkeypatch.setattr(stablehlo, name, lambda *args: Program())
    export(epath.Path(tmp_path / "x"), model, "stablehlo")
    assert read_measured(tmp_path / "x", model.ddpm, model.params) == model.measured
    sums = json.loads((tmp_path / "x/about.json").read_text())["sha256"]
    assert {"calibration.npz", "tuned.json"} < sums.keys()


def test_other_weights_have_nothing_and_say_what_they_replace(model, tmp_path, caplog):
    caplog.set_level("INFO")
    calibration = model.ddpm.calibration
    write_calibration(tmp_path / "calibration.npz", model, calibration, ABOUT)
    write_tuned(tmp_path, model, TUNED, {"seed": 1})
    there = read_measured(tmp_path, model.ddpm, model.params)
    assert there == Measured(calibration, TUNED, ABOUT, {"seed": 1})
    write_calibration(tmp_path / "calibration.npz", model, calibration, ABOUT)
    write_tuned(tmp_path, model, TUNED, {"seed": 1})
    assert not messages(caplog)
    others = model._replace(params=jax.tree.map(lambda leaf: leaf + 1, model.params))
    assert read_measured(tmp_path, model.ddpm, others.params) == NOTHING_MEASURED
    diffusion = dataclasses.replace(model.ddpm.config.diffusion, clip=False)
    process = DDPM(dataclasses.replace(model.ddpm.config, diffusion=diffusion))
    assert read_measured(tmp_path, process, model.params) == NOTHING_MEASURED
    write_calibration(tmp_path / "calibration.npz", others, calibration, ABOUT)
    write_tuned(tmp_path, others, TUNED, {})
    of_calibration, of_tuned = messages(caplog)
    assert "held a calibration of other weights, which this one replaces" in of_calibration
    assert "held samplers tuned to other weights, which these replace" in of_tuned


def test_a_damaged_calibration_gets_one_line(model, tmp_path):
    file = tmp_path / "calibration.npz"
    write_calibration(file, model, model.ddpm.calibration, ABOUT)
    with np.load(file) as opened:
        whole = dict(opened)
    negative = whole["mse"].copy()
    negative[3] = -1
    for damage, says in [
        (None, "cannot be read as npz"),
        ({}, "array 'version' is absent, but must be int64"),
        (whole | {"version": np.array(2)}, "is of format 2, and this version .* reads 1"),
        (whole | {"version": np.array(0)}, "its format has no number"),
        (whole | {"mse": whole["mse"][:4]}, r"array 'mse' is float64 \[4\]"),
        (whole | {"cells": whole["cells"][..., :1, :, :]}, "array 'cells' is float32"),
        (whole | {"more": np.zeros(2)}, "array 'more' is float64"),
        (whole | {"mse": negative}, "mse: must be finite and at least 0; calibrate the model"),
        (whole | {"images": np.array(0)}, "images: must be at least 1"),
        (whole | {"seed": np.array("x")}, "array 'seed' is <U1"),
        ({name: whole[name] for name in whole if name != "error"}, "array 'error' is absent"),
    ]:
        file.write_bytes(b"PK damaged" if damage is None else npz(damage))
        with pytest.raises(UserError, match=says) as refusal:
            read_measured(tmp_path, model.ddpm, model.params)
        assert str(file) in str(refusal.value) and "\n" not in str(refusal.value)


def test_damaged_tuned_samplers_get_one_line(model, tmp_path):
    write_tuned(tmp_path, model, TUNED, {})
    file = tmp_path / "tuned.json"
    whole = json.loads(file.read_text())
    sampler = whole["grids"][0]
    for damage, says in [
        ([], "is not a JSON object"),
        ({}, "does not hold tuned samplers; tune the model again"),
        (whole | {"version": 2}, "is of format 2"),
        (whole | {"version": None}, "its format has no number"),
        (whole | {"grids": {}}, "does not hold tuned samplers"),
        (whole | {"about": 3}, "does not hold tuned samplers"),
        (whole | {"grids": [3]}, "is not a table of options"),
        (whole | {"grids": [sampler | {"more": 1}]}, "has no option 'more'"),
        (whole | {"grids": [sampler | {"order": "x"}]}, "order: must be"),
        (whole | {"grids": [sampler | {"timesteps": None}]}, "lacks timesteps from 0 to 9"),
        (whole | {"choices": [sampler | {"timesteps": [3, 10]}]}, "lacks timesteps from 0 to 9"),
        (whole | {"choices": [sampler | {"timesteps": [3, 2]}]}, "ascending order"),
    ]:
        file.write_text(json.dumps(damage))
        with pytest.raises(UserError, match=says) as refusal:
            read_measured(tmp_path, model.ddpm, model.params)
        assert str(file) in str(refusal.value) and "\n" not in str(refusal.value)
        assert str(refusal.value).endswith("(without this file the model can be tuned again)")


def test_a_file_whose_measurements_are_damaged_gets_one_line(model, tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    path = epath.Path(tmp_path / "x.safetensors")
    export(path, model, "safetensors")
    with safe_open(path, "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        described = json.loads(file.metadata()["ddpm_jax"])
    head = described["calibration"]
    for changed, edited, says in [
        ({"calibration": 3}, {}, "does not describe its calibration; calibrate the model again"),
        ({"calibration": head | {"seed": "x"}}, {}, "does not describe its calibration"),
        ({"calibration": head | {"version": 7}}, {}, "is of format 7"),
        ({}, {"calibration.mse": tensors["calibration.mse"][:3]}, "array 'mse' is float64"),
        ({"tuned": []}, {}, "does not hold tuned samplers"),
    ]:
        metadata = {"ddpm_jax": json.dumps(described | changed)}
        save_file(tensors | edited, path, metadata)
        with pytest.raises(UserError, match=says) as refusal:
            load_weights(path)
        assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_models_that_are_no_run_need_a_place(model, run, tmp_path, capsys):
    path = epath.Path(tmp_path / "x.safetensors")
    export(path, load_weights(run), "safetensors")
    images = ["--data", "npz:/nowhere"]
    out = ["--out", tmp_path / "x.npz"]
    assert "cannot read /nowhere" in refused(capsys, "calibrate", path, *images, *out)
    pictures = f"npz:{run.parent}/pictures.npz"
    images = ["--split", "test", "--data", pictures]
    assert "choose one with --out" in refused(capsys, "calibrate", path, *images)
    for out, says in [
        (tmp_path / "x.bin", "out: must end in .npz, or .safetensors for a new file"),
        (path, "exists already; choose another --out"),
    ]:
        assert says in refused(capsys, "calibrate", path, *images, "--out", out)
    assert "images: must be at least 2" in refused(capsys, "calibrate", path, "--images", 1)
    made = tmp_path / "made.safetensors"
    few = [*images, "--images", "3", "--batch-size", "3", "--out", str(made)]
    assert main(["calibrate", str(path), *few]) == 0
    again = load_weights(made)
    assert again.ddpm.calibration.images == 3 and again.label == load_weights(run).label
    assert again.measured.of_calibration["split"] == "test"


def test_the_sums_are_means_and_standard_errors(tiny, tmp_path):
    """In any portions, and from a file between them."""
    ddpm = DDPM(tiny)
    cells = np.random.default_rng(0).uniform(0, 1, (7, 10, 8, 8, 1)).astype(np.float32)
    of_image = np.arange(7)[:, None]
    logs = np.log(DECODER_VARIANCES)
    decoder = 2 + (logs - (of_image - 12)) ** 2  # The mean of these is the least at e^-9.
    errors = read_errors(epath.Path(tmp_path), ddpm, 7)
    for start, stop in ((0, 2), (0, 3), (2, 7)):  # Some come twice, and count once.
        errors.add(start, cells[start:stop], decoder[start:stop])
        errors.write(epath.Path(tmp_path))
        errors = read_errors(epath.Path(tmp_path), ddpm, 7)
    found = errors.calibration()
    mse = np.float64(cells).mean(axis=(2, 3, 4))
    np.testing.assert_allclose(found.mse, mse.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.error, mse.std(0, ddof=1) / np.sqrt(7), rtol=1e-9)
    np.testing.assert_allclose(found.cells, np.float64(cells).mean(0), rtol=1e-6)
    expected = np.float64(cells).std(0, ddof=1) / np.sqrt(7)
    np.testing.assert_allclose(found.cells_error, expected, rtol=1e-6)
    np.testing.assert_allclose(np.log(found.decoder), -9, rtol=1e-6)
    one = Errors(
        0, *(np.zeros_like(getattr(errors, name)) for name in vars(errors) if name != "images")
    )
    one.add(0, cells[:1], decoder[:1])
    assert not one.calibration().error.any()
    with np.load(tmp_path / "errors.npz") as file:
        whole = dict(file)
    for damage, says in [
        ({"images": whole["images"]}, "array 'mse' is absent"),
        (whole | {"images": np.array(8)}, "is not of 7 images or fewer"),
        (whole | {"images": np.array(-1)}, "is not of 7 images or fewer"),
        (whole | {"cells": -whole["cells"]}, "numbers that are no squares"),
        (whole | {"mse": whole["mse"] * np.nan}, "numbers that are no squares"),
    ]:
        (tmp_path / "errors.npz").write_bytes(npz(damage))
        with pytest.raises(UserError, match=rf"errors.npz: .*{says}"):
            read_errors(epath.Path(tmp_path), ddpm, 7)


def test_the_identity_is_that_of_the_label(model):
    label = model.label
    identity = identity_of(model.ddpm, model.params)
    assert identity.items() <= label.items()
