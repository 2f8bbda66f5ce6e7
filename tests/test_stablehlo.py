"""Exported programs: without this package, the images that it draws, to the last bit."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import with_
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


def of(config):
    """(ddpm, params): a network that is not a fresh one, whose last layer is 0."""
    ddpm = DDPM(config)
    keys = iter(jax.random.split(jax.random.key(5), 200))
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), ddpm.init(next(keys))
    )
    return ddpm, params


@pytest.fixture(scope="module")
def model(tiny):
    return of(tiny)


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


CLASSES = 3
LABELS = np.int32([2, -1, 0, 1])


@pytest.fixture(scope="module")
def with_classes(tiny):
    """A model whose classes draw differently."""
    ddpm, params = of(with_(tiny, model={"num_classes": CLASSES}))
    rows = 3 * jax.random.normal(jax.random.key(6), (CLASSES + 1, 16))
    return ddpm, {**params, "class_embedding": {"embedding": rows}}


@pytest.fixture(scope="module")
def exported_classes(with_classes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes") / "model"
    write_stablehlo(folder, *with_classes, {}, Sampler("ddim", 4))
    return folder


@pytest.fixture(scope="module")
def drawn(with_classes):
    """{guidance: images of LABELS}, by `DDPM.sample`."""
    ddpm, params = with_classes
    options = {"labels": LABELS, "sampler": "ddim", "steps": 4}
    return {
        guidance: ddpm.sample(params, jax.random.key(3), 4, guidance=guidance, **options)
        for guidance in (1.0, 3.0)
    }


def about_of(folder):
    return json.loads((folder / "about.json").read_text())


def run_here(monkeypatch, *args):
    """The example in this process, which takes a tenth of the time of one of its own."""
    monkeypatch.setattr("sys.argv", [str(arg) for arg in (EXAMPLE, *args)])
    return runpy.run_path(str(EXAMPLE), run_name="__main__")


def test_one_program_serves_every_label_and_guidance(with_classes, exported_classes, drawn, rng):
    ddpm, params = with_classes
    flat = dict(np.load(exported_classes / "params.npz"))
    program = jax.jit(read(exported_classes, "sampler").call)
    indices = np.arange(4, dtype=np.uint32)
    for guidance, expected in drawn.items():
        images = program(flat, np.uint32([0, 3]), indices, LABELS, np.float32(guidance))
        np.testing.assert_allclose(images, expected, atol=1e-5)
    moved = np.abs(drawn[1.0] - drawn[3.0]).max(axis=(1, 2, 3))
    assert moved[1] < 1e-5 and (moved[[0, 2, 3]] > 0.01).all()  # No class leads nowhere.
    x_t, t = rng.normal(size=(4, 8, 8, 1)).astype(np.float32), np.int32([0, 9, 4, 4])
    np.testing.assert_array_equal(
        jax.jit(read(exported_classes, "denoiser").call)(flat, x_t, t, LABELS),
        jax.jit(ddpm.denoise)(params, x_t, t, LABELS),
    )


def test_about_says_what_the_programs_of_classes_take(exported, exported_classes):
    about = about_of(exported_classes)
    sampler, denoiser = about["programs"].values()
    assert "indices uint32 [B], labels int32 [B], guidance float32 [])" in sampler
    assert "t int32 [B], labels int32 [B])" in denoiser
    assert about["classes"] == {"number": CLASSES, "no_class": True}
    assert about["inputs"]["labels"] == "the classes of the images, 0 to 2, or -1 for no class"
    assert "the batch of the network is doubled whatever it is" in about["inputs"]["guidance"]
    without = about_of(exported)
    assert "labels" not in json.dumps(without["programs"])
    assert not {"classes", "inputs"} & without.keys()


def test_the_example_draws_classes(exported_classes, drawn, tmp_path, monkeypatch):
    file = tmp_path / "x.npz"
    options = (exported_classes, "-n", 3, "--seed", 3, "--batch-size", 4, "--out", file)
    run_here(monkeypatch, *options, "--labels", *LABELS, "--guidance", 3)
    written = np.load(file)
    assert written["labels"].tolist() == [2, -1, 0]
    levels = np.int32(written["images"]) - to_uint8(drawn[3.0])[:3]
    assert np.abs(levels).max() <= 1
    run_here(monkeypatch, *options)  # Without labels, no class for all.
    written = np.load(file)
    levels = np.int32(written["images"]) - to_uint8(drawn[1.0])[:3]
    assert written.files == ["images"] and np.abs(levels[1]).max() <= 1 < np.abs(levels).max()


def test_a_model_that_knows_no_images_without_a_class_takes_labels_alone(tiny, monkeypatch):
    monkeypatch.setattr("ddpm_jax.weights.stablehlo.PLATFORMS", ("cpu",))
    ddpm, params = of(with_(tiny, model={"num_classes": CLASSES, "no_class": False}))
    program = sampler_program(ddpm, params, Sampler("ddim", 2))
    args = (flat_params(params), np.uint32([0, 3]), np.arange(2, dtype=np.uint32))
    images = jax.jit(program.call)(*args, np.int32([2, 0]))
    expected = ddpm.sample(params, jax.random.key(3), 2, labels=[2, 0], sampler="ddim", steps=2)
    np.testing.assert_array_equal(images, expected)


@pytest.mark.parametrize(
    ("classes", "options", "words"),
    [
        (None, ["--labels", 1], "--labels, --guidance: this model was trained without classes"),
        (None, ["--guidance", 1], "--labels, --guidance: this model was trained without classes"),
        (True, ["--labels", 0, 3], "--labels: must be from 0 to 2, or -1 for no class, got 3"),
        (True, ["--labels", -2], "--labels: must be from 0 to 2, or -1 for no class, got -2"),
        (True, ["--guidance", 2], "--guidance: leads images towards their class; give --labels"),
        (True, ["--labels", 1, "--guidance", "nan"], "--guidance: must be a finite number"),
        (False, ["--labels", -1], "--labels: must be from 0 to 2, got -1"),
        (False, [], "--labels: this model knows no images without a class; give some of 0 to 2"),
        (False, ["--labels", 1, "--guidance", 2], "--guidance: this model knows no images without"),
    ],
)
def test_labels_that_do_not_fit_the_programs_get_one_line(
    tmp_path, monkeypatch, classes, options, words
):
    """Before a program is read."""
    about = {"sha256": {}}
    if classes is not None:
        about["classes"] = {"number": CLASSES, "no_class": classes}
    (tmp_path / "about.json").write_text(json.dumps(about))
    with pytest.raises(SystemExit) as end:
        run_here(monkeypatch, tmp_path, "--out", tmp_path / "x.npz", *options)
    assert str(end.value).startswith(words) and "\n" not in str(end.value)
