"""Evaluation while training, bands of the held-out loss, the best checkpoint, the dry run."""

import functools
import json
import logging
import shutil
import signal

import jax
import numpy as np
import pytest
from conftest import files_of, lines, messages, on_one_device, refused, with_
from scipy.linalg import sqrtm

from ddpm_jax import DDPM, UserError, fit, load, to_uint8
from ddpm_jax.cli import main
from ddpm_jax.config import Checkpoint
from ddpm_jax.data import from_array, split
from ddpm_jax.devices import segments
from ddpm_jax.devices.mesh import make_mesh
from ddpm_jax.evaluation import features
from ddpm_jax.keys import HOLDOUT, NOISE, TIME, WATCHED_BOUND, WATCHED_SAMPLES
from ddpm_jax.models import classifier_features
from ddpm_jax.storage.best import best_of, best_step
from ddpm_jax.training import holdout
from ddpm_jax.training.dry_run import dry_run, table
from ddpm_jax.training.holdout import Compared, Overfitting

SHAPE = (8, 8, 1)
LABELS = np.arange(48) % 2
VALUES = ("proxy_fid", "proxy_kid", "bits_per_dim")


@pytest.fixture(scope="module")
def config(tiny):
    """Evaluates after step 2 and 3, and compares held-out images after each step."""
    return on_one_device(
        tiny,
        train={"steps": 3, "log_every": 1, "eval_every": 1, "evaluate_every": 2},
        checkpoint={"every": 100, "keep": 1, "best": "proxy_fid"},
    )


@pytest.fixture(scope="module")
def small(config):
    return with_(config, train={"evaluate_images": 20})


@pytest.fixture(scope="module")
def longer(small):
    """Two steps more, without evaluations."""
    return with_(
        small, train={"steps": 5, "evaluate_every": 0}, checkpoint={"best": "holdout_loss"}
    )


@pytest.fixture(scope="module")
def watched(small, pictures, tmp_path_factory):
    """A run of three steps; to be read alone."""
    run = tmp_path_factory.mktemp("watched") / "run"
    with pytest.MonkeyPatch.context() as patch:  # A proxy of two steps, which is kept.
        quick = functools.partial(features.train_classifier, steps=2)
        patch.setattr(features, "train_classifier", quick)
        fit(small, run, pictures, LABELS)
    before = files_of(run)
    yield run
    assert files_of(run) == before


@pytest.fixture
def again(watched, tmp_path):
    """A copy of it to write into."""
    return shutil.copytree(watched, tmp_path / "again")


def steps_in(run):
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir())


def evaluations(run):
    """{step: its values} of the lines that evaluations have written."""
    return {line["step"]: line for line in lines(run) if "proxy_fid" in line}


def rewrite(run, change):
    """Puts `change(line)` in the place of each line of the log; None takes it away."""
    changed = [change(line) for line in lines(run)]
    text = "".join(json.dumps(line) + "\n" for line in changed if line is not None)
    (run / "metrics.jsonl").write_text(text)


def test_evaluations_are_lines_of_their_own_and_scalars(watched):
    found = evaluations(watched)
    assert list(found) == [2, 3]
    for line in found.values():
        assert set(line) == {"step", *VALUES} and all(np.isfinite(line[name]) for name in VALUES)
    assert [line["step"] for line in lines(watched) if "loss" in line] == [1, 2, 3]
    events = b"".join(path.read_bytes() for path in (watched / "tensorboard").iterdir())
    for name in (*VALUES, "holdout_gap", "holdout_bands/", "gap_bands/"):
        assert name.encode() in events, name


def test_an_evaluation_is_what_its_names_say(watched, small, pictures):
    """Samples, features, FID, KID's exact mean and the bound, put together by hand."""
    ddpm, params = load(watched, step=3)
    source = from_array(pictures, SHAPE, LABELS)
    train, held_out = split(source, small.data.holdout)
    rng = jax.random.fold_in(jax.random.key(0), WATCHED_SAMPLES)
    drawn = to_uint8(ddpm.sample(params, rng, 20, sampler="ddim", steps=10))
    root = features.cache_root(source, None)
    extractor = features.proxy(source, train, root, make_mesh(1))
    x, y = (
        np.float64(classifier_features(extractor.params, images)[0])
        for images in (drawn, pictures[train])
    )
    root_of = sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    fid = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root_of)
    value = evaluations(watched)[3]
    np.testing.assert_allclose(value["proxy_fid"], fid, rtol=1e-3)

    rng = jax.random.fold_in(jax.random.key(0), WATCHED_BOUND)
    x_0 = np.float32(pictures[held_out]) / np.float32(127.5) - 1
    bits = ddpm.bits_per_dim(params, rng, x_0)
    np.testing.assert_allclose(value["bits_per_dim"], bits.total.mean(), rtol=1e-6)


