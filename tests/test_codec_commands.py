"""`ddpm-jax compress`, `decompress` and `figure codec`: what they write, print and refuse."""

import re

import coded
import numpy as np
import pytest
from conftest import refused
from PIL import Image

from ddpm_jax.cli import commands, main
from ddpm_jax.compression import decompress
from ddpm_jax.figures import Codec
from ddpm_jax.weights.load import Loaded

FEW = ["--group-bits", "4"]
LABELS = (0, 1, 1, -1)


@pytest.fixture
def model(monkeypatch, tiny):
    ddpm, params = coded.model(tiny)
    loaded = Loaded("model", ddpm, params, "ema", 1, None)
    monkeypatch.setattr(commands, "_load", lambda options: loaded)
    monkeypatch.setattr(Codec, "load", lambda self: loaded)
    return loaded


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four images of the model's size in a folder and an array, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    images = coded.images(LABELS)
    (tmp_path / "images").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(tmp_path / f"images/{i}.png")
    np.savez("images.npz", images=images)
    return tmp_path


def run(*args):
    assert main([*map(str, args)]) == 0


def test_a_file_and_its_pictures(model, folder, capsys):
    run("compress", "RUN", "images", "images/2.png", *FEW, "--out", "a.ddpm", "--rmse", 20)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and re.fullmatch(
        r".*2.png.*: \d+ bytes, [\d.]+ bits/dim, RMSE .*", lines[4]
    )
    data = (folder / "a.ddpm").read_bytes()
    assert lines[-1].startswith(
        f"a.ddpm: {len(data)} bytes, {8 * len(data) / (5 * 64):.3f} bits/dim"
    )
    run("decompress", "RUN", "a.ddpm", "--out", "pictures/")
    expected = decompress(model.ddpm, model.params, data)
    for i, image in enumerate(expected):
        written = np.asarray(Image.open(folder / f"pictures/{i:06d}.png"))
        np.testing.assert_array_equal(written, image[..., 0])
    # Of the same file, again; of a prefix, into another folder.
    run("decompress", "RUN", "a.ddpm", "--out", "pictures")
    (folder / "b.ddpm").write_bytes(data[:-3])
    line = refused(capsys, "decompress", "RUN", "b.ddpm", "--out", "pictures")
    assert re.search("out: .*another folder", line)
    run("decompress", "RUN", "b.ddpm", "--out", "prefix", "--picture", "flow")
    assert len(list((folder / "prefix").glob("*.png"))) == 5


def test_exact_images(model, folder):
    run("compress", "RUN", "images", *FEW, "--lossless", "--labels", "0", "1", "1", "-1")
    run("decompress", "RUN", "images.ddpm")
    for i, image in enumerate(coded.images(LABELS)):
        written = np.asarray(Image.open(folder / f"decompressed/{i:06d}.png"))
        np.testing.assert_array_equal(written, image[..., 0])


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["compress", "RUN"], "images: are none"),
        (["compress", "RUN", "nowhere"], "images: 'nowhere' does not exist|images: nowhere does"),
        (["compress", "RUN", "images", "--out", "a.png"], r"out: must end in \.ddpm"),
        (["compress", "RUN", "images", "--rmse", "0"], "rmse"),
        (["compress", "RUN", "images", "--rmse", "9", "--lossless"], "exclude each other"),
        (["compress", "RUN", "images", "--labels", "0", "1"], "labels"),
        (["decompress", "RUN", "nowhere.ddpm"], "file: .*does not exist"),
        (["decompress", "RUN", "images/0.png"], "file: was not written by ddpm-jax compress"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(model, folder, capsys, args, line):
    before = sorted(folder.rglob("*"))
    assert re.search(line, refused(capsys, *args))
    assert sorted(folder.rglob("*")) == before


def test_the_figure_compares_the_file_with_other_formats(model, folder):
    args = ["--data", "npz:images.npz", "--split", "test", "--n", "4", "--out", "codec.png"]
    run("figure", "codec", "RUN", *FEW, *args)
    with np.load("codec.npz") as numbers:
        for name in ("file", "ideal", "JPEG", "WebP"):
            bits, rmse = numbers[f"{name}_bits_per_dim"], numbers[f"{name}_rmse"]
            assert bits.shape == rmse.shape and (np.diff(bits) >= 0).all(), name
            assert rmse[-1] < rmse[0], name
    for name in ("codec.png", "codec-prefixes.png"):
        assert Image.open(folder / name).size[0] > 400
