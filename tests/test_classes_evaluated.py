"""Classes in what is measured: the bound, the samples that are evaluated, a figure a class."""

import functools
import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refused, with_
from PIL import Image

from ddpm_jax import DDPM, UserError, figures
from ddpm_jax.calls.conditions import UNGUIDED, Guide
from ddpm_jax.cli import main
from ddpm_jax.cli.options import EvaluateOptions, LikelihoodOptions
from ddpm_jax.cli.parsing import parse
from ddpm_jax.config import load_config
from ddpm_jax.data import from_array
from ddpm_jax.devices.mesh import make_mesh
from ddpm_jax.evaluation import bound, bound_parts, bound_place, choice, features, paper, steps
from ddpm_jax.evaluation import evaluate as module
from ddpm_jax.evaluation import tune as tuning
from ddpm_jax.evaluation.bound import measure
from ddpm_jax.evaluation.classes import LEAST, lines_of, of_classes
from ddpm_jax.evaluation.evaluate import evaluate, table
from ddpm_jax.evaluation.features import Extractor
from ddpm_jax.evaluation.flow import Chains
from ddpm_jax.evaluation.labels import InProportion, guide_for, in_turn, labels_of
from ddpm_jax.evaluation.sample import destination, sample_to
from ddpm_jax.evaluation.splits import Images
from ddpm_jax.figures.base import RunFigure, keys_of, names_of
from ddpm_jax.sampler import Sampler
from ddpm_jax.training import plan as planning
from ddpm_jax.training import train
from ddpm_jax.training.plan import plan
from ddpm_jax.weights.load import Loaded

LEVELS = np.float32([-0.6, -0.3, 0.6, 0.0])
"""Of the images of each of three classes, and of those of none."""
CLASSES = 3


class Levels(DDPM):
    """Every image of a class has the same pixels; the network knows it: nothing is trained."""

    @functools.cached_property
    def shapes(self):
        return {"x": jax.ShapeDtypeStruct((1,), jnp.float32)}

    def denoise(self, params, x_t, t, labels=None):
        rows = self._class_rows(labels, len(x_t))
        if rows is None:
            rows = jnp.full(len(x_t), CLASSES)
        level = jnp.asarray(LEVELS)[rows].reshape(-1, 1, 1, 1)
        a = self.schedule.alphas_bar[t].reshape(-1, 1, 1, 1)
        return (x_t - jnp.sqrt(a) * level) / jnp.sqrt(1 - a)


def loaded(config, **network):
    """The network with classes, as a model that was loaded."""
    ddpm = Levels(with_(config, model={"num_classes": CLASSES, **network}))
    return Loaded("levels", ddpm, {"x": jnp.zeros(1)}, "ema", 1, None)


@pytest.fixture(scope="module")
def model(tiny):
    return loaded(tiny)


@pytest.fixture(scope="module")
def always(tiny):
    """A model that knows no images without a class."""
    return loaded(tiny, no_class=False)


def images_of(labels, given=True):
    """Real images of these classes, with some noise; their labels are known if `given`."""
    labels = np.asarray(labels)
    noise = np.random.default_rng(3).normal(0, 4, (len(labels), 8, 8, 1))
    pixels = np.uint8(np.rint((LEVELS[labels].reshape(-1, 1, 1, 1) + 1) * 127.5 + noise))
    source = from_array(pixels, (8, 8, 1), labels if given else None)
    return Images("holdout", source, np.arange(len(labels)))


def npz_of(images, folder):
    """As an npz file: npz:PATH."""
    pixels = images.source.read(images.indices)
    np.savez(folder / "real.npz", images=pixels, labels=images.source.labels)
    return f"npz:{folder}/real.npz"


@pytest.mark.parametrize("counts", [(5, 5, 5), (3, 3), (7, 2, 1), (1, 100), (61, 59, 60, 20), (9,)])
def test_labels_in_turn_have_the_proportions_of_the_images_at_every_number(counts):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)) * 2, counts))
    turn = np.array(in_turn(labels))
    assert in_turn(np.sort(labels)) == tuple(turn)  # Whatever the images' order is.
    drawn = turn[np.arange(3 * len(labels)) % len(turn)]
    shares = np.array(counts) / sum(counts)
    for n in range(1, len(drawn) + 1):
        found = np.array([(drawn[:n] == 2 * c).sum() for c in range(len(counts))])
        assert (np.abs(found - n * shares) < 1).all()
        if n % len(labels) == 0:
            np.testing.assert_array_equal(found, n * shares)
    if len(set(counts)) == 1:
        assert tuple(turn) == tuple(2 * np.arange(len(counts)))


