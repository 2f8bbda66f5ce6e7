"""Exported programs: without this package, the images and outputs that it computes, to the last bit."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import with_
from jax import export

from ddpm_jax import DDPM, UserError, to_uint8
from ddpm_jax.interop import write_stablehlo

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
    """With attention, and weights that are not those of a fresh network, whose last layer is 0."""
    ddpm = DDPM(with_(tiny, model={"attention_resolutions": (8,)}))
    keys = iter(jax.random.split(jax.random.key(5), 200))
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), ddpm.init(next(keys)))
    return ddpm, params


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    write_stablehlo(folder, *model, {"weights": "ema", "step": 2})
    return folder


def program(folder, name):
    return export.deserialize(bytearray((folder / f"{name}.stablehlo").read_bytes()))


def test_a_program_alone_draws_the_same_images(model, exported, tmp_path):
    ddpm, params = model
    done = run_example(exported, "-n", 6, "--seed", 3, "--batch-size", 4, "--out", tmp_path / "x.npz")
    assert done.returncode == 0, done.stderr
    expected = to_uint8(ddpm.sample(params, jax.random.key(3), 6, batch_size=4))
    np.testing.assert_array_equal(np.load(tmp_path / "x.npz")["images"], expected)
    assert expected.std() > 10


def test_programs_for_three_platforms_and_any_batch_are_the_models(model, exported, rng):
    ddpm, params = model
    flat, about = dict(np.load(exported / "params.npz")), json.loads((exported / "about.json").read_text())
    sampler, denoiser = program(exported, "sampler"), program(exported, "denoiser")
    assert sampler.platforms == denoiser.platforms == ("cpu", "cuda", "tpu")
    key = np.uint32([0, 3])
    for indices in ([4], [9, 2, 4]):
        images = jax.jit(sampler.call)(flat, key, np.uint32(indices))
        for i, image in zip(indices, images, strict=True):
            (expected,) = ddpm.sample(params, jax.random.key(3), 1, start=i)
            np.testing.assert_allclose(image, expected, atol=1e-5)
    x_t, t = rng.normal(size=(2, 8, 8, 1)).astype(np.float32), np.int32([0, 9])
    np.testing.assert_array_equal(jax.jit(denoiser.call)(flat, x_t, t), jax.jit(ddpm.denoise)(params, x_t, t))
    assert about["about"] == {"weights": "ema", "step": 2} and about["image_shape"] == [8, 8, 1]
    # The weights are beside the programs, not in them.
    assert not any(
        leaf.tobytes() in file.read_bytes()
        for leaf in flat.values()
        if leaf.size > 100
        for file in exported.glob("*.stablehlo")
    )


def test_other_samplers_are_exported_too(model, tmp_path):
    ddpm, params = model
    write_stablehlo(tmp_path / "model", ddpm, params, {}, sampler="ddim", steps=3, eta=0.5)
    call = jax.jit(program(tmp_path / "model", "sampler").call)
    images = call(dict(np.load(tmp_path / "model/params.npz")), np.uint32([0, 3]), np.arange(2, dtype=np.uint32))
    expected = ddpm.sample(params, jax.random.key(3), 2, sampler="ddim", steps=3, eta=0.5)
    np.testing.assert_array_equal(images, expected)


def test_what_cannot_be_exported_or_run_gets_one_line(model, exported, tmp_path):
    with pytest.raises(UserError, match="eta: ancestral has none"):
        write_stablehlo(tmp_path / "x", *model, {}, eta=1.0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not empty and not an exported model"):
        write_stablehlo(tmp_path / "mine", *model, {})
    assert not (tmp_path / "x").exists() and len(list((tmp_path / "mine").iterdir())) == 1

    (tmp_path / "damaged").mkdir()
    for file in exported.iterdir():
        (tmp_path / "damaged" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "damaged/params.npz").write_bytes(b"")
    for folder, says in [("mine", "not an exported model"), ("damaged", "params.npz: damaged")]:
        done = run_example(tmp_path / folder, "--out", tmp_path / "x.npz")
        assert done.returncode == 1 and says in done.stderr and done.stderr.count("\n") == 1
