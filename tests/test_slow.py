"""Real training through the command line, minutes each.

scripts/test_slow.sh runs these tests; with -n 0 -s it shows the figures that they print.
"""

import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import lines
from PIL import Image

from ddpm_jax import make_schedule
from ddpm_jax.config import Data
from ddpm_jax.data import load_source, split

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
CIFAR10 = ROOT.parent / "shared/data/cifar10.zip"
COMMAND = [sys.executable, "-m", "ddpm_jax"]
# Narrower than small32 and with a larger learning rate: below the linear denoiser in minutes.
NETWORK = ["--model.base-channels", 16, "--optim.learning-rate", 2e-3, "--optim.warmup-steps", 100]
NETWORK += ["--optim.ema-decay", 0.99]
STEPS = 1200


def run(*args, cwd, **environment):
    environment = {**os.environ, "XLA_FLAGS": "", **environment}
    done = subprocess.run(
        [str(arg) for arg in args], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_demo_draws_digits(tmp_path):
    """Its samples are varied, near the real images, and no copies of them.

    Their evaluation agrees.
    """
    # A grid of 64 takes half a minute, and nothing looks at it here.
    run(*COMMAND, "train", "digits", "--train.num-samples", 1, cwd=tmp_path)
    row = run(
        *COMMAND,
        "evaluate",
        "runs/digits",
        "-n",
        256,
        "--seed",
        1,
        "--no-likelihood",
        # The chain of all 1,000 steps says the same of the model in twenty times the time.
        "--sampler",
        "sde-dpm-solver++",
        "--steps",
        50,
        cwd=tmp_path,
        XDG_CACHE_HOME=str(tmp_path),
    )
    digits = np.load(ROOT / "ddpm_jax/data/digits.npz")
    real = digits["images"].reshape(1797, 64) / 127.5 - 1
    (result,) = tmp_path.glob("runs/digits/evaluation/*/proxy-256-*.json")
    values = {
        name: each["value"] for name, each in json.loads(result.read_text())["values"].items()
    }
    files = sorted((result.parent / "samples").glob("*.png"))
    drawn = np.stack([np.asarray(Image.open(file)).ravel() for file in files]) / 127.5 - 1

    distances = np.linalg.norm(drawn[:, None] - real[None], axis=-1)
    classes = digits["labels"][distances.argmin(axis=1)]
    between_real = np.sqrt(((real[:, None] - real[None]) ** 2).sum(-1)) + np.diag(
        np.full(1797, np.inf)
    )
    typical = np.median(between_real.min(axis=1))
    ratio = np.median(distances.min(axis=1)) / typical
    copies = (distances.min(axis=1) < 0.15 * typical).mean()
    spread = drawn.std() / real.std()
    print(f"\ndigits: distance ratio {ratio:.3f}, copies {copies:.3f}, std ratio {spread:.3f}")
    print("classes", np.bincount(classes, minlength=10))
    print(row)
    assert len(set(classes)) == 10
    assert all(len(set(classes[i : i + 64])) >= 9 for i in range(0, 256, 64))
    assert 0.75 < ratio < 1.25 and copies < 0.02 and 0.85 < spread < 1.15
    # For pixels of noise they are 0.13, 0.03 and 1.7; for one repeated digit 1.00, 0.00 and 1.0.
    assert (
        values["proxy_precision_train"] > 0.5
        and values["proxy_recall_train"] > 0.5
        and values["proxy_is"] > 6
    )


@pytest.mark.skipif(not CIFAR10.exists(), reason="needs CIFAR10's images")
def test_on_colour_images_the_network_beats_every_linear_denoiser(tmp_path):
    """6,000 of CIFAR10's images at 16x16, through a folder, in a run that is resumed once."""
    with zipfile.ZipFile(CIFAR10) as archive:
        names = [
            name
            for name in archive.namelist()
            if name.startswith("train/") and name.endswith(".webp")
        ]
        archive.extractall(tmp_path, random.Random(0).sample(sorted(names), 6000))
    train = [
        *COMMAND,
        "train",
        "small32",
        "--data.source",
        "folder:train",
        "--data.image-shape",
        16,
        16,
        3,
    ]
    train += [
        *NETWORK,
        "--workdir",
        "run",
        "--train.num-samples",
        16,
        "--train.sample-every",
        0,
        "--train.steps",
    ]
    # Two devices, a core each, keep both busier than one device's threads do.
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    run(*train, STEPS // 2, cwd=tmp_path, **flags)
    run(*train, STEPS, cwd=tmp_path, **flags)
    assert [line["step"] for line in lines(tmp_path / "run") if "holdout_loss" in line][-1] == STEPS
    network = float(run(sys.executable, ROOT / "tests/holdout_loss.py", "run", cwd=tmp_path))
    linear = best_linear_denoiser(tmp_path / "train")
    print(
        f"\n6,000 CIFAR10 images at 16x16, {STEPS} steps, 16 channels: "
        f"held-out loss {network:.4f}, linear denoiser {linear:.4f}"
    )
    assert network < 0.95 * linear


def best_linear_denoiser(folder):
    """Its held-out L_simple in closed form.

    For the Gaussian with the mean and covariance of the training pixels.
    """
    source = load_source(Data(source=f"folder:{folder}", image_shape=(16, 16, 3)))
    train, held_out = split(source, 0.1)
    x, y = (
        source.read(indices).reshape(len(indices), -1) / 127.5 - 1 for indices in (train, held_out)
    )
    variances, directions = np.linalg.eigh(np.cov((x - x.mean(0)).T))
    variances = np.maximum(variances, 0)
    projected = (((y - x.mean(0)) @ directions) ** 2).mean(0)
    a = np.float64(make_schedule().alphas_bar)[:, None]
    # E[eps | x_t] = gain (x_t - sqrt(a) mean), along each direction on its own.
    gain = np.sqrt(1 - a) / (a * variances + 1 - a)
    return float((gain**2 * a * projected + (1 - gain * np.sqrt(1 - a)) ** 2).mean())


def test_a_run_is_the_same_with_and_without_64_bits(tmp_path):
    """Each trained in one mode, resumed in the other, and sampled in both."""

    def train(name, steps):
        options = ["--model.base-channels", 8, "--model.channel-multipliers", 1]
        options += ["--model.num-res-blocks", 1, "--diffusion.num-timesteps", 40]
        options += ["--train.num-samples", 2, "--train.steps", steps, "--checkpoint.every", 2]
        return ["train", "digits", "--workdir", name, *options]

    def sample(name, bits):
        options = ["--sampler", "dpm-solver++", "--steps", 20]
        return ["sample", name, "-n", 4, "--out", f"{name}-{bits}.npz", *options]

    def process(bits, *commands):
        """Runs commands in one process: it starts once, and compiles once what they share."""
        program = "import sys\nfrom ddpm_jax.cli import main\n"
        for command in commands:
            words = [str(word) for word in command]
            program += f"code = main({words})\nif code:\n    sys.exit(code)\n"
        run(sys.executable, "-c", program, cwd=tmp_path, JAX_ENABLE_X64=bits)

    def images(name, bits):
        with np.load(tmp_path / f"{name}-{bits}.npz") as arrays:
            return dict(arrays)

    process("1", train("a", 2))
    process("0", train("b", 2), train("a", 4), sample("a", "0"))
    process("1", train("b", 4), sample("b", "1"), sample("a", "1"))
    process("0", sample("b", "0"))
    first, *others = (images(name, bits) for name in "ab" for bits in "01")
    for other in others:
        assert first.keys() == other.keys()
        for name, array in first.items():
            np.testing.assert_array_equal(array, other[name], strict=True)