def test_more_labels_than_a_guide_holds_are_cut_and_keep_their_proportions():
    turn = np.array(in_turn(np.repeat([0, 1, 2], [60_001, 30_000, 10_000])))
    assert len(turn) == Guide.LONGEST
    np.testing.assert_allclose(np.bincount(turn) / len(turn), [0.6, 0.3, 0.1], atol=2e-5)


def test_what_samples_show_where_the_user_does_not_say(tiny, model, always):
    ddpm = model.ddpm
    assert guide_for(DDPM(tiny), images_of([0, 1])) == UNGUIDED
    for unknown in (None, images_of([0, 1], given=False)):
        for each in (ddpm, always.ddpm):
            assert guide_for(each, unknown) == Guide((0, 1, 2))
    assert guide_for(ddpm, images_of([2, 0, 0, 2])) == Guide((0, 2))
    uneven = guide_for(ddpm, images_of([2, 0, 0]), Guide(guidance=2.0, guidance_interval=(1, 5)))
    assert uneven == InProportion((0, 2, 0), 2.0, (1, 5)) != Guide((0, 2, 0), 2.0, (1, 5))
    assert uneven.of(np.array([1, 4]))["labels"].tolist() == [2, 2]
    assert uneven.recorded["labels"].startswith("3 in the images' proportions, ")
    other = guide_for(ddpm, images_of([2, 2, 0]))
    assert other.recorded["labels"] != uneven.recorded["labels"]
    named = Guide((-1,))
    assert guide_for(ddpm, images_of([0, 1]), named) is named
    with pytest.raises(UserError, match=r"^labels: must be from 0 to 2, got -1"):
        guide_for(always.ddpm, None, named)
    fourth = Images("train", from_array(np.zeros((1, 8, 8, 1), np.uint8), (8, 8, 1), [3]), [0])
    with pytest.raises(UserError, match=r"^data: the images' labels: must be from 0 to 2, or -1"):
        guide_for(ddpm, fourth)


def test_images_are_measured_with_their_own_labels(tiny, model, always):
    images = images_of([0, 2, 1])._replace(indices=np.array([2, 0]))
    for each in (model, always):
        for choice_ in (None, True):
            assert labels_of(each.ddpm, images, choice_).tolist() == [1, 0]
    bare = images_of([0, 1], given=False)
    assert labels_of(model.ddpm, images, False) is None
    assert labels_of(model.ddpm, bare) is None
    assert labels_of(DDPM(tiny), images) is None
    for ddpm, these, conditional, words in [
        (DDPM(tiny), images, True, "conditional: this model was trained without classes; leave"),
        (model.ddpm, bare, True, "conditional: these images have no labels; sort them into"),
        (always.ddpm, images, False, "conditional: this model knows no images without a class"),
        (always.ddpm, bare, None, "data: these images have no labels, and this model knows no"),
    ]:
        with pytest.raises(UserError, match=f"^{words}"):
            labels_of(ddpm, these, conditional)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(bound_parts, "PART", 3)


def test_the_bound_is_that_of_images_given_their_labels_or_of_no_class(
    model, tmp_path, small_parts
):
    """The predicted x_0 is a class's level at every step, which the errors show."""
    labels = np.array([0, 1, 2, 2, 1, 0, 1])
    images = images_of(labels)
    x_0 = np.float64(images.source.read(images.indices)) / 127.5 - 1
    of_labels = LEVELS[labels].reshape(-1, 1, 1, 1)
    given = measure(model, images, out=tmp_path / "given", batch_size=3)
    np.testing.assert_allclose(given.mse, np.square(x_0 - of_labels).mean(), rtol=1e-4)
    assert given.summary["conditional"] is True and "given the labels" in bound.table(given)
    free = measure(model, images, out=tmp_path / "free", batch_size=3, conditional=False)
    np.testing.assert_allclose(free.mse, np.square(x_0 - LEVELS[CLASSES]).mean(), rtol=1e-4)
    assert free.summary["conditional"] is False and "no class" in bound.table(free)
    # What was measured of one is not taken for the other.
    part = min((tmp_path / "given/parts").iterdir())
    part.unlink()
    with pytest.raises(UserError, match="holds results made with conditional True, not False"):
        measure(model, images, out=tmp_path / "given", batch_size=3, conditional=False)
    again = measure(model, images, out=tmp_path / "given", batch_size=3, conditional=True)
    assert again.summary == given.summary and part.exists()


