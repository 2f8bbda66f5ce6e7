"""Training: the update by hand, resuming bit for bit, devices, signals, refusals."""

import json
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import lines, made_since, on_one_device, with_

from ddpm_jax import DDPM, UserError, fit, load
from ddpm_jax.config import Optim
from ddpm_jax.data import Batch, Batches
from ddpm_jax.devices import segments
from ddpm_jax.devices.mesh import make_mesh, place, replicated
from ddpm_jax.errors import DataLost, NonFiniteLoss, NonFiniteSamples
from ddpm_jax.keys import HOLDOUT, example_keys, random_flip
from ddpm_jax.storage import restore
from ddpm_jax.training import holdout, update


def losses_of(indices, value):
    """As `holdout._losses` gives them, all alike."""
    return [np.full(len(indices), value, np.float32)]


def assert_equal_trees(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_optimizer_is_clipped_adam_with_warm_up_from_zero():
    """Against Kingma & Ba's Algorithm 1 in NumPy."""
    optim = Optim(learning_rate=0.1, warmup_steps=4, clip_norm=1.0)
    optimizer = update.make_optimizer(optim)
    params = {"w": jnp.array([1.0, -2.0])}
    state = optimizer.init(params)
    w, m, v = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2)
    for step in range(8):
        gradient = np.array([3.0, -4.0]) * (step + 1) / 8
        updates, state = optimizer.update({"w": jnp.float32(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        gradient = gradient / max(1, np.linalg.norm(gradient))
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
        w = w - 0.1 * min(step / 4, 1) * m_hat / (np.sqrt(v_hat) + 1e-8)
        np.testing.assert_allclose(params["w"], w, rtol=1e-5)
        if step == 0:
            assert params["w"].tolist() == [1, -2]  # the first learning rate is 0


def test_no_warm_up_means_the_full_rate_at_once():
    optimizer = update.make_optimizer(Optim(learning_rate=0.1, warmup_steps=0))
    updates, _ = optimizer.update(jnp.ones(1) * 0.5, optimizer.init(jnp.zeros(1)))
    np.testing.assert_allclose(updates, -0.1, rtol=1e-5)


def test_a_step_is_loss_gradient_update_and_average(tiny, pictures):
    """The parts put together by hand, keys from fold_in(fold_in(key(seed), step), row)."""
    ddpm = DDPM(with_(tiny, seed=7, optim={"warmup_steps": 0, "ema_decay": 0.5}))
    state = jax.jit(update.init_state, static_argnums=0)(ddpm)
    assert_equal_trees(state.params, state.ema_params)
    state = state._replace(step=jnp.int32(3))
    images = pictures[:8]
    labelled = Batch(images, np.arange(8, dtype=np.int32))  # Labels come along, unused as yet.
    after, metrics = jax.jit(update.train_step, static_argnums=0)(ddpm, state, labelled)

    rng = jax.random.fold_in(jax.random.key(7), 3)
    x_0 = random_flip(example_keys(rng, jnp.arange(8)), jnp.float32(images) / 127.5 - 1)
    loss, gradient = jax.jit(
        jax.value_and_grad(lambda params: ddpm.loss(params, rng, x_0, train=True).mean())
    )(state.params)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    # Adam's first update has the size of the learning rate; the average moves half of the way.
    for name, leaf in gradient["stem"].items():
        moved = after.params["stem"][name] - state.params["stem"][name]
        large = jnp.abs(leaf) > 1e-4
        np.testing.assert_allclose(moved[large], -1e-3 * jnp.sign(leaf[large]), rtol=1e-2)
        average = after.ema_params["stem"][name] - state.ema_params["stem"][name]
        np.testing.assert_allclose(average, 0.5 * moved, atol=3e-8)
    assert int(after.step) == 4


def test_the_average_is_kept_in_float32_whatever_is_computed_in(tiny, pictures):
    ddpm = DDPM(
        with_(tiny, model={"dtype": "bfloat16"}, optim={"ema_decay": 0.9999, "warmup_steps": 0})
    )
    state = jax.jit(update.init_state, static_argnums=0)(ddpm)
    after, _ = jax.jit(update.train_step, static_argnums=0)(ddpm, state, Batch(pictures[:8]))
    assert {leaf.dtype for leaf in jax.tree.leaves(after.ema_params)} == {jnp.dtype("float32")}
    # A bfloat16 average with decay 0.9999 would not move at all.
    moved = after.ema_params["out_norm"]["scale"] - state.ema_params["out_norm"]["scale"]
    np.testing.assert_allclose(jnp.abs(moved), 1e-7, rtol=0.5)


def test_four_steps_are_two_stopped_and_resumed_to_four_bit_for_bit(tiny, pictures, tmp_path):
    config = on_one_device(tiny)
    seldom = with_(config, checkpoint={"every": 100})
    whole = fit(seldom, tmp_path / "whole", pictures)
    programs = update._step._cache_size()
    fit(with_(config, train={"steps": 2}), tmp_path / "parts", pictures)
    resumed = fit(config, tmp_path / "parts", pictures)
    assert int(resumed.step) == 4
    assert_equal_trees(whole, resumed)
    keep = ("step", "loss", "grad_norm", "steps")
    parts, straight = lines(tmp_path / "parts"), lines(tmp_path / "whole")
    assert [[line[name] for name in keep] for line in parts] == [
        [line[name] for name in keep] for line in straight
    ]
    # What a kill leaves behind: lines of updates that no checkpoint holds, and half of one.
    with (tmp_path / "parts/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 0.1}\n{"step": 6, "lo')
    again = fit(with_(config, train={"steps": 6}), tmp_path / "parts", pictures)
    longer = fit(with_(seldom, train={"steps": 6}), tmp_path / "longer", pictures)
    assert_equal_trees(again, longer)
    assert [line["step"] for line in lines(tmp_path / "parts")] == [2, 4, 6]
    assert update._step._cache_size() == programs, "another train.steps is compiled anew"


def test_a_run_directory_tells_all(tiny, pictures, tmp_path):
    run = tmp_path / "run"
    state = fit(on_one_device(tiny), run, pictures)
    assert json.loads((run / "config.json").read_text())["data"]["source"] == "array"
    about = json.loads((run / "run.json").read_text())
    start = about["starts"][0]
    assert about["images"] == 48 and len(about["data_fingerprint"]) == 32
    assert (
        start["versions"]["jax"] == jax.__version__
        and "fry" in start["prng"]
        and "xla" in start["xla_flags"]
    )
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "4"]
    assert (run / "samples.png").exists() and (run / "samples/00000004.png").exists()
    events = next((run / "tensorboard").iterdir()).read_bytes()
    assert b"grad_norm" in events and b"holdout_loss" in events and b"\x89PNG" in events
    last = lines(run)[-1]
    assert set(last) == {
        "step",
        "loss",
        "grad_norm",
        "steps",
        "steps_per_s",
        "images_per_s",
        "holdout_loss",
        "holdout_gap",
        "holdout_bands",
        "gap_bands",
    }
    ddpm, params = load(run)
    assert ddpm.config.model == tiny.model
    assert_equal_trees(params, state.ema_params)
    assert_equal_trees(load(run, weights="raw")[1], state.params)
    assert not np.array_equal(load(run, step=2)[1]["stem"]["kernel"], params["stem"]["kernel"])


def test_load_names_what_is_not_there(tiny, pictures, tmp_path):
    fit(on_one_device(tiny, train={"steps": 2}), tmp_path / "run", pictures)
    for arguments, message in [
        (dict(path=tmp_path), "not a model; name a run directory"),
        (dict(path=tmp_path / "run", step=3), "no checkpoint of step 3; choose one of 2"),
        (
            dict(path=tmp_path / "run", weights="average"),
            "weights: must be ema or raw, got 'average'",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            load(**arguments)
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["model"]["base_channels"] = 8
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError,
        match=r"no checkpoint can be used \(2: .* of shape \(4,\), "
        r"but must be .* \(8,\) by the run's config",
    ):
        load(tmp_path / "run")


def test_any_number_of_devices_learns_the_same(tiny, pictures, tmp_path):
    tiny = with_(tiny, train={"log_every": 1, "eval_every": 0}, checkpoint={"every": 100})
    losses = {}
    for devices in (1, 4):
        config = with_(tiny, parallel={"devices": devices})
        fit(config, tmp_path / str(devices), pictures)
        losses[devices] = [
            (line["loss"], line["grad_norm"]) for line in lines(tmp_path / str(devices))
        ]
    np.testing.assert_allclose(losses[4], losses[1], rtol=1e-5)
    # A run begun on one device goes on on all four.
    resumed = fit(with_(tiny, train={"steps": 5}), tmp_path / "1", pictures)
    assert len(jax.tree.leaves(resumed.params)[0].sharding.device_set) == 4


def test_every_example_gets_its_own_noise_on_every_device(tiny, pictures):
    """Sharding must not repeat the draws of the first device's rows on the others."""
    ddpm = DDPM(tiny)
    mesh = make_mesh(4)
    params = jax.device_put(
        jax.jit(update.init_state, static_argnums=0)(ddpm).params, replicated(mesh)
    )
    images = place(np.repeat(pictures[:1], 8, axis=0), mesh)
    losses = holdout._loss(ddpm, params, jax.random.key(0), images)
    assert len(set(np.asarray(losses).tolist())) == 8


def test_the_holdout_loss_takes_every_image_once(tiny, pictures):
    """Its batches are padded: the mean must be that of the images, one by one."""
    from ddpm_jax.data import from_array

    ddpm = DDPM(with_(tiny, train={"batch_size": 4}))
    params = jax.jit(update.init_state, static_argnums=0)(ddpm).params
    source, indices = from_array(pictures, (8, 8, 1)), np.array([1, 5, 9, 13, 17, 21])
    rng = [
        jax.random.fold_in(jax.random.fold_in(jax.random.key(0), HOLDOUT), start)
        for start in (0, 4)
    ]
    first = holdout._loss(ddpm, params, rng[0], pictures[indices[:4]])
    second = holdout._loss(ddpm, params, rng[1], pictures[np.resize(indices[4:], 4)])[:2]
    expected = np.concatenate([first, second]).mean()
    np.testing.assert_allclose(
        holdout.holdout_loss(ddpm, params, source, indices), expected, rtol=1e-6
    )


def test_a_holdout_loss_that_is_not_finite_stops_the_run(tiny, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(holdout, "_losses", lambda *args: losses_of(args[-1], np.nan))
    with pytest.raises(
        NonFiniteLoss, match="holdout_loss is nan at step 4; the last good checkpoint is 2"
    ):
        fit(on_one_device(tiny), tmp_path / "run", pictures)


def test_eval_every_0_means_never(tiny, pictures, tmp_path):
    fit(on_one_device(tiny, train={"steps": 2, "eval_every": 0}), tmp_path / "run", pictures)
    assert all("holdout_loss" not in line for line in lines(tmp_path / "run"))


def test_another_default_prng_draws_the_same(tiny, pictures, tmp_path):
    config = on_one_device(tiny, train={"steps": 2, "eval_every": 0})
    state = fit(config, tmp_path / "a", pictures)
    with jax.default_prng_impl("rbg"):
        assert_equal_trees(fit(config, tmp_path / "b", pictures).params, state.params)


@pytest.mark.parametrize("name", ["batch_at", "_losses"])
def test_lost_data_stop_the_run_and_keep_what_was_learned(
    tiny, pictures, tmp_path, monkeypatch, name
):
    config = on_one_device(
        tiny, train={"steps": 8, "eval_every": 3, "log_every": 5}, checkpoint={"every": 100}
    )

    def lose(*_):
        raise DataLost("data: cat/0.png was there at the start")

    batch_at = Batches.batch_at
    if name == "batch_at":
        monkeypatch.setattr(holdout, "_losses", lambda *args: losses_of(args[-1], 0.5))
        monkeypatch.setattr(
            Batches, name, lambda self, step: lose() if step == 3 else batch_at(self, step)
        )
    else:
        monkeypatch.setattr(holdout, name, lose)
    with pytest.raises(DataLost):
        fit(config, tmp_path / "run", pictures)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["3"]
    assert [line["step"] for line in lines(tmp_path / "run")] == [3]


def test_a_run_of_no_samples_draws_none(tiny, pictures, tmp_path):
    none = {"steps": 2, "sample_every": 1, "num_samples": 0}
    config = on_one_device(tiny, train=none)
    for _ in range(2):  # To its end, and once more from there.
        fit(config, tmp_path / "run", pictures)
    assert not list((tmp_path / "run").rglob("*.png"))
    fit(with_(config, train={"num_samples": 1}), tmp_path / "run", pictures)
    assert made_since(tmp_path / "run/samples", "*.png") == ["00000002.png"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends(tiny, pictures, tmp_path, number, monkeypatch):
    config = on_one_device(tiny, train={"steps": 6, "eval_every": 0}, checkpoint={"every": 100})
    before = signal.getsignal(number)
    batch_at = Batches.batch_at

    def kill_at_2(self, step):
        if step == 2:
            signal.raise_signal(number)
        return batch_at(self, step)

    monkeypatch.setattr(Batches, "batch_at", kill_at_2)
    assert int(fit(config, tmp_path / "run", pictures).step) == 3
    assert signal.getsignal(number) == before
    monkeypatch.setattr(Batches, "batch_at", batch_at)
    resumed = fit(config, tmp_path / "run", pictures)
    assert_equal_trees(resumed, fit(config, tmp_path / "whole", pictures))
    assert [line["steps"] for line in lines(tmp_path / "run")] == [2, 1, 1, 2]


def test_a_signal_ends_the_drawing_of_samples(tiny, pictures, tmp_path, monkeypatch):
    config = on_one_device(tiny, train={"steps": 2, "eval_every": 0})

    def cuts(steps):
        yield 0, 3
        signal.raise_signal(signal.SIGTERM)
        yield 3, 4
        pytest.fail("the chain runs on")

    with monkeypatch.context() as patch:
        patch.setattr(segments, "segments", cuts)
        assert int(fit(config, tmp_path / "run", pictures).step) == 2
    assert not (tmp_path / "run/samples.png").exists()
    fit(config, tmp_path / "run", pictures)
    assert (tmp_path / "run/samples.png").exists()


def test_samples_that_are_not_finite_do_not_end_a_run(
    tiny, pictures, tmp_path, monkeypatch, caplog
):
    config = on_one_device(tiny, train={"steps": 2, "eval_every": 0})

    def lost(*_, **__):
        raise NonFiniteSamples("samples: 1 of 4 images are not finite")

    monkeypatch.setattr(DDPM, "sample", lost)
    assert int(fit(config, tmp_path / "run", pictures).step) == 2
    assert "samples of step 2: none; samples: 1 of 4 images are not finite" in caplog.text


def test_fit_works_outside_the_main_thread(tiny, pictures, tmp_path):
    thread = threading.Thread(
        target=fit, args=(on_one_device(tiny, train={"steps": 2}), tmp_path / "run", pictures)
    )
    thread.start()
    thread.join()
    assert (tmp_path / "run/samples.png").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(
    tiny, pictures, tmp_path, monkeypatch
):
    config = on_one_device(tiny, train={"steps": 8, "log_every": 5, "eval_every": 0})
    step = update._step

    def break_update_4(ddpm, state, *images, **options):
        broken = int(state.step) == 3
        state, metrics = step(ddpm, state, *images, **options)
        return state, {**metrics, "grad_norm": np.float32(np.nan)} if broken else metrics

    monkeypatch.setattr(update, "_step", break_update_4)
    with pytest.raises(
        NonFiniteLoss, match="grad_norm is nan at step 4; the last good checkpoint is 2"
    ):
        fit(config, tmp_path / "run", pictures)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["2"]


def test_checkpoints_of_a_remote_run_stay_remote():
    assert str(restore.folder_of("gs://bucket/run")) == "gs://bucket/run/checkpoints"


def test_resuming_refuses_what_would_change_what_is_learned(tiny, pictures, tmp_path):
    config = on_one_device(tiny, train={"steps": 2})
    fit(config, tmp_path / "run", pictures)
    saved = (tmp_path / "run/config.json").read_text()
    other = with_(config, seed=1, optim={"learning_rate": 5e-4}, model={"dropout": 0.0})
    with pytest.raises(UserError) as error:
        fit(other, tmp_path / "run", pictures)
    for field in (
        "seed was 0 and is 1",
        "optim.learning_rate was 0.001 and is 0.0005",
        "model.dropout was 0.2",
    ):
        assert field in str(error.value)
    with pytest.raises(UserError, match="the data's fingerprint has changed"):
        fit(config, tmp_path / "run", pictures[::-1].copy())
    assert (tmp_path / "run/config.json").read_text() == saved
    (tmp_path / "run/config.json").rename(tmp_path / "config.json")
    with pytest.raises(UserError, match="is not empty and not a run directory"):
        fit(config, tmp_path / "run", pictures)
    (tmp_path / "config.json").rename(tmp_path / "run/config.json")
    fit(
        with_(
            config,
            train={
                "steps": 2,
                "log_every": 1,
                "eval_every": 1,
                "sample_every": 1,
                "num_samples": 1,
            },
            checkpoint={"every": 1, "keep": 1},
            data={"workers": 1, "cache_mb": 1},
        ),
        tmp_path / "run",
        pictures,
    )


def test_nothing_is_written_where_nothing_can_be_trained(tiny, pictures, tmp_path):
    with pytest.raises(UserError, match=r"images must be uint8 .*"):
        fit(tiny, tmp_path / "run", pictures / 255)
    with pytest.raises(
        UserError, match="batch_size: 6 is not divisible by the 4 devices; choose a multiple"
    ):
        fit(with_(tiny, train={"batch_size": 6}), tmp_path / "run", pictures)
    with pytest.raises(UserError, match="devices: 9 requested, but this machine has 4"):
        fit(with_(tiny, parallel={"devices": 9}), tmp_path / "run", pictures)
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not empty and not a run directory"):
        fit(tiny, tmp_path / "mine", pictures)


def test_a_finished_run_is_left_alone_but_for_pictures_it_lacks(
    tiny, pictures, tmp_path, monkeypatch
):
    config = on_one_device(tiny, train={"steps": 2})
    fit(config, tmp_path / "run", pictures)
    picture = tmp_path / "run/samples/00000002.png"
    drawn = picture.read_bytes()
    picture.unlink()
    monkeypatch.setattr(update, "_step", lambda *_, **__: pytest.fail("an update is made"))
    assert int(fit(config, tmp_path / "run", pictures).step) == 2
    assert picture.read_bytes() == drawn
    assert [line["step"] for line in lines(tmp_path / "run")] == [2]
