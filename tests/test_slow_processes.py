"""Several real processes on this machine (CPU, gloo): scripts/test_slow.sh runs them."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sys

import jax
import numpy as np
import pytest
from conftest import QUICK, compiled_once, finish, lines, read_until, started
from PIL import Image

from ddpm_jax import load

pytestmark = pytest.mark.slow

# One command after another, in the same processes: they start once, and jax traces once.
COMMANDS = """
import json, sys
from ddpm_jax.cli import main
for args in json.loads(sys.argv[1]):
    if code := main(args):
        sys.exit(code)
"""
CONFIG = """
from ddpm_jax.config import *
CONFIG = Config(
    # Wide enough for kernels that fsdp divides.
    model=Model(base_channels=96, channel_multipliers=(1,), num_res_blocks=1,
                attention_resolutions=(), dropout=0.2, norm_groups=2),
    diffusion=Diffusion(num_timesteps=10, beta_start=0.01, beta_end=0.5),
    data=Data(source="npz:pictures.npz", image_shape=(8, 8, 1), holdout=0.2),
    optim=Optim(learning_rate=1e-3, warmup_steps=2, ema_decay=0.5),
    train=Train(steps=4, batch_size=8, log_every=1, eval_every=4, sample_every=0, num_samples=4),
    checkpoint=Checkpoint(every=2),
)
"""


@pytest.fixture(scope="module")
def folder(pictures, tmp_path_factory):
    """A folder with tiny.py, its pictures, and runs/one of one process with four devices."""
    folder = tmp_path_factory.mktemp("hosts")
    np.savez(folder / "pictures.npz", images=pictures)
    (folder / "tiny.py").write_text(CONFIG)
    [(code, said)] = results_of(folder, 1, 4, *train("one"))
    assert code == 0, said
    return folder


def train(name, *options):
    return "train", "tiny.py", "--workdir", f"runs/{name}", *options


@contextlib.contextmanager
def running(folder, processes, devices, *args, then=()):
    """The processes of one command, each with so many devices; they end with the block.

    They run the command `then`, too, if one is given.
    """
    flags = f"--xla_force_host_platform_device_count={devices} {QUICK}"
    environment = {**os.environ, "XLA_FLAGS": flags, **compiled_once(folder / f"xla-{processes}")}
    with contextlib.ExitStack() as stack:
        several = []
        if processes > 1:
            port = stack.enter_context(reserved_port())
            several = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", processes]
        programs = []
        for i in range(processes):
            # The second command finds the processes connected.
            first = [*args, *several, *(["--process-id", i] if several else [])]
            commands = [[str(word) for word in words] for words in (first, then) if words]
            program = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
            programs.append(stack.enter_context(started(program, cwd=folder, env=environment)))
        yield programs


@contextlib.contextmanager
def reserved_port():
    """A port that no other program gets: this socket holds it.

    The coordinator can listen on it all the same, since it reuses ports.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def results_of(folder, processes, devices, *args, then=()):
    """[(exit code, what it said)] of each process of a command, and of the one after it."""
    with running(folder, processes, devices, *args, then=then) as programs:
        return [finish(program) for program in programs]


def assert_same_run(run, other):
    """The same losses, gradient norms and held-out loss at the end, and the same weights."""
    for line, of_other in zip(lines(run), lines(other), strict=True):
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(line[name], of_other[name], rtol=1e-5)
    np.testing.assert_allclose(
        lines(run)[-1]["holdout_loss"], lines(other)[-1]["holdout_loss"], rtol=1e-5
    )
    for weights in ("ema", "raw"):
        (_, params), (_, of_other) = load(run, weights=weights), load(other, weights=weights)
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(of_other), strict=True):
            # Adam divides by the gradient's size: where that is near 0, rounding decides the sign.
            assert np.mean(np.abs(np.asarray(a) - np.asarray(b)) > 1e-5) < 0.01