def test_a_bound_of_no_class_has_a_folder_of_its_own_and_makes_no_calibration(
    model, tiny, tmp_path, monkeypatch, small_parts
):
    """The errors that samplers need are those of images with their labels, which `sample` draws."""
    monkeypatch.setattr(Loaded, "home", tmp_path)
    images = images_of([0, 1, 2])
    measure(model, images, conditional=False)
    (free,) = (tmp_path / "likelihood").iterdir()
    assert free.name == "holdout-00000001-ema-seed0-no-class"
    assert not (tmp_path / bound.CALIBRATION).exists()
    measure(model, images)
    assert (tmp_path / "likelihood/holdout-00000001-ema-seed0").is_dir()
    with np.load(tmp_path / bound.CALIBRATION) as kept:
        assert kept["split"] == "holdout, with labels"
        x_0 = np.float64(images.source.read(images.indices)) / 127.5 - 1
        errors = np.square(x_0 - LEVELS[:3].reshape(-1, 1, 1, 1))
        np.testing.assert_allclose(kept["mse"], errors.mean(), rtol=1e-4)
    without = Loaded("levels", Levels(tiny), model.params, "ema", 1, None)
    assert bound.about_images(without, images, 0)["split"] == "holdout"
    assert "conditional" not in bound_place.label_of(without, images, 0)
    assert bound_place.folder_of(without, images, 0).name == "holdout-00000001-ema-seed0"


def test_a_class_has_its_kid_and_how_often_it_is_recognised(rng):
    labels = np.array([4] * 30 + [1] * 25 + [-1] * 5)
    features = rng.normal(size=(60, 3))
    real_labels = np.array([4] * 40 + [1] * (LEAST - 1))
    real = rng.normal(size=(len(real_labels), 3)) + 2 * (real_labels == 4)[:, None]
    named = np.where(np.arange(60) % 3 == 0, 4, 1)
    of_one, of_four = of_classes(features, labels, real, real_labels, named)
    assert (of_one["label"], of_four["label"]) == (1, 4)
    assert (of_four["samples"], of_four["images"]) == (30, 40)
    assert of_four["named_right"] == 10 / 30
    assert of_one["named_right"] == np.mean(named[30:55] == 1)
    assert of_one["kid"] is None  # Of too few images.
    # The same two sets by the definition: the kernel's means over all pairs, no image with itself.
    x, y = features[:30], real[:40]

    def mean(a, b):
        kernel = (a @ b.T / 3 + 1) ** 3
        if a is b:
            return (kernel.sum() - np.trace(kernel)) / (len(a) * (len(a) - 1))
        return kernel.mean()

    kid = mean(x, x) + mean(y, y) - 2 * mean(x, y)
    assert abs(of_four["kid"] - kid) < 2 * of_four["kid_error"] < kid
    lines = lines_of([of_one, of_four], "proxy KID")
    assert lines[0].split() == [
        "class",
        "samples",
        "images",
        "proxy",
        "KID",
        "error",
        "named",
        "right",
    ]
    assert lines[1].split() == ["1", "25", "19", "-", "-", f"{of_one['named_right']:.1%}"]
    assert lines[2].split()[-1] == "33.3%"
    nothing = of_classes(features, labels, real, real_labels, None)
    assert lines_of(nothing, "KID")[2].split()[-1] == "-"
    assert lines_of([of_four] * 60, "KID")[-1].startswith("and 10 classes more")


def _by_level(*_):
    """An extractor of two features, which names the class whose level is nearest."""

    def apply(_, images):
        x = np.asarray(images, np.float32).reshape(len(images), -1) / 127.5 - 1
        two = np.stack([x.mean(1), x.std(1)], axis=1)
        return two, -np.abs(x.mean(1)[:, None] - LEVELS[None, :CLASSES])

    return Extractor("proxy", apply, {}, make_mesh(1), "0" * 64, {"accuracy": 0.5})


def drawn_labels(folder, n):
    """The classes whose levels the images in `folder` have; -1 for that of no class."""
    files = [folder / f"{i:06d}.png" for i in range(n)]
    pixels = np.stack([np.asarray(Image.open(file), np.float32) for file in files])
    levels = pixels.mean(axis=(1, 2)) / 127.5 - 1
    found = np.abs(levels[:, None] - LEVELS).argmin(axis=1)
    np.testing.assert_allclose(levels, LEVELS[found], atol=1e-2)
    return np.where(found == CLASSES, -1, found)


