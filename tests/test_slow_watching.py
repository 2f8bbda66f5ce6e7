"""Watching on several devices and processes, and the best checkpoint through kill -9."""

import json
import signal
import sys

import jax
import numpy as np
import pytest
from conftest import finish, lines, read_until, started, with_
from test_slow_processes import results_of

from ddpm_jax import fit, load
from ddpm_jax.storage.best import best_of, values_of

pytestmark = pytest.mark.slow

LABELS = np.arange(48) % 2
CONFIG = """
from ddpm_jax.config import *
CONFIG = Config(
    model=Model(base_channels=96, channel_multipliers=(1,), num_res_blocks=1,
                attention_resolutions=(), dropout=0.2, norm_groups=2),
    diffusion=Diffusion(num_timesteps=10, beta_start=0.01, beta_end=0.5),
    data=Data(source="npz:pictures.npz", image_shape=(8, 8, 1), holdout=0.2),
    optim=Optim(learning_rate=1e-3, warmup_steps=2, ema_decay=0.5),
    train=Train(steps=4, batch_size=8, log_every=1, eval_every=1, sample_every=0, num_samples=4,
                evaluate_every=2, evaluate_images=20),
    checkpoint=Checkpoint(every=100, keep=1, best="proxy_kid"),
)
"""


@pytest.fixture(scope="module")
def folder(pictures, tmp_path_factory):
    """A folder with tiny.py and its pictures."""
    folder = tmp_path_factory.mktemp("watching")
    np.savez(folder / "pictures.npz", images=pictures, labels=LABELS)
    (folder / "tiny.py").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def one(folder):
    """A run of one process with four devices."""
    [(code, said)] = results_of(folder, 1, 4, "train", "tiny.py", "--workdir", "runs/one")
    assert code == 0, said
    return folder / "runs/one"


def measured(run):
    """{step: [held-out loss, its gap, FID, KID and bits/dim]}."""
    names = ("holdout_loss", "holdout_gap", "proxy_fid", "proxy_kid", "bits_per_dim")
    of_step = {}
    for line in lines(run):
        of_step.setdefault(line["step"], {}).update(line)
    return {step: [line[name] for name in names if name in line] for step, line in of_step.items()}


def assert_same_measures(run, other):
    here, there = measured(run), measured(other)
    assert here.keys() == there.keys()
    for step, values in here.items():
        assert len(values) == (5 if step in (2, 4) else 2)
        np.testing.assert_allclose(values, there[step], rtol=2e-2, atol=2e-4)


def checkpoints(run):
    """The steps of those that are complete."""
    names = [path.name for path in (run / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdecimal())


@pytest.mark.parametrize(
    ("name", "options"),
    {"jit": [], "pmap": ["--parallel.mode", "pmap"], "fsdp": ["--parallel.fsdp", 2]}.items(),
)
def test_processes_and_devices_measure_alike(folder, one, name, options):
    """Two processes begin; with jit a kill of both is made up for: the last evaluation is missing.

    What is made up for does not depend on how the work is divided.
    """
    run = folder / "runs" / name
    command = ("train", "tiny.py", "--workdir", f"runs/{name}", *options)
    results = results_of(folder, 2, 2, *command)
    assert [code for code, _ in results] == [0, 0], results
    assert "evaluation of step 2" in results[0][1] and "evaluation" not in results[1][1]
    assert_same_measures(run, one)
    best = best_of(run, "proxy_kid")
    assert best == best_of(one, "proxy_kid")._replace(value=best.value)
    assert checkpoints(run) == sorted({best.step, 4}) == checkpoints(one)

    if name != "jit":
        return
    before = lines(run)
    kept = [line for line in before if line["step"] < 4 or "proxy_fid" not in line]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    results = results_of(folder, 2, 2, *command)
    assert [code for code, _ in results] == [0, 0], results
    assert lines(run) == before


def test_any_mesh_of_this_process_measures_alike(tiny, pictures, tmp_path):
    config = with_(
        tiny,
        train={"steps": 2, "eval_every": 1, "evaluate_every": 1, "evaluate_images": 20},
        parallel={"devices": 4},
    )
    runs = {
        "one": with_(config, parallel={"devices": 1}),
        "jit": config,
        "pmap": with_(config, parallel={"mode": "pmap"}),
        "fsdp": with_(config, parallel={"fsdp": 2}),
    }
    for name, wanted in runs.items():
        fit(wanted, tmp_path / name, pictures, LABELS)
    for name in runs:
        for step, values in measured(tmp_path / name).items():
            expected = measured(tmp_path / "one")[step]
            np.testing.assert_allclose(values, expected, rtol=2e-2, atol=2e-4)


def test_a_dry_run_of_two_processes_prints_once_and_writes_nothing(folder):
    before = sorted(folder.rglob("*"))
    command = ("train", "tiny.py", "--workdir", "runs/none", "--dry-run")
    results = results_of(folder, 2, 2, *command)
    assert [code for code, _ in results] == [0, 0], results
    assert "time left" in results[0][1] and "time left" not in results[1][1]
    after = [path for path in folder.rglob("*") if "xla-" not in str(path)]
    assert sorted(after) == [path for path in before if "xla-" not in str(path)]


def test_the_best_survives_kills(folder):
    """At any moment it is the lowest value of those that have a checkpoint, and loads."""
    command = [sys.executable, "-m", "ddpm_jax", "train", "tiny.py"]
    options = ["--train.steps", "18", "--checkpoint.best", "holdout_loss", "--checkpoint.every"]
    options += ["4", "--train.evaluate-every", "0", "--optim.learning-rate", "0.1"]
    run = folder / "runs/killed"
    for step in (3, 9, 14):
        with started([*command, *options, "--workdir", str(run)], cwd=folder) as program:
            read_until(program, f"step {step}/")
            program.send_signal(signal.SIGKILL)
            finish(program)
        best = best_of(run, "holdout_loss")
        if best is not None:
            assert best.step in checkpoints(run)
            load(run, step="best")
    for name in ("killed", "straight"):
        where = [*command, *options, "--workdir", f"runs/{name}"]
        with started(where, cwd=folder) as program:
            code, said = finish(program)
        assert code == 0, said
    straight = folder / "runs/straight"
    assert values_of(run, "holdout_loss") == values_of(straight, "holdout_loss")
    assert best_of(run, "holdout_loss") == best_of(straight, "holdout_loss")
    values = values_of(run, "holdout_loss")
    assert best_of(run, "holdout_loss").step == min(values, key=values.get)
    _, killed = load(run, step="best")
    _, whole = load(straight, step="best")
    assert all(map(np.array_equal, jax.tree.leaves(killed), jax.tree.leaves(whole)))
