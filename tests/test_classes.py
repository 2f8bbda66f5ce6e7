"""Classes: what labels and guidance do, in the network, the loss, training and sampling."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import lines, on_one_device, with_

from ddpm_jax import DDPM, UserError, fit, load
from ddpm_jax.config import Config, Model
from ddpm_jax.data import from_array
from ddpm_jax.keys import LABEL, example_keys, fold
from ddpm_jax.samplers import SAMPLERS
from ddpm_jax.training import holdout, update

KEY = jax.random.key(5)
CLASSES = 3


@pytest.fixture(scope="module")
def config(tiny):
    return with_(tiny, model={"num_classes": CLASSES})


@pytest.fixture(scope="module")
def model(config):
    """(ddpm, params) whose classes draw differently."""
    ddpm = DDPM(config)
    leaves, tree = jax.tree.flatten(ddpm.shapes)
    # Fresh parameters hold many zeros, through which no class is seen.
    drawn = [
        0.3 * jax.random.normal(jax.random.fold_in(KEY, i), leaf.shape)
        for i, leaf in enumerate(leaves)
    ]
    return ddpm, jax.tree.unflatten(tree, drawn)


@pytest.fixture
def labels():
    """Of the 48 pictures."""
    return np.arange(48) % CLASSES


def assert_same(a, b):
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_network_with_classes_starts_as_one_without(tiny, config):
    without = DDPM(tiny)
    params = DDPM(config).init(KEY)
    rows = params.pop("class_embedding")["embedding"]
    assert rows.shape == (CLASSES + 1, 4 * 4) and not rows.any()
    assert_same(params, without.init(KEY))


def test_no_labels_are_the_last_row(model):
    ddpm, params = model
    x_t = jax.random.normal(KEY, (4, 8, 8, 1))
    t = jnp.arange(4)
    denoise = jax.jit(ddpm.denoise)
    of_none = denoise(params, x_t, t)
    np.testing.assert_array_equal(of_none, denoise(params, x_t, t, jnp.full(4, -1)))
    row = jnp.zeros_like(params["class_embedding"]["embedding"]).at[CLASSES].set(9)
    changed = {**params, "class_embedding": {"embedding": row}}
    assert (denoise(changed, x_t, t) != of_none).any()
    of_two = denoise(params, x_t, t, jnp.array([2, 2, 2, 2]))
    np.testing.assert_array_equal(of_two, denoise(params, x_t, t, 2))
    mixed = denoise(params, x_t, t, jnp.array([2, -1, 2, -1]))
    np.testing.assert_allclose(mixed[::2], of_two[::2], atol=1e-6)
    np.testing.assert_allclose(mixed[1::2], of_none[1::2], atol=1e-6)
    assert np.abs(of_two - of_none).max() > 0.01


def test_an_image_follows_from_its_key_its_number_and_its_label(model):
    ddpm, params = model
    labels = np.array([0, 1, 2, -1, 1])
    options = {"guidance": 2.5, "sampler": "ddim", "steps": 4}
    images = ddpm.sample(params, KEY, 5, labels=labels, **options)
    parts = ddpm.sample(params, KEY, 5, labels=labels, batch_size=2, **options)
    np.testing.assert_allclose(images, parts, atol=1e-5)
    later = ddpm.sample(params, KEY, 2, labels=labels[3:], start=3, **options)
    np.testing.assert_allclose(images[3:], later, atol=1e-5)
    one = ddpm.sample(params, KEY, 2, labels=1, start=4, **options)
    np.testing.assert_allclose(images[4], one[0], atol=1e-5)
    free = ddpm.sample(params, KEY, 5, sampler="ddim", steps=4)
    np.testing.assert_allclose(images[3], free[3], atol=1e-5)  # No class leads nowhere.
    assert np.abs(images - free)[:3].max() > 0.05


@pytest.mark.parametrize("name", ["ancestral", "unipc"])
def test_guidance_is_that_of_the_formula(model, name):
    """The chain of a `denoise_fn` of two separate calls."""
    ddpm, params = model
    labels = jnp.array([0, 2, 1])
    lo, hi = 3, 8

    def denoise_fn(x_t, t):
        of_label = ddpm.denoise(params, x_t, t, labels)
        of_none = ddpm.denoise(params, x_t, t)
        w = jnp.where((lo <= t) & (t < hi), 3.0, 1.0)[:, None, None, None]
        return of_none + w * (of_label - of_none)

    keys = example_keys(KEY, jnp.arange(3))
    diffusion = ddpm.config.diffusion
    options = {"prediction": "eps", "variance": diffusion.variance, "clip": diffusion.clip}
    expected = SAMPLERS[name](ddpm.schedule, denoise_fn, keys, (8, 8, 1), **options)
    guide = {"labels": labels, "guidance": 3, "guidance_interval": (lo, hi)}
    images = ddpm.sample(params, KEY, 3, sampler=name, **guide)
    np.testing.assert_allclose(images, np.clip(expected, -1, 1), atol=2e-5)
    plain = ddpm.sample(params, KEY, 3, sampler=name, labels=labels)
    assert np.abs(images - plain).max() > 0.01
    everywhere = {**guide, "guidance_interval": (0, 10)}
    np.testing.assert_allclose(
        ddpm.sample(params, KEY, 3, sampler=name, **everywhere),
        ddpm.sample(params, KEY, 3, sampler=name, labels=labels, guidance=3),
        atol=1e-6,
    )


def test_the_bound_knows_labels(model, pictures):
    ddpm, params = model
    x_0 = np.float32(pictures[:4]) / 127.5 - 1
    of_none = ddpm.bits_per_dim(params, KEY, x_0)
    free = ddpm.bits_per_dim(params, KEY, x_0, labels=-1)
    assert_same(of_none, free)
    mixed = ddpm.bits_per_dim(params, KEY, x_0, labels=[1, -1, 1, -1])
    np.testing.assert_allclose(mixed.total[1::2], of_none.total[1::2], rtol=1e-5)
    assert (np.abs(mixed.total - of_none.total)[::2] > 1e-3).all()


def test_dropout_of_labels_reaches_its_rate(config):
    keys = example_keys(KEY, jnp.arange(20_000))
    for rate in (0.0, 0.1, 1.0):
        ddpm = DDPM(with_(config, train={"label_dropout": rate}))
        dropped = np.asarray(ddpm._with_dropout(keys, jnp.ones(20_000, jnp.int32)))
        assert set(dropped) <= {1, -1}
        error = np.sqrt(rate * (1 - rate) / 20_000)
        assert abs((dropped == -1).mean() - rate) <= 6 * error
    # The draw is the label's own: not that of the time, the noise or the flips.
    assert LABEL not in (0, 1, 2, 3) and fold(keys, LABEL).shape == keys.shape


def test_training_learns_the_classes_of_its_batch_alone(config, pictures):
    ddpm = DDPM(with_(config, optim={"warmup_steps": 0}, train={"label_dropout": 0.5}))
    state = jax.jit(update.init_state, static_argnums=0)(ddpm)
    # The last layer starts at zero, where nothing before it learns.
    params = {**state.params, "out_conv": {"kernel": jnp.ones((3, 3, 4, 1)), "bias": jnp.zeros(1)}}
    step = jax.jit(update.train_step, static_argnums=0)
    batch = update.Batch(pictures[:8], np.array([0, 2] * 4, np.int32))
    after, _ = step(ddpm, state._replace(params=params), batch)
    moved = np.abs(after.params["class_embedding"]["embedding"]).max(axis=1) > 0
    assert moved.tolist() == [True, False, True, True]
    certain = DDPM(with_(ddpm.config, train={"label_dropout": 0.0}))
    after, _ = step(certain, state._replace(params=params), batch)
    moved = np.abs(after.params["class_embedding"]["embedding"]).max(axis=1) > 0
    assert moved.tolist() == [True, False, True, False]


def test_a_run_with_classes_resumes_and_counts_the_classes(config, pictures, labels, tmp_path):
    config = on_one_device(config, model={"num_classes": "auto"}, checkpoint={"every": 100})
    whole = fit(config, tmp_path / "whole", pictures, labels)
    fit(with_(config, train={"steps": 2}), tmp_path / "parts", pictures, labels)
    resumed = fit(config, tmp_path / "parts", pictures, labels)
    assert_same(whole, resumed)
    kept = json.loads((tmp_path / "whole/config.json").read_text())["model"]
    assert kept["num_classes"] == CLASSES
    ddpm, params = load(tmp_path / "whole")
    assert ddpm.config.model.num_classes == CLASSES
    assert ddpm.sample(params, KEY, 2, labels=1).shape == (2, 8, 8, 1)
    assert "holdout_loss" in lines(tmp_path / "whole")[-1]
    split = fit(with_(config, train={"accumulate": 4}), tmp_path / "split", pictures, labels)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(split), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)


def test_the_held_out_loss_takes_the_labels(model, pictures, labels):
    ddpm, params = model
    source = from_array(pictures, (8, 8, 1), labels)
    bare = from_array(pictures, (8, 8, 1))
    indices = np.arange(10)
    loss = holdout.holdout_loss(ddpm, params, source, indices)
    assert loss != holdout.holdout_loss(ddpm, params, bare, indices)


def test_a_run_with_classes_starts_from_weights_without(run, config, pictures, labels, tmp_path):
    config = on_one_device(with_(config, optim={"learning_rate": 1e-9}))
    state = fit(config, tmp_path / "run", pictures, labels, init_from=run)
    before = dict(load(run)[1])
    after = dict(state.params)
    rows = after.pop("class_embedding")["embedding"]
    np.testing.assert_allclose(rows, 0, atol=1e-7)
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-7)


WITHOUT = {"num_classes": None}
ALWAYS = {"no_class": False}


@pytest.mark.parametrize(
    ("network", "options", "words"),
    [
        ({}, {"labels": 3}, "labels: must be from 0 to 2, or -1 for no class, got 3"),
        ({}, {"labels": [0, -2]}, "labels: must be from 0 to 2, or -1 for no class, got -2"),
        ({}, {"labels": [0, 1, 2]}, r"labels: must be one or \[2\], one per image, got \[3\]"),
        ({}, {"labels": 0.5}, "labels: must be integers, got float64"),
        ({}, {"guidance": 2}, "guidance: leads images towards their class; give labels, too"),
        ({}, {"labels": 1, "guidance": np.inf}, "guidance: must be a finite number, got inf"),
        (
            {},
            {"labels": 1, "guidance_interval": (0, 5)},
            "guidance_interval: acts on a guidance other than 1; give that, too",
        ),
        (
            {},
            {"labels": 1, "guidance": 2, "guidance_interval": (5, 5)},
            "guidance_interval: must be .lo, hi. with lo < hi",
        ),
        (WITHOUT, {"labels": 1}, "labels: this model was trained without classes; leave them out"),
        (ALWAYS, {"labels": -1}, "labels: must be from 0 to 2, got -1"),
        (ALWAYS, {}, "labels: this model knows no images without a class; give labels from 0 to 2"),
        (ALWAYS, {"labels": 0, "guidance": 2}, "guidance: needs a model that knows images without"),
    ],
)
def test_what_does_not_fit_is_one_line(config, network, options, words):
    ddpm = DDPM(with_(config, model=network))
    with pytest.raises(UserError, match=f"^{words}"):
        ddpm.sample(ddpm.shapes, KEY, 2, **options)


@pytest.mark.parametrize(
    ("classes", "labels", "words"),
    [
        ("auto", None, "model.num_classes: these images have no labels; sort them into"),
        (2, np.arange(48) % 3, "model.num_classes: 2 classes have labels 0 to 1, or -1 for"),
        (3, np.arange(48) % 3 - 2, "model.num_classes: 3 classes .* are from -2 to 0; renumber"),
        ("auto", np.full(48, -1), "model.num_classes: 0 classes"),
    ],
)
def test_data_that_do_not_fit_are_one_line(config, pictures, tmp_path, classes, labels, words):
    config = with_(config, model={"num_classes": classes})
    with pytest.raises(UserError, match=f"^{words}"):
        fit(config, tmp_path / "run", pictures, labels)
    assert not (tmp_path / "run").exists()


def test_classes_that_are_not_counted_yet_make_no_model(tiny):
    with pytest.raises(UserError, match=r"^model\.num_classes: auto stands for the classes"):
        DDPM(with_(tiny, model={"num_classes": "auto"})).network  # noqa: B018
    assert Model().class_rows == 0 and Config().model.num_classes is None
    assert dataclasses.replace(Model(), num_classes=5, no_class=False).class_rows == 5


def test_the_command_draws_labels_in_turn_a_row_each(config, pictures, labels, tmp_path, capsys):
    from PIL import Image

    from ddpm_jax.cli import main

    run = tmp_path / "run"
    fit(on_one_device(with_(config, train={"steps": 2})), run, pictures, labels)
    args = ["sample", str(run), "--labels", "2", "0", "--guidance", "3", "--steps", "4"]
    file = tmp_path / "x.npz"
    assert main([*args, "-n", "5", "--out", str(file)]) == 0
    drawn = np.load(file)
    assert drawn["labels"].tolist() == [2, 0, 2, 0, 2]
    ddpm, params = load(run)
    rng = jax.random.key(0, impl="threefry2x32")
    expected = ddpm.sample(params, rng, 5, labels=[2, 0, 2, 0, 2], guidance=3, steps=4)
    assert np.abs(drawn["images"] - (expected + 1) * 127.5).max() <= 1
    # A file of the run is the same model.
    exported = f"{tmp_path}/model.safetensors"
    assert main(["export", str(run), "--out", exported]) == 0
    again, found = load(exported)
    assert again.config.model == ddpm.config.model and again.config.model.num_classes == CLASSES
    assert_same(found, params)
    assert main([*args, "-n", "5", "--out", str(tmp_path / "x.png")]) == 0
    picture = np.asarray(Image.open(tmp_path / "x.png"))
    assert picture.shape == (2 * 51 + 3, 3 * 51 + 3)
    np.testing.assert_array_equal(picture[54:102:6, 3:51:6], drawn["images"][1, ..., 0])
    assert (picture[54:102, 105:153] == 255).all()
    folder = f"{tmp_path}/files/"
    assert main([*args, "-n", "3", "--out", folder]) == 0
    assert main([*args, "-n", "5", "--out", folder]) == 0
    image = np.asarray(Image.open(tmp_path / "files/000004.png"))
    np.testing.assert_array_equal(image, drawn["images"][4, ..., 0])
    from conftest import refused

    other = refused(capsys, *args, "--out", folder, "--guidance", "2")
    assert "guidance 3.0, not 2.0" in other
    assert "got 3" in refused(capsys, "sample", run, "--labels", 0, 3, "-n", 1)
    assert "give labels, too" in refused(capsys, "sample", run, "--guidance", 2)