def test_samples_are_compared_class_by_class(model, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "proxy", _by_level)
    real = images_of([0] * 60 + [1] * 30 + [2] * 10)
    data = npz_of(real, tmp_path)
    options = {"sampler": Sampler("ddim", 3), "likelihood": False}
    out = tmp_path / "out"
    result = evaluate(model, data, 50, out=out, **options)
    assert np.bincount(drawn_labels(out / "samples", 50)).tolist() == [30, 15, 5]
    rows = {row["label"]: row for row in result["classes"]}
    assert [rows[c]["samples"] for c in range(3)] == [30, 15, 5]
    assert [rows[c]["images"] for c in range(3)] == [60, 30, 10]
    assert [rows[c]["named_right"] for c in range(3)] == [1, 1, 1]
    assert abs(rows[0]["kid"]) < 0.01 and rows[1]["kid"] is None
    right = result["values"]["proxy_named_right"]
    assert right["value"] == 1 and right["error_is"] == "binomial, 50 samples with a label"
    assert "10 in the images' proportions" in result["labels"] and result["guidance"] == 1
    assert "named right" in table(result) and "100.0%" in table(result)
    json.loads(next(out.glob("proxy-50-*.json")).read_text())
    # More samples go on with the same labels; others are not mixed with them.
    assert evaluate(model, data, 52, out=out, **options)["labels"] == result["labels"]
    assert (
        drawn_labels(out / "samples", 52)[:50].tolist()
        == drawn_labels(out / "samples", 50).tolist()
    )
    for other in (Guide(guidance=2.0), Guide((0, 1)), Guide((-1,))):
        with pytest.raises(UserError, match=r"holds results made with (labels|guidance) "):
            evaluate(model, data, 52, out=out, guide=other, **options)
    with pytest.raises(UserError, match=r"holds results made with labels .*, not None"):
        sample_to(destination(f"{out}/samples/"), model, 60, 0, options["sampler"])
    free = evaluate(model, data, 24, out=tmp_path / "free", guide=Guide((-1,)), **options)
    assert set(drawn_labels(tmp_path / "free/samples", 24)) == {-1}
    assert free["classes"] == [] and "proxy_named_right" not in free["values"]
    assert "named right" not in table(free)


def test_classes_in_turn_share_the_images_of_sample(model, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "proxy", _by_level)
    data = npz_of(images_of([0, 1, 2] * 10), tmp_path)
    sampler = Sampler("ddim", 3)
    guide = Guide(guidance=1.5, guidance_interval=(0, 9))
    folder = destination(f"{tmp_path}/drawn/")
    sample_to(folder, model, 20, 0, sampler, guide=Guide((0, 1, 2), 1.5, (0, 9)))
    options = {"sampler": sampler, "likelihood": False, "samples": folder.path}
    result = evaluate(model, data, 24, out=tmp_path / "out", guide=guide, **options)
    assert result["labels"] == (0, 1, 2)
    assert "guidance 1.5 at 0 <= t < 9" in table(result)
    levels = np.asarray(Image.open(folder.path / "000002.png")) / 127.5 - 1
    np.testing.assert_allclose(levels, 1.5 * LEVELS[2], atol=1e-2)


def test_what_is_drawn_otherwise_has_a_folder_of_its_own(model):
    guides = [Guide((0, 1)), Guide((0, 1, 2)), Guide((0, 1), 2.0), Guide((0, 1), 2.0, (0, 5))]
    guides += [InProportion((0, 1)), UNGUIDED]
    names = [module._name(model, Sampler("ancestral"), 0, guide) for guide in guides]
    assert len(set(names)) == len(names)
    assert names[-1] == "00000001-ema-ancestral-seed0"
    assert re.fullmatch(names[-1] + r"-guidance2-[0-9a-f]{8}", names[2])


def test_the_papers_figures_stand_beside_models_without_classes_alone():
    config = load_config("cifar10")
    assert paper.results_of(config, "tfds:cifar10")
    assert paper.results_of(with_(config, model={"num_classes": 10}), "tfds:cifar10") == {}


def test_the_commands_take_them():
    asked = ["x", "--labels", "0", "2", "--guidance", "2", "--guidance-interval", "3", "9"]
    assert parse(EvaluateOptions, asked, "evaluate").guide == Guide((0, 2), 2.0, (3, 9))
    for words, expected in [
        ([], None),
        (["--conditional", "True"], True),
        (["--conditional"], True),
        (["--no-conditional"], False),
    ]:
        asked = ["x", *words, "--seed", "3"]
        assert parse(LikelihoodOptions, asked, "likelihood").conditional is expected