def test_a_signal_ends_an_evaluation(again, small, pictures, monkeypatch):
    """The next start makes up for it, as after a kill between the checkpoint and the line."""
    before = lines(again)
    rewrite(again, lambda line: None if line["step"] == 3 and "proxy_fid" in line else line)

    def cuts(steps):
        yield 0, 3
        signal.raise_signal(signal.SIGTERM)
        yield 3, 4
        pytest.fail("the chain runs on")

    with monkeypatch.context() as patch:
        patch.setattr(segments, "segments", cuts)
        assert int(fit(small, again, pictures, LABELS).step) == 3
    assert list(evaluations(again)) == [2]
    fit(small, again, pictures, LABELS)
    assert lines(again) == before


def test_the_best_checkpoint_stays_beside_the_newest(watched):
    values = {step: line["proxy_fid"] for step, line in evaluations(watched).items()}
    best = min(values, key=values.get)
    assert steps_in(watched) == sorted({best, 3})
    assert best_step(watched) == best
    _, params = load(watched, step="best")
    _, expected = load(watched, step=best)
    assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(expected)))


def test_a_resumed_run_keeps_the_best_of_before_and_compares_with_it(
    again, longer, pictures, caplog
):
    """By another metric than before, which the log has, too."""
    rewrite(again, lambda line: {**line, "holdout_loss": 0.0} if line["step"] == 3 else line)
    with caplog.at_level(logging.INFO):
        fit(longer, again, pictures, LABELS)
    assert steps_in(again) == [3, 5] and best_step(again) == 3
    assert "best holdout_loss so far: 0 at step 3 (--step best)" in messages(caplog)
    # Where the checkpoint is gone, the next best of those there are counts.
    shutil.rmtree(again / "checkpoints/3")
    assert best_step(again) == 5


def test_a_kill_before_a_new_best_is_complete_loses_nothing(again):
    """Its line stands in the log, and its checkpoint is not there: the best is the one before."""
    before = best_of(again, "proxy_fid")
    with (again / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "proxy_fid": 0.0}\n{"step": 3, "proxy_fid": -')
    assert best_of(again, "proxy_fid") == before
    (again / "checkpoints/4.orbax-checkpoint-tmp").mkdir()
    assert best_of(again, "proxy_fid") == before


@pytest.mark.parametrize("line", ["17", "[]", '{"step": true, "proxy_fid": 0.0}', "{", "\xff"])
@pytest.mark.parametrize("value", ["NaN", "-1e999", "null", '"0"', "[0.0]", "true"])
def test_damaged_lines_are_no_best(again, line, value):
    before = best_of(again, "proxy_fid")
    with (again / "metrics.jsonl").open("a", encoding="latin-1") as file:
        file.write(f'{line}\n{{"step": 3, "proxy_fid": {value}}}\n')
    assert best_of(again, "proxy_fid") == before


def test_best_of_a_run_without_one_says_what_to_do(run, again, capsys):
    with pytest.raises(UserError, match=r"keeps no best checkpoint; train it .*--checkpoint\.best"):
        load(run, step="best")
    assert "keeps no best checkpoint" in refused(capsys, "sample", run, "--step", "best")
    rewrite(again, lambda line: None if "proxy_fid" in line else line)
    with pytest.raises(UserError, match="no checkpoint yet at which proxy_fid"):
        load(again, step="best")
    error = refused(capsys, "sample", run, "--step", "bets")
    assert "--step: must be" in error and "best" in error and "'bets'" in error


def test_commands_and_exports_take_the_best(watched, tmp_path, capsys):
    best = best_step(watched)
    out = tmp_path / "model.safetensors"
    assert main(["export", str(watched), "--step", "best", "--out", str(out)]) == 0
    _, params = load(out, step=best)
    _, expected = load(watched, step=best)
    assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(expected)))
    with pytest.raises(UserError, match=f"holds only the weights of step {best}; leave --step out"):
        load(out, step="best")


