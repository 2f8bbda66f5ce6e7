"""What a student reads first must run, be short, and import nothing of ours."""

import ast
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import QUICK

from ddpm_jax import load, to_uint8

MINIMAL = Path(__file__).parent.parent / "examples/minimal.py"
EXPORTED = MINIMAL.with_name("run_exported.py")
CLOTHES = MINIMAL.with_name("fashion_mnist.safetensors")
SAVED = Path(__file__).parent / "data/run_0_1"


def test_the_shipped_model_draws_clothes():
    """Of Fashion-MNIST all pixels have the mean 72.9, and those of a corner hardly ever light."""
    assert CLOTHES.stat().st_size < 5e6
    ddpm, params = load(CLOTHES)
    assert ddpm.image_shape == (28, 28, 1) and ddpm.calibration is not None
    rng = jax.random.key(0, impl="threefry2x32")
    images = to_uint8(ddpm.sample(params, rng, 16, steps=10, grid="tuned"))[..., 0]
    assert 35 < images.mean() < 110
    assert (images[:, :2, :2].max(axis=(1, 2)) < 20).mean() > 0.8
    of_each = images.reshape(16, -1).mean(axis=1)
    assert (of_each > 5).all() and of_each.std() > 10
    # Clothes are symmetric or not, but all of them lie in the middle and are of one piece.
    assert (images[:, 8:20, 8:20].mean(axis=(1, 2)) > of_each).mean() > 0.8


@pytest.mark.slow
def test_the_minimal_example_learns_and_draws(tmp_path):
    environment = {**os.environ, "XLA_FLAGS": QUICK}
    done = subprocess.run(
        [sys.executable, MINIMAL, "101"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert (
        0.8 < losses[0] < 1.2 and losses[1] < 0.5 * losses[0]
    )  # an untrained network predicts no noise
    header, pixels = (tmp_path / "minimal.pgm").read_bytes().split(b"\n", 1)
    assert header == b"P5 240 240 255" and len(pixels) == 240 * 240
    assert np.frombuffer(pixels, np.uint8).std() > 30


def test_the_minimal_example_is_short_and_stands_alone():
    source = MINIMAL.read_text()
    assert source.count("\n") <= 100
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported == {"sys", "pathlib", "jax", "flax", "optax"}


WITHOUT = """
import importlib.util, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "flatbuffers" else find(name, *a)
sys.argv = ["run_exported.py", "nowhere"]
runpy.run_path(EXPORTED, run_name="__main__")
"""


def test_what_an_exported_program_needs_is_said_in_one_line():
    code = WITHOUT.replace("EXPORTED", repr(str(EXPORTED)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = "flatbuffers is missing; pip install jax numpy flatbuffers\n"
    assert (done.returncode, done.stderr) == (1, said)
    for file in (EXPORTED, MINIMAL.parent.parent / "docs/export.md"):
        assert "pip install jax numpy flatbuffers" in file.read_text()


@pytest.mark.slow
def test_an_exported_program_draws_where_only_what_it_needs_is_installed(tmp_path):
    """In an environment with that and nothing else, and there the images of `ddpm-jax sample`."""
    from ddpm_jax.cli import main

    assert main(["export", str(SAVED), "--format", "stablehlo", "--out", f"{tmp_path}/x"]) == 0
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    environment = {**os.environ, "XLA_FLAGS": ""}
    environment.pop("PYTHONPATH", None)
    versions = [f"{name}=={importlib.metadata.version(name)}" for name in ("jax", "numpy")]

    def install(*packages):
        command = [python, "-m", "pip", "install", "--quiet", "--no-compile", *packages]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode and "No matching distribution" in done.stderr:
            pytest.skip(f"pip reaches no index: {done.stderr[-300:]}")
        assert done.returncode == 0, done.stderr

    def draw():
        command = [python, EXPORTED, tmp_path / "x", "-n", "3", "--out", tmp_path / "there.npz"]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    install(*versions)
    done = draw()
    assert done.returncode == 1 and done.stderr.startswith("flatbuffers is missing; pip install")
    install("flatbuffers")
    done = draw()
    assert done.returncode == 0, done.stderr
    assert main(["sample", str(SAVED), "-n", "3", "--out", f"{tmp_path}/here.npz"]) == 0
    there = np.load(tmp_path / "there.npz")["images"].astype(int)
    here = np.load(tmp_path / "here.npz")["images"].astype(int)
    # Flags of XLA differ, and so may the last bits: a pixel by one step of grey.
    assert there.shape == here.shape and np.abs(there - here).max() <= 1