def test_parts_of_a_chain_know_the_labels_of_their_images(model, always):
    """What is predicted, and where a chain ends, is the level of each image's class."""
    ddpm, params = model.ddpm, model.params
    key = jax.random.key(0)
    x = jax.random.normal(key, (3, 8, 8, 1))
    labels = np.array([2, -1, 0])
    levels = LEVELS[labels].reshape(-1, 1, 1, 1)
    end, x_0 = ddpm.reverse(params, keys_of(key, 3), x, 10, labels=labels)
    np.testing.assert_allclose(x_0, np.broadcast_to(levels, x.shape), atol=1e-5)
    np.testing.assert_allclose(end, x_0, atol=1e-5)
    one, _ = ddpm.reverse(params, keys_of(key, 3), x, 10, 4, labels=0)
    some, _ = ddpm.reverse(params, keys_of(key, 3), x, 10, 4, labels=labels)
    np.testing.assert_array_equal(some[2], one[2])
    assert np.abs(some - one)[1].max() > 0.1
    decoded = ddpm.decode(params, x, labels=labels)
    np.testing.assert_allclose(decoded, np.broadcast_to(levels, x.shape), atol=1e-5)
    latents = ddpm.encode(params, x, labels=labels)
    np.testing.assert_array_equal(latents[1], ddpm.encode(params, x)[1])
    np.testing.assert_array_equal(latents[0], ddpm.encode(params, x, labels=2)[0])
    assert np.abs(latents - ddpm.encode(params, x))[0].max() > 0.1
    for call in (always.ddpm.encode, always.ddpm.decode):
        with pytest.raises(UserError, match=r"^labels: this model knows no images without a class"):
            call(params, x)
    with pytest.raises(UserError, match=r"^labels: must be one or \[3\]"):
        ddpm.reverse(params, keys_of(key, 3), x, 10, labels=[0, 1])


def test_chains_on_any_grid_draw_the_labels_of_their_starts(always):
    guide = Guide((2, 0))
    calls = []
    chains = Chains(always, 0, 4, calls.append, guide)
    images = chains.images(Sampler("ddim"), (0, 5, 9), 3, 5)
    np.testing.assert_allclose(images.mean(axis=(1, 2, 3)), LEVELS[[0, 2, 0, 2, 0]], atol=1e-4)
    exact = steps.draw_fine(always, 0, 1, 2, calls.append, guide)
    np.testing.assert_allclose(exact.mean(axis=(1, 2, 3)), LEVELS[[0, 2]], atol=1e-4)
    images = steps.draw(always, Sampler(), 0, 1, 3, calls.append, guide=guide)
    np.testing.assert_allclose(images.mean(axis=(1, 2, 3)), LEVELS[[0, 2, 0]], atol=1e-4)


def test_samplers_are_tuned_on_labels_in_turn(model, always, tiny, tmp_path, monkeypatch):
    found = []

    def stop(*args):
        found.append(args[-1])
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "Chains", stop)
    monkeypatch.setattr(tuning, "to_calibrate_on", lambda *_: None)
    monkeypatch.setattr(choice, "proxy", _by_level)
    data = npz_of(images_of([0] * 20 + [1] * 10), tmp_path)
    without = Loaded("levels", Levels(tiny), model.params, "ema", 1, None)
    for each, sampler in [(model, Sampler("unipc")), (always, None), (without, Sampler("unipc"))]:
        with pytest.raises(KeyboardInterrupt):
            placed = each._replace(path=tmp_path)
            tuning.tune(placed, 3, sampler, data=None if sampler else data, out=tmp_path)
    assert found == [Guide((0, 1, 2)), InProportion((0, 1, 0)), UNGUIDED]
    judge = steps.FidJudge(None, {})
    assert judge.guide == UNGUIDED


@pytest.fixture
def drawing(always, monkeypatch):
    """Figures are of a model that knows no images without a class."""
    monkeypatch.setattr(RunFigure, "load", lambda self: always)


