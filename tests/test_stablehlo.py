"""Exported programs: without this package, the images that it draws, to the last bit."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import export

from ddpm_jax import DDPM, UserError, to_uint8
from ddpm_jax.sampler import Sampler
from ddpm_jax.weights.names import flat_params
from ddpm_jax.weights.stablehlo import sampler_program, write_stablehlo

EXAMPLE = Path(__file__).parent.parent / "examples/run_exported.py"
# The package, flax and optax cannot be imported.
ALONE = (
    "import runpy, sys; sys.modules |= dict.fromkeys(['ddpm_jax', 'flax', 'optax']); "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def run_example(*args):
    command = [sys.executable, "-c", ALONE, EXAMPLE, *args]
    return subprocess.run([str(arg) for arg in command], capture_output=True, text=True)


@pytest.fixture(scope="module")
def model(tiny):
    """A network that is not a fresh one, whose last layer is 0."""
    ddpm = DDPM(tiny)
    keys = iter(jax.random.split(jax.random.key(5), 200))
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), ddpm.init(next(keys))
    )
    return ddpm, params


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    write_stablehlo(folder, *model, {"weights": "ema", "step": 2})
    return folder


def read(folder, name):
    return export.deserialize(bytearray((folder / f"{name}.stablehlo").read_bytes()))


def test_without_the_package_the_same_images_are_drawn(model, exported, tmp_path):
    ddpm, params = model
    done = run_example(
        exported, "-n", 3, "--seed", 3, "--batch-size", 2, "--out", tmp_path / "x.npz"
    )
    assert done.returncode == 0, done.stderr
    expected = to_uint8(ddpm.sample(params, jax.random.key(3), 3, batch_size=2))
    np.testing.assert_array_equal(np.load(tmp_path / "x.npz")["images"], expected)
    assert expected.std() > 10


def test_programs_for_three_platforms_and_any_batch_are_the_model(model, exported, rng):
    ddpm, params = model
    flat, about = (
        dict(np.load(exported / "params.npz")),
        json.loads((exported / "about.json").read_text()),
    )
    sampler, denoiser = read(exported, "sampler"), read(exported, "denoiser")
    assert sampler.platforms == denoiser.platforms == ("cpu", "cuda", "tpu")
    indices = np.uint32([2**32 - 1, 2, 4])
    images = jax.jit(sampler.call)(flat, np.uint32([0, 3]), indices)
    for i, image in zip(indices.tolist(), images, strict=True):
        (expected,) = ddpm.sample(params, jax.random.key(3), 1, start=i)
        np.testing.assert_allclose(image, expected, atol=1e-5)
    x_t, t = rng.normal(size=(2, 8, 8, 1)).astype(np.float32), np.int32([0, 9])
    np.testing.assert_array_equal(
        jax.jit(denoiser.call)(flat, x_t, t), jax.jit(ddpm.denoise)(params, x_t, t)
    )
    assert about["about"] == {"weights": "ema", "step": 2} and about["image_shape"] == [8, 8, 1]
    # The weights lie beside the programs, not in them.
    programs = [file.read_bytes() for file in exported.glob("*.stablehlo")]
    large = [leaf.tobytes() for leaf in flat.values() if leaf.size > 100]
    assert large and not any(leaf in content for leaf in large for content in programs)


def test_another_sampler_is_exported_with_its_options(model):
    ddpm, params = model
    program = sampler_program(ddpm, params, Sampler("ddim", 3, 0.5))
    images = jax.jit(program.call)(flat_params(params), np.uint32([0, 3]), np.uint32([7]))
    options = {"sampler": "ddim", "steps": 3, "eta": 0.5}
    np.testing.assert_array_equal(
        images, ddpm.sample(params, jax.random.key(3), 1, start=7, **options)
    )


def test_what_cannot_be_exported_or_run_gets_one_line(model, exported, tmp_path):
    with pytest.raises(UserError, match="steps: must be from 1 to 10"):
        write_stablehlo(tmp_path / "x", *model, {}, Sampler(steps=11))
    assert not (tmp_path / "x").exists()

    (tmp_path / "damaged").mkdir()
    for file in exported.iterdir():
        (tmp_path / "damaged" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "damaged/params.npz").write_bytes(b"")
    for folder, out, says in [
        (tmp_path, "x.npz", "not an exported model"),
        (tmp_path / "damaged", "x.npz", "params.npz: damaged"),
        (exported, "x.png", "x.png must end in .npz"),
        (exported, "nowhere/x.npz", "x.npz must end in .npz and be in a folder that exists"),
    ]:
        done = run_example(folder, "--out", tmp_path / out)
        # Libraries may write lines of their own before.
        assert done.returncode == 1 and says in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
