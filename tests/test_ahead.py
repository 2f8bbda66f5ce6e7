"""Work for the device and the host at the same time: the order of what happens, not its time."""

import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import HANG
from etils import epath

from ddpm_jax.calls import programs
from ddpm_jax.devices.ahead import beside, made_beside, one_ahead
from ddpm_jax.devices.mesh import make_mesh
from ddpm_jax.evaluation import features
from ddpm_jax.evaluation.sample import destination, sample_to
from ddpm_jax.evaluation.sample_files import SampleFiles
from ddpm_jax.weights.load import load_weights


def test_an_item_comes_once_the_next_is_made():
    happened = []

    def items(n):
        for i in range(n):
            happened.append(f"make {i}")
            yield i

    for n in (0, 1, 3):
        happened.clear()
        for i in one_ahead(items(n)):
            happened += [f"take {i}"]
        order = ["make 0", "make 1", "take 0", "make 2", "take 1", "take 2"]
        assert happened == {0: [], 1: ["make 0", "take 0"], 3: order}[n]


def test_items_are_made_in_a_thread_while_the_last_is_taken():
    begun = [threading.Event() for _ in range(3)]

    def make(i):
        begun[i].set()
        return i, threading.current_thread()

    for i, thread in made_beside(make, range(3)):
        assert thread is not threading.current_thread()
        assert i == 2 or begun[i + 1].wait(HANG)

    with pytest.raises(ZeroDivisionError):
        list(made_beside(lambda i: 1 // i, [1, 0, 2]))


def test_calls_beside_keep_their_order_and_their_errors():
    done = []
    with beside() as call:
        for i in range(5):
            call(done.append, i)
    assert done == list(range(5))
    with pytest.raises(ZeroDivisionError), beside() as call:
        call(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError), beside() as call:
        call(lambda: 1 // 0)
        call(done.append, 5)
    with pytest.raises(KeyboardInterrupt), beside() as call:
        call(done.append, 6)
        raise KeyboardInterrupt
    assert done[5:] == [6]


@pytest.mark.parametrize("name", ["samples/", "samples.npz"])
def test_samples_are_written_while_the_next_are_drawn(run, tmp_path, monkeypatch, name):
    """The first batch waits to be finished until the second is on its way to its last step."""
    model = load_weights(run)
    whole = model.ddpm.sample(model.params, jax.random.key(0), 4)
    advance = programs.advance
    last_segments = []
    second = threading.Event()

    def noted(*args):
        if args[-1] == 10:
            last_segments.append(args[-1])
        if len(last_segments) == 2:
            second.set()
        return advance(*args)

    def waits(function):
        def call(self, x):
            assert second.wait(60), "the batch is finished before the next is drawn"
            return function(self, x)

        return call

    monkeypatch.setattr(programs, "advance", noted)
    monkeypatch.setattr(SampleFiles, "content", waits(SampleFiles.content))
    monkeypatch.setattr(type(model.ddpm), "to_data", waits(type(model.ddpm).to_data))
    sample_to(destination(f"{tmp_path}/{name}"), model, 4, seed=0, batch_size=2)
    assert len(last_segments) == 2
    monkeypatch.undo()
    expected = model.ddpm.to_data(whole)
    if name == "samples.npz":
        np.testing.assert_array_equal(np.load(tmp_path / name)["images"], expected)
    else:
        files = [tmp_path / f"samples/{i:06d}.png" for i in range(4)]
        read = SampleFiles(model.ddpm, ".png").read
        np.testing.assert_array_equal([read(epath.Path(file)) for file in files], expected)


def test_features_of_the_next_batch_are_dispatched_before_the_last_are_fetched(
    tmp_path, monkeypatch
):
    """Batches of 2 of 7 images, in files of 4."""
    happened = []

    def apply(scale, images):
        happened.append(f"run {int(images[0, 0])}")
        return scale * images, -images

    def fetched(tree, fetch=features.fetch):
        happened.append(f"get {int(tree[1][0, 0]) * -1}")
        return fetch(tree)

    def read(indices):
        assert threading.current_thread() is not threading.main_thread()
        return images[indices]

    monkeypatch.setattr(features, "fetch", fetched)
    monkeypatch.setattr(features, "PART", 4)
    monkeypatch.setattr(features, "BATCH", 2)
    images = np.arange(7.0, dtype=np.float32)[:, None]
    extractor = SimpleNamespace(kind="proxy", apply=apply, params=2, mesh=make_mesh(1))
    options = (7, epath.Path(tmp_path), lambda indices: "x")
    made = features.features_of(extractor, read, *options)
    assert happened == ["run 0", "run 2", "get 0", "run 4", "get 2", "run 6", "get 4", "get 6"]
    np.testing.assert_array_equal(made.features, 2 * images)
    np.testing.assert_array_equal(made.logits, -images)
    # What is in files is not read again, and a file that is gone is made alone.
    (tmp_path / "00000004-0003-x.npz").unlink()
    happened.clear()
    again = features.features_of(extractor, read, *options)
    assert happened == ["run 4", "run 6", "get 4", "get 6"]
    jax.tree.map(np.testing.assert_array_equal, again, made)