REFUSED = [
    (dict(checkpoint={"best": "fid"}), LABELS, "checkpoint.best: fid is not measured in this run"),
    (
        dict(checkpoint={"best": "holdout_loss"}, train={"eval_every": 0}),
        LABELS,
        r"it needs train\.eval_every and data\.holdout above 0 "
        r"\(measured is bits_per_dim proxy_fid proxy_kid\)",
    ),
    (
        dict(checkpoint={"best": "bits_per_dim"}, data={"holdout": 0.0}),
        LABELS,
        "bits_per_dim is not measured in this run; it needs train.evaluate_every",
    ),
    (
        dict(checkpoint={"best": "proxy_kid"}, train={"evaluate_every": 0, "eval_every": 0}),
        LABELS,
        r"\(measured is nothing\)",
    ),
    ({}, None, r"train\.evaluate_every: .*no labels .*--train\.inception PATH, or leave it at 0"),
    ({}, np.zeros(48, int), "at least two classes"),
    (dict(data={"holdout": 0.7}), LABELS, "at least 20 training images"),
    (dict(train={"inception": "/nowhere.npz"}), LABELS, "/nowhere.npz"),
]


@pytest.mark.parametrize(("change", "labels", "message"), REFUSED)
def test_what_cannot_be_watched_is_one_line_before_training(
    config, pictures, tmp_path, change, labels, message
):
    wanted = with_(with_(config, checkpoint={"best": None}), **change)
    for start in (fit, dry_run):
        with pytest.raises(UserError, match=message) as error:
            start(wanted, tmp_path / "run", pictures, labels)
        assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_inception_is_refused_for_what_it_was_not_made_for(config, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (48, 8, 8, 5), np.uint8)
    wanted = with_(config, data={"image_shape": (8, 8, 5)}, train={"inception": "x.npz"})
    with pytest.raises(UserError, match=r"train\.inception: .* 5 channels .*; leave it out"):
        fit(wanted, tmp_path / "run", images, LABELS)


def test_the_names_of_metrics_are_checked():
    with pytest.raises(UserError, match=r"checkpoint\.best: must be one of holdout_loss, .*'loss'"):
        Checkpoint(best="loss")


@pytest.fixture(scope="module")
def model(tiny):
    """A model of batches of four, its parameters, and the loss of one example by its key and t."""
    ddpm = DDPM(with_(tiny, train={"batch_size": 4}))
    params = ddpm.init(jax.random.key(3))
    return ddpm, params


def test_bands_are_the_means_of_the_losses_at_their_steps(model, pictures):
    """Each example by hand: its key, t, noise, x_t of Eq. 4 and error of Eq. 14."""
    ddpm, params = model
    source = from_array(pictures, SHAPE)
    held_out, train = np.arange(0, 44, 2), np.arange(1, 48, 2)
    values = holdout.compare(ddpm, params, source, held_out, train).values

    others = train[np.linspace(0, len(train) - 1, len(held_out)).astype(int)]
    run = jax.random.fold_in(jax.random.key(0), HOLDOUT)
    keys = [
        jax.random.fold_in(jax.random.fold_in(run, i - i % 4), i % 4) for i in range(len(held_out))
    ]
    t = np.array([jax.random.randint(jax.random.fold_in(key, TIME), (), 0, 10) for key in keys])
    noise = np.stack([jax.random.normal(jax.random.fold_in(key, NOISE), SHAPE) for key in keys])
    bar = np.cumprod(1 - np.linspace(0.01, 0.5, 10))[t][:, None, None, None]

    def losses(indices):
        x_0 = np.float32(pictures[indices]) / 127.5 - 1
        x_t = np.float32(np.sqrt(bar) * x_0 + np.sqrt(1 - bar) * noise)
        eps = np.asarray(ddpm.denoise(params, x_t, np.int32(t)))
        return ((eps - noise) ** 2).mean(axis=(1, 2, 3))

    of_held_out, gaps = losses(held_out), losses(held_out) - losses(others)
    np.testing.assert_allclose(values["holdout_loss"], of_held_out.mean(), rtol=1e-5)
    np.testing.assert_allclose(values["holdout_gap"], gaps.mean(), atol=1e-5)
    for band in range(10):  # T is 10: a band is one step.
        for name, each in (("holdout_bands", of_held_out), ("gap_bands", gaps)):
            if not (t == band).any():
                assert values[name][band] is None
                continue
            expected = each[t == band].mean()
            np.testing.assert_allclose(values[name][band], expected, rtol=1e-4, atol=1e-5)
    assert None in values["holdout_bands"] or len(set(t)) == 10


def test_the_gap_of_images_to_themselves_is_nothing(model, pictures):
    ddpm, params = model
    source = from_array(pictures, SHAPE)
    some = np.arange(6)
    compared = holdout.compare(ddpm, params, source, some, some)
    assert compared.values["holdout_gap"] == 0 and compared.gap_error == 0
    assert {gap for gap in compared.values["gap_bands"] if gap is not None} == {0.0}
    assert compared.loss == holdout.holdout_loss(ddpm, params, source, some)


