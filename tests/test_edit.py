"""`ddpm-jax edit`: the files it writes, and what it refuses."""

import re
import types

import numpy as np
import pytest
from conftest import refused
from PIL import Image

from ddpm_jax import operators
from ddpm_jax.cli import main
from ddpm_jax.cli.edit import Colourise, Deblur, Upscale
from ddpm_jax.config import Config
from ddpm_jax.errors import UserError


@pytest.fixture
def folder(pictures, tmp_path):
    """Two images of the model's size, one of another, and a mask that is white below."""
    for name, pixels in [("a", pictures[0]), ("b", pictures[1]), ("c", np.tile(pictures[2], 2))]:
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels[..., 0]).save(tmp_path / "images" / f"{name}.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[4:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


def edit(*args):
    assert main(["edit", *map(str, args)]) == 0


def pixels(path):
    return np.asarray(Image.open(path))


def test_inpainting_keeps_what_is_black_in_the_mask(run, folder, pictures):
    out = folder / "out"
    args = ["inpaint", run, folder / "images" / "a.png", "--mask", folder / "mask.png"]
    args += ["--steps", 4, "--resample", 2, "--jump", 2, "--out", out]
    edit(*args, "-n", 2)
    drawn = [pixels(out / f"a-{j}.png") for j in range(2)]
    for image in drawn:
        np.testing.assert_array_equal(image[:4], pictures[0, :4, :, 0])
    assert (drawn[0][4:] != drawn[1][4:]).any()
    assert {path.name for path in out.iterdir()} == {
        "a-0.png",
        "a-1.png",
        "edit.json",
        "side-by-side.png",
    }
    (out / "a-0.png").unlink()
    edit(*args)  # The same again, and one draw is the first of two.
    np.testing.assert_array_equal(pixels(out / "a-0.png"), drawn[0])


def test_small_images_are_drawn_large_and_others_are_resized(run, folder, capsys):
    out = folder / "out"
    edit("upscale", run, folder / "images", "--factor", 2, "--steps", 3, "--out", out)
    said = capsys.readouterr().err
    assert "image: 3 of 3 were not 4x4 pixels; resized and cropped" in said
    for name in "abc":
        assert pixels(out / f"{name}-0.png").shape == (8, 8)
    row = pixels(out / "side-by-side.png")
    assert row.shape[0] > row.shape[1]  # Three rows of two.


def test_a_folder_of_other_results_is_refused(run, folder, capsys):
    args = ["edit", "vary", run, folder / "images" / "a.png", "--steps", 2, "--out", folder / "out"]
    edit(*args[1:])
    before = pixels(folder / "out" / "a-0.png")
    assert "holds results made with strength 0.5" in refused(capsys, *args, "--strength", 0.7)
    args[3] = folder / "images" / "b.png"
    assert "holds results made with images" in refused(capsys, *args)
    assert "is not empty" in refused(capsys, *args[:-1], folder / "images")
    np.testing.assert_array_equal(pixels(folder / "out" / "a-0.png"), before)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["inpaint", "RUN", "a.png"], "mask: is missing"),
        (["inpaint", "RUN", "a.png", "--mask", "black.png"], "mask: is black all over"),
        (["inpaint", "RUN", "a.png", "--mask", "none.png"], "mask: .*none.png does not exist"),
        (["inpaint", "RUN", "empty.png", "--mask", "mask.png"], "image: empty.png cannot be decod"),
        (["vary", "RUN", "tiny.png"], "image: tiny.png is 4x4 pixels, smaller than the 8x8"),
        (["vary", "RUN", "a.png", "--strength", "2"], "strength: must be"),
        (["vary", "RUN", "a.png", "--labels", "1"], "labels: this model was trained without"),
        (["upscale", "RUN", "a.png", "--factor", "3"], "factor: must divide the model's 8x8"),
        (["colourise", "RUN", "a.png"], "this model draws no colours"),
        (["nonsense", "RUN", "a.png"], "edit: 'nonsense' is not one of inpaint, vary, upscale"),
    ],
)
def test_what_does_not_fit_is_one_line(run, pictures, tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(pictures[0, :, :, 0]).save("a.png")
    Image.fromarray(pictures[0, :4, :4, 0]).save("tiny.png")
    Image.new("L", (8, 8), 255).save("mask.png")
    Image.new("L", (8, 8), 0).save("black.png")
    (tmp_path / "empty.png").write_bytes(b"")
    line = refused(capsys, "edit", *(str(run) if arg == "RUN" else arg for arg in args))
    assert re.search(words, line), line
    assert not (tmp_path / "edited").exists()


def fake(image_shape):
    """A model that notes what it is asked to restore."""
    asked = []

    def restore(params, rng, y, operator, **options):
        asked.append((y, operator, options))
        return np.zeros((len(y), *image_shape), np.float32)

    ddpm = types.SimpleNamespace(image_shape=image_shape, restore=restore, config=Config())
    return types.SimpleNamespace(ddpm=ddpm, params={}), asked


def test_each_restoration_undoes_its_damage():
    model, asked = fake((8, 8, 3))
    for kind, shape, operator in [
        (Upscale(run="", image="", factor=2), (4, 4, 3), operators.downscale(2)),
        (Colourise(run="", image=""), (8, 8, 1), operators.grey()),
    ]:
        assert kind.given_shape((8, 8, 3)) == shape
        images = np.ones((2, *shape), np.float32)
        before, draw = kind.prepared(model, images)
        assert before[0].shape == (2, 8, 8, 3)
        draw(None, False)
        y, given, options = asked.pop()
        assert (y == 1).all() and given == operator and options["noise"] == 0


def test_the_blur_is_a_gaussian_of_its_deviation():
    model, asked = fake((32, 32, 1))
    kind = Deblur(run="", image="", sigma=1.5)
    _, draw = kind.prepared(model, np.full((1, 32, 32, 1), -1, np.float32))
    draw(None, False)
    _, operator, options = asked.pop()
    assert options["noise"] == pytest.approx(2 / 255)  # A level of 255 in [-1, 1].
    x = np.zeros((1, 32, 32, 1), np.float32)
    x[0, 16, 16] = 1
    blurred = np.asarray(operator.A(x))[0, :, :, 0]
    places = np.arange(32) - 16
    assert blurred.sum() == pytest.approx(1, abs=1e-5)
    assert (blurred.sum(1) * places**2).sum() == pytest.approx(1.5**2, rel=0.03)


def test_a_model_of_grey_images_gives_no_colours():
    with pytest.raises(UserError, match="draws no colours"):
        Colourise(run="", image="").given_shape((8, 8, 1))
