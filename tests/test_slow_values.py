"""Evaluation, tuning, edits and figures of images that are not 8-bit greys or colours."""

import json

import numpy as np
import pytest
from conftest import on_one_device, refused
from PIL import Image

from ddpm_jax import fit
from ddpm_jax.cli import main

pytestmark = pytest.mark.slow
SHAPE = (8, 8, 5)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A run of a few steps on float fields of five channels in two classes."""
    rng = np.random.default_rng(0)
    labels = np.arange(80) % 2
    fields = rng.normal(size=(80, *SHAPE)) + 3 * labels[:, None, None, None] + 100
    folder = tmp_path_factory.mktemp("fields")
    np.savez(folder / "fields.npz", images=fields.astype(np.float32), labels=labels)
    data = {"source": f"npz:{folder}/fields.npz", "image_shape": SHAPE, "values": "standardise"}
    fit(on_one_device(tiny, data=data), folder / "run")
    return folder / "run"


def test_the_proxy_evaluates_any_channels(run, capsys):
    assert main(["evaluate", str(run), "-n", "20", "--steps", "4"]) == 0
    assert "proxy FID" in capsys.readouterr().out
    result = json.loads(next(run.glob("evaluation/*/proxy-20-*.json")).read_text())
    assert np.isfinite(result["values"]["proxy_fid_train"]["value"])
    assert result["features"]["accuracy"] > 0.9  # The classes are three deviations apart.
    files = sorted(run.glob("evaluation/*/samples/*.npy"))
    assert len(files) == 20 and np.load(files[0]).shape == SHAPE


def test_inception_refuses_them(run, capsys, tmp_path):
    line = refused(capsys, "evaluate", run, "-n", "20", "--inception", tmp_path / "any.npz")
    assert "inception: FID's network was made for 8-bit greys and colours" in line
    assert "5 channels of values standardise" in line


def test_samplers_are_tuned_on_them(run, capsys):
    assert main(["tune", str(run), "--steps", "4", "--images", "8"]) == 0
    assert "in the data's units" in capsys.readouterr().out


def test_calibration_and_figures_show_chosen_channels(run, capsys, tmp_path):
    assert main(["calibrate", str(run), "--images", "4"]) == 0
    assert "RMSE in the data's units" in capsys.readouterr().out
    out = tmp_path / "figure.png"
    for name in ("neighbours", "progressive", "shared-latent", "rate-distortion"):
        options = ["--n", "2"] if name in ("neighbours", "progressive") else []
        args = ["figure", name, str(run), "--channels", "3", "2", "1", "--out", str(out)]
        assert main([*args, *options]) == 0
        Image.open(out).load()
    numbers = np.load(tmp_path / "figure.npz")
    assert set(numbers) == {"reverse_steps", "rate", "rmse"}
    assert main(["figure", "interpolate", str(run), "--between", "0", "1", "--out", str(out)]) == 0


def test_edits_keep_known_values(run, tmp_path):
    """An array of the data's own numbers, of which the right half is drawn anew."""
    field = np.random.default_rng(1).normal(101, 1, SHAPE).astype(np.float32)
    np.save(tmp_path / "field.npy", field)
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    args = ["edit", "inpaint", str(run), f"{tmp_path}/field.npy", "--mask", f"{tmp_path}/mask.png"]
    assert main([*args, "--resample", "1", "--out", str(tmp_path / "edited")]) == 0
    edited = np.load(tmp_path / "edited/field-0.npy")
    np.testing.assert_allclose(edited[:, :4], field[:, :4], rtol=1e-6)
    assert np.abs(edited[:, 4:] - field[:, 4:]).max() > 0.1
    Image.open(tmp_path / "edited/side-by-side.png").load()
