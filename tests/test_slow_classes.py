"""The digits by class: the model in examples/ draws what it is asked for, minutes.

scripts/test_slow.sh runs these tests; with -n 0 -s it shows the figures that they print.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ddpm_jax.config import load_config
from ddpm_jax.data import load_source, split

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
COMMAND = [sys.executable, "-m", "ddpm_jax"]
MODEL = TESTS.parent / "examples/digits_class.safetensors"
IMAGES = 250


def run(*args, cwd):
    """What the program prints, run on one device with XLA's optimisations."""
    done = subprocess.run(
        [str(arg) for arg in args],
        cwd=cwd,
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def digits():
    """All real digits float [1797,64] in [-1, 1], and their labels."""
    with np.load(TESTS.parent / "ddpm_jax/data/digits.npz") as arrays:
        return arrays["images"].reshape(-1, 64) / 127.5 - 1, np.int64(arrays["labels"])


def drawn(folder, guidance):
    """250 samples float [250,64] of the ten classes in turn, and the labels that were asked for."""
    out = f"guidance-{guidance}.npz"
    labels = ["--labels", *range(10), "--guidance", guidance]
    sampler = ["--sampler", "sde-dpm-solver++", "--steps", 50]
    command = [*COMMAND, "sample", MODEL, "-n", IMAGES, "--out", out]
    run(*command, *labels, *sampler, cwd=folder)
    with np.load(folder / out) as arrays:
        return arrays["images"].reshape(-1, 64) / 127.5 - 1, arrays["labels"]


def distances(a, b):
    """float [A,B]: the Euclidean distances of the rows of a from those of b."""
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squares, 0))


def spread(images):
    """The mean distance of two of the images."""
    return distances(images, images).sum() / (len(images) * (len(images) - 1))


def diversity(images, labels):
    """The spread within a class as a part of that of the real digits, a number for each class."""
    real, classes = digits()
    return np.array([spread(images[labels == k]) / spread(real[classes == k]) for k in range(10)])


def test_a_digit_is_the_one_that_was_asked_for_and_guidance_costs_diversity(tmp_path):
    real, classes = digits()
    named, varied = {}, {}
    for guidance in (1, 3):
        images, labels = drawn(tmp_path, guidance)
        np.testing.assert_array_equal(labels, np.arange(IMAGES) % 10)
        nearest = distances(images, real).argmin(axis=1)
        named[guidance] = (classes[nearest] == labels).mean()
        varied[guidance] = diversity(images, labels)
        print(
            f"\nguidance {guidance}: {named[guidance]:.1%} named by their label, diversity within "
            f"a class {varied[guidance].mean():.2f} of the real one's, "
            f"{varied[guidance].min():.2f} at least"
        )
    assert named[1] >= 0.90 and named[3] >= 0.97
    # Copies of one digit have 0, and pixels of noise 1.4.
    assert 0.7 < varied[1].mean() < 1.2 and varied[3].mean() > 0.5
    assert varied[3].mean() < varied[1].mean()


def test_inpainted_halves_of_digits_fit_to_the_known_ones(tmp_path):
    """128 digits, those held out first. Halves of other digits would be 1.20 and 1.50."""
    data = load_config("digits_class").data
    source = load_source(data)
    train, held_out = split(source, data.holdout)
    chosen = np.concatenate([held_out, train])[:128]
    known = {"images": source.read(chosen), "labels": source.labels[chosen]}
    np.savez(tmp_path / "known.npz", **known)
    ratios = json.loads(run(sys.executable, TESTS / "seam.py", MODEL, "known.npz", cwd=tmp_path))
    print("\nthe seam's gradient, as a part of the originals':", ratios)
    assert all(0.8 < ratio < 1.2 for ratio in ratios.values())