def test_figures_draw_the_classes_in_turn(drawing, tmp_path):
    def numbers(figure):
        with np.load(figure.draw().with_suffix(".npz")) as file:
            return dict(file)

    options = {"run": "levels", "out": f"{tmp_path}/x.png"}
    of_chain = numbers(figures.Progressive(**options, n=4, frames=3))
    levels = LEVELS[[0, 1, 2, 0]]
    of_images = of_chain["x_0"].mean(axis=(0, 2, 3, 4)) / 127.5 - 1
    np.testing.assert_allclose(of_images, levels, atol=1e-2)
    shared = numbers(figures.SharedLatent(**options, n=4))
    of_images = shared["samples"].mean(axis=(0, 2, 3, 4, 5)) / 127.5 - 1
    np.testing.assert_allclose(of_images, levels, atol=1e-2)
    data = npz_of(images_of([0, 1, 2] * 3), tmp_path)
    near = numbers(figures.Neighbours(**options, n=4, neighbours=1, data=data))
    of_images = near["samples"].mean(axis=(1, 2, 3)) / 127.5 - 1
    np.testing.assert_allclose(of_images, levels, atol=1e-2)
    assert (near["index"][:, 0] % 3).tolist() == [0, 1, 2, 0]
    with pytest.raises(UserError, match=r"^run: the images are mixed as ones of no class"):
        figures.Interpolate(**options).draw()
    assert names_of("sample", 2, None) == ["sample 0", "sample 1"]
    assert names_of("sample", 2, np.array([2, 0])) == ["sample 0, class 2", "sample 1, class 0"]


def test_a_plan_counts_the_embedding(tiny):
    """Of a model without "no class", whose network takes no images without labels."""
    before = plan(tiny, 1)
    planned = plan(with_(tiny, model={"num_classes": 1000, "no_class": False}), 1)
    more = 1000 * 4 * 4  # Rows of the width of the time embedding.
    assert planned.parameters - before.parameters == more
    for name in ("params", "ema_params", "gradient"):
        assert getattr(planned, name) - getattr(before, name) == 4 * more
    assert planned.opt_state - before.opt_state == 8 * more
    assert planned.flops == before.flops  # Rows are looked up, not multiplied.
    assert 0 <= planned.activations - before.activations <= 8 * 100


def test_a_plan_reads_the_number_of_classes_from_the_data(tmp_path, capsys, monkeypatch):
    planned = []
    monkeypatch.setattr(planning, "plan", lambda config, *_: planned.append(config))
    monkeypatch.setattr(planning, "table", lambda *_: "")
    asked = ["--model.num-classes", "auto", "--data.image-shape", "8", "8", "1"]
    assert main(["plan", "digits", *asked]) == 0
    assert planned[0].model.num_classes == 10
    np.savez(tmp_path / "bare.npz", images=np.zeros((4, 8, 8, 1), np.uint8))
    bare = ["--data.source", f"npz:{tmp_path}/bare.npz"]
    assert "these images have no labels" in refused(capsys, "plan", "digits", *asked, *bare)


@pytest.mark.parametrize("classes", [None, 3])
def test_a_runs_grid_of_samples_has_the_classes_in_turn(tiny, monkeypatch, classes):
    calls = []
    monkeypatch.setattr(DDPM, "sample", lambda *args, labels, **_: calls.append(labels))
    ddpm = DDPM(with_(tiny, model={"num_classes": classes, "no_class": False}))
    state = SimpleNamespace(ema_params={"x": np.zeros(1)})
    train._pictures(ddpm, state, make_mesh(1), False)
    assert calls[0] is None if classes is None else calls[0].tolist() == [0, 1, 2, 0]


def test_the_benchmark_of_samplers_draws_labels_in_turn(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    benchmark = importlib.import_module("samplers")
    asked = []

    def draw(model, sampler, seed, start, count, move, *, batch_size, guide):
        asked.append(guide.of(np.arange(start, start + count)).get("labels"))
        return np.zeros((count, 8, 8, 1), np.float32)

    monkeypatch.setattr(benchmark, "draw", draw)
    options = SimpleNamespace(labels=[2, 0, 1], n=5, batch_size=2, seed=0)
    store = benchmark.Store(None, {})
    images, _ = benchmark.drawn_and_timed(store, "key", None, Sampler("ddim", 2), options)
    assert len(images) == 5 and np.concatenate(asked).tolist() == [2, 0, 1, 2, 0, 1]
    options.labels = None
    benchmark.drawn_and_timed(store, "key", None, Sampler("ddim", 2), options)
    assert asked[-1] is None
    # Rows with other labels are no rows of the same file, nor are those of before without.
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"about": {"batch": 2}, "rows": []}))
    benchmark.Store(file, {"batch": 2, "labels": None})
    with pytest.raises(UserError, match="was measured with another labels; choose another --out"):
        benchmark.Store(file, {"batch": 2, "labels": [2, 0, 1]})
