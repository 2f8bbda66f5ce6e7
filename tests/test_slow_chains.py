"""Ctrl-C within a chain that would take hours."""

import os
import signal
import sys

import pytest
from conftest import finish, read_until, started, with_, with_source

from ddpm_jax import fit
from ddpm_jax.training import train

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("command", ["sample", "likelihood"])
def test_ctrl_c_ends_a_long_chain(tiny, pictures, tmp_path, command, monkeypatch):
    long = with_(tiny, diffusion={"num_timesteps": 200_000, "beta_start": 1e-6, "beta_end": 1e-3})
    quick = {"steps": 1, "eval_every": 0, "sample_every": 0}
    monkeypatch.setattr(train, "_draw", lambda *_: None)  # Its own samples would take as long.
    fit(with_source(long, pictures, tmp_path, train=quick), tmp_path / "run")
    options = {
        "sample": ["-n", "2048", "--batch-size", "2048", "--out", "x.npz"],
        "likelihood": ["--split", "train", "--batch-size", "2048"],
    }
    args = [sys.executable, "-m", "ddpm_jax", command, "run", *options[command]]
    environment = {**os.environ, "XLA_FLAGS": ""}
    with started(args, cwd=tmp_path, env=environment) as program:
        word = {"sample": "sampling: ", "likelihood": "likelihood: "}[command]
        read_until(program, word)
        program.send_signal(signal.SIGINT)
        code, said = finish(program)
    assert code == 130 and "ddpm-jax: interrupted" in said, said
    assert "Traceback" not in said, said