@pytest.mark.parametrize("T", [1, 7, 10, 1000])
def test_bands_are_of_equal_width_and_cover_all_steps(T):
    t = np.arange(T)
    losses = t.astype(np.float32)
    bands = Compared([losses], losses, t, T).values["holdout_bands"]
    for band, mean in enumerate(bands):
        inside = t[(t >= band * T / 10) & (t < (band + 1) * T / 10)]
        assert mean is None if not len(inside) else mean == inside.mean()


def compared(loss, gap, n=100, spread=0.01):
    """Held-out images of this mean loss, and training images lower by `gap` on average."""
    noise = spread * np.where(np.arange(n) % 2, 1, -1)
    return Compared([np.full(n, loss)], loss - gap + noise, np.zeros(n, int), 10)


@pytest.mark.parametrize(
    ("losses", "gap", "steps"),
    [
        ([3.0, 2.0, 2.1, 2.2, 2.3], 0.5, [4]),  # Once, as soon as two are above the best.
        ([3.0, 2.0, 2.1, 2.05, 2.2], 0.5, [5]),  # Not where it falls.
        ([3.0, 2.0, 2.1, 2.2, 2.3], 0.0025, []),  # The gap is 2.5 standard errors.
        ([3.0, 2.0, 2.1, 2.2, 2.3], -0.5, []),
        ([3.0, 2.0, 2.001, 2.002, 2.003], 0.5, []),  # A plateau.
        ([3.0, 2.5, 2.0, 1.5, 1.0], 0.5, []),
        ([3.0, 2.0, 2.5], 0.5, []),
    ],
)
def test_overfitting_is_said_once(losses, gap, steps, caplog):
    watching = Overfitting({})
    said = []
    for step, loss in enumerate(losses, 1):
        caplog.clear()
        watching.add(step, compared(loss, gap))
        said += [step] * len(messages(caplog))
    assert said == steps


def test_a_resumed_run_knows_the_losses_of_before(caplog):
    watching = Overfitting({10: 2.0, 5: 3.0, 15: 2.1})
    watching.add(20, compared(2.2, 0.5))
    (line,) = messages(caplog)
    assert line.startswith("step 20: the model overfits: the held-out loss is 2.2, up from 2 at")


def test_a_dry_run_measures_and_writes_nothing(small, pictures, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    result = dry_run(small, home / "run", pictures, LABELS)
    assert not list(home.iterdir())
    size = sum(leaf.size for leaf in jax.tree.leaves(DDPM(small).shapes))
    assert (result.parameters, result.step, result.steps) == (size, 0, 3)
    assert result.memory > 2**26 and result.first_s > 0 and result.update_s > 0
    assert result.seconds_left == 3 * result.update_s
    text = table(result)
    assert f"{size:,}" in text and "would make 3 updates" in text and "compiling" in text


def test_a_dry_run_trains_as_the_run_does(watched, small, longer, pictures):
    """From an existing run, which stays as it is; and its loss is that of the fresh run."""
    before = {path: path.stat().st_mtime_ns for path in watched.rglob("*")}
    result = dry_run(longer, watched, pictures, LABELS)
    assert result.step == 3 and result.seconds_left == 2 * result.update_s
    assert "would resume from step 3 of 5\n" in table(result)
    assert {path: path.stat().st_mtime_ns for path in watched.rglob("*")} == before
    done = result._replace(steps=3)
    assert done.seconds_left == 0 and "is complete at step 3; raise train.steps" in table(done)
    fresh = dry_run(small, watched.parent / "none", pictures, LABELS)
    assert fresh.loss == [line["loss"] for line in lines(watched) if "loss" in line][2]


def test_a_dry_run_refuses_what_the_run_would(watched, small, pictures, tmp_path):
    for change, message in [
        (dict(seed=1), "this run cannot resume: seed was 0 and is 1"),
        (dict(train={"steps": 1}), "is at step 3 already"),
        (dict(train={"batch_size": 7}, parallel={"devices": 2}), "is not divisible"),
    ]:
        with pytest.raises(UserError, match=message):
            dry_run(with_(small, **change), watched, pictures, LABELS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not empty and not a run directory"):
        dry_run(small, tmp_path / "mine", pictures, LABELS)


def test_a_damaged_checkpoint_stays_where_it_is_in_a_dry_run(again, small, pictures, caplog):
    rewrite(again, lambda line: line)
    newest = again / "checkpoints/3"
    for file in newest.rglob("d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    if steps_in(again) == [3]:
        with pytest.raises(UserError, match="no checkpoint can be used"):
            dry_run(small, again, pictures, LABELS)
    else:
        assert dry_run(small, again, pictures, LABELS).step == 2
        assert any("checkpoint 3 is damaged" in line for line in messages(caplog))
    assert newest.exists() and not list(again.rglob("*.damaged"))
