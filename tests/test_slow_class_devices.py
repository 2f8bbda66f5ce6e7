"""Classes on several devices and in several processes: the same parameters, the same images."""

import jax
import numpy as np
import pytest
from conftest import on_one_device, with_
from test_parallel import steps_of
from test_slow_processes import CONFIG, assert_same_run, results_of

from ddpm_jax import DDPM, load
from ddpm_jax.devices import mesh as parallel
from ddpm_jax.devices.mesh import make_mesh, replicate

pytestmark = pytest.mark.slow

CLASSES = 3
WAYS = {
    "jit": {"devices": 2},
    "fsdp": {"devices": 2, "fsdp": 2},
    "pmap": {"devices": 2, "mode": "pmap"},
}


@pytest.fixture(scope="module")
def config(tiny):
    return with_(tiny, model={"num_classes": CLASSES}, train={"label_dropout": 0.3})


@pytest.fixture(scope="module")
def labels():
    """Of the 48 pictures; some are of no class."""
    return np.arange(48) % (CLASSES + 1) - 1


@pytest.fixture(scope="module")
def plain(config, pictures, labels):
    """(losses and gradient norms, state) on one device, after the embedding has moved."""
    return steps_of(on_one_device(config), pictures, 6, labels)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_dividing_the_work_learns_the_classes(
    config, pictures, labels, plain, monkeypatch, way
):
    monkeypatch.setattr(parallel, "SMALL", 16)
    metrics, state = steps_of(with_(config, parallel=WAYS[way]), pictures, 6, labels)
    np.testing.assert_allclose(metrics, plain[0], rtol=1e-5)
    for ours, theirs in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(plain[1].params), strict=True
    ):
        # Adam divides by the gradient's size: where that is all but 0, rounding decides the sign.
        assert np.mean(np.abs(np.asarray(ours) - np.asarray(theirs)) > 1e-5) < 0.01
    rows = state.params["class_embedding"]["embedding"]
    assert ("fsdp" in rows.sharding.spec) == (way == "fsdp")


def test_the_labels_count_in_what_is_learned(config, pictures, labels, plain):
    """Otherwise the other tests here would compare nothing."""
    _, state = steps_of(on_one_device(config), pictures, 6, np.roll(labels, 1))
    rows, others = (
        np.asarray(each.params["class_embedding"]["embedding"]) for each in (state, plain[1])
    )
    assert (np.abs(rows - others).max(axis=1) > 1e-4).all()


def test_guided_images_of_two_devices_are_those_of_one(config, plain):
    ddpm = DDPM(config)
    key = jax.random.key(3)
    # Larger than after six updates, so that labels and guidance are seen.
    params = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.1, plain[1].params)
    params["class_embedding"] = {"embedding": np.eye(CLASSES + 1, 16, dtype=np.float32)}
    drawn = {}
    for devices in (1, 2):
        placed = replicate(params, make_mesh(devices))
        images = ddpm.sample(placed, key, 6, labels=[0, 1, 2, -1, 0, 1], guidance=2)
        drawn[devices] = np.asarray(images)
    np.testing.assert_allclose(drawn[1], drawn[2], atol=1e-5)
    bare = ddpm.sample(placed, key, 6, labels=[0, 1, 2, -1, 0, 1])
    assert np.abs(bare - drawn[2]).max() > 1e-3


def test_two_processes_learn_the_classes_as_one_does(pictures, labels, tmp_path):
    np.savez(tmp_path / "pictures.npz", images=pictures, labels=labels)
    (tmp_path / "tiny.py").write_text(CONFIG)
    command = ["train", "tiny.py", "--model.num-classes", CLASSES, "--workdir"]
    for processes in (1, 2):
        results = results_of(tmp_path, processes, 1, *command, f"run-{processes}")
        assert [code for code, _ in results] == [0] * processes, results
    assert_same_run(tmp_path / "run-2", tmp_path / "run-1")
    assert load(tmp_path / "run-2")[0].config.model.num_classes == CLASSES