@pytest.mark.parametrize(
    ("name", "options"),
    {"jit": [], "pmap": ["--parallel.mode", "pmap"], "fsdp": ["--parallel.fsdp", 2]}.items(),
)
def test_two_processes_with_two_devices_are_one_with_four(folder, name, options):
    results = results_of(folder, 2, 2, *train(name, "--train.steps", 2, *options))
    assert [code for code, _ in results] == [0, 0], results
    assert "step 0 of 2" in results[0][1] and "step" not in results[1][1], "process 0 alone talks"
    # The checkpoint of two processes is gone on with by one, and by two again.
    processes = 1 if name == "jit" else 2
    results = results_of(folder, processes, 4 // processes, *train(name, *options))
    assert {code for code, _ in results} == {0}, results
    assert_same_run(folder / f"runs/{name}", folder / "runs/one")
    assert (folder / f"runs/{name}/samples.png").exists()


def test_eight_devices_are_four(folder):
    [(code, said)] = results_of(folder, 1, 8, *train("eight"))
    assert code == 0, said
    assert_same_run(folder / "runs/eight", folder / "runs/one")


def test_two_processes_pass_over_a_damaged_checkpoint(folder):
    """Both must come to the same verdict, and one alone may rename."""
    shutil.copytree(folder / "runs/one", folder / "runs/damaged")
    for part in (folder / "runs/damaged/checkpoints/4/params").rglob("d/*"):
        os.truncate(part, part.stat().st_size // 2)
    results = results_of(folder, 2, 2, *train("damaged"))
    assert [code for code, _ in results] == [0, 0], results
    assert "checkpoint 4 is damaged" in results[0][1] and "step 2 of 4" in results[0][1]
    assert {path.name for path in (folder / "runs/damaged/checkpoints").iterdir()} == {
        "2",
        "4",
        "4.damaged",
    }
    assert_same_run(folder / "runs/damaged", folder / "runs/one")


def test_samples_and_likelihood_of_two_processes_are_those_of_one(folder):
    for processes in (1, 2):
        sample = ["sample", "runs/one", "-n", 5, "--out", f"x{processes}/"]
        measure = ["likelihood", "runs/one", "--draws", 2, "--out", f"bits{processes}"]
        results = results_of(folder, processes, 2, *sample, then=measure)
        assert {code for code, _ in results} == {0}, results
    bits = [
        json.loads((folder / f"bits{processes}/likelihood.json").read_text())
        for processes in (1, 2)
    ]
    np.testing.assert_allclose(bits[0]["total"], bits[1]["total"], rtol=1e-5)
    for i in range(5):
        one, two = (
            np.asarray(Image.open(folder / f"x{n}/{i:06d}.png")).astype(int) for n in (1, 2)
        )
        assert np.abs(one - two).max() <= 1


def test_sigterm_for_one_of_them_stops_all_after_the_same_step(folder):
    command = train(
        "stopped", "--train.steps", 100_000, "--checkpoint.every", 100_000, "--train.eval-every", 0
    )
    with running(folder, 2, 2, *command) as programs:
        read_until(programs[0], "step 1/100000")
        programs[1].send_signal(signal.SIGTERM)
        results = [finish(program) for program in programs]
    assert [code for code, _ in results] == [0, 0], results
    assert "SIGTERM: saved after step" in results[0][1]
    [saved] = [int(path.name) for path in (folder / "runs/stopped/checkpoints").iterdir()]
    assert [line["step"] for line in lines(folder / "runs/stopped")] == list(range(1, saved + 1))


@pytest.mark.parametrize(
    ("number", "sent", "words"),
    [
        # Which the other hears of first is chance: jax's runtime, or gloo's own connection.
        (0, signal.SIGKILL, "another task died|Gloo .* failed"),
        (1, signal.SIGKILL, "another task died|Gloo .* failed"),
        (1, signal.SIGSTOP, r"unhealthy \(stopped sending heartbeats\):\n1\n"),
    ],
)
def test_when_one_dies_or_freezes_the_other_ends(folder, number, sent, words):
    name = f"{sent.name}-{number}"
    command = train(name, "--train.steps", 100_000, "--train.eval-every", 0)
    with running(folder, 2, 2, *command) as programs:
        read_until(programs[0], "step 1/100000")
        programs[number].send_signal(sent)
        code, said = finish(programs[1 - number])
    assert code != 0 and re.search(words, said), said


def test_two_processes_evaluate_as_one_does_and_start_from_a_run(folder, pictures):
    np.savez(folder / "labelled.npz", images=pictures, labels=np.arange(48) % 2)
    command = [
        "evaluate",
        "runs/one",
        "--data",
        "npz:labelled.npz",
        "-n",
        24,
        "--no-likelihood",
        "--out",
    ]
    start = train("tuned", "--init-from", "runs/one", "--train.steps", 1)
    values = []
    for processes in (1, 2):
        evaluate = (*command, f"evaluated-{processes}")
        then = start if processes == 2 else ()
        results = results_of(folder, processes, 4 // processes, *evaluate, then=then)
        assert [code for code, _ in results] == [0] * processes, results
        (result,) = (folder / f"evaluated-{processes}").glob("proxy-24-*.json")
        values.append(json.loads(result.read_text())["values"])
    assert values[0].keys() == values[1].keys() and "proxy_fid_train" in values[0]
    for name in values[0]:
        np.testing.assert_allclose(
            values[1][name]["value"], values[0][name]["value"], rtol=1e-3, atol=1e-5
        )
    # The first update has a learning rate of 0.
    for a, b in zip(
        jax.tree.leaves(load(folder / "runs/tuned")[1]),
        jax.tree.leaves(load(folder / "runs/one")[1]),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_two_processes_calibrate_and_tune_as_one_does(folder):
    """Both must search the same way, and the first alone writes."""
    kept = []
    for processes in (1, 2):
        run = folder / f"runs/measured-{processes}"
        shutil.copytree(folder / "runs/one", run)
        calibrate = ["calibrate", run, "--images", 8]
        tune = ["tune", run, "--steps", 3, "--images", 8]
        results = results_of(folder, processes, 4 // processes, *calibrate, then=tune)
        assert [code for code, _ in results] == [0] * processes, results
        assert "the tuned steps: " in results[0][1]
        assert processes == 1 or "the tuned steps: " not in results[1][1]
        ddpm, _ = load(run)
        assert len(ddpm.tuned.grids) == len(ddpm.tuned.choices) == 1
        about = json.loads((run / "tuned.json").read_text())["about"]
        kept.append((ddpm.calibration.mse, about["choice 3"]["tuned"]["rmse"]))
    np.testing.assert_allclose(kept[0][0], kept[1][0], rtol=1e-4)
    np.testing.assert_allclose(kept[0][1], kept[1][1], rtol=1e-2)
