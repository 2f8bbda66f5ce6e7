"""What a student reads first must run, be short, and import nothing of ours."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

MINIMAL = Path(__file__).parent.parent / "examples/minimal.py"


@pytest.mark.slow
def test_the_minimal_example_learns_and_draws(tmp_path):
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, MINIMAL, "101"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert (
        0.8 < losses[0] < 1.2 and losses[1] < 0.5 * losses[0]
    )  # an untrained network predicts no noise
    header, pixels = (tmp_path / "minimal.pgm").read_bytes().split(b"\n", 1)
    assert header == b"P5 240 240 255" and len(pixels) == 240 * 240
    assert np.frombuffer(pixels, np.uint8).std() > 30


def test_the_minimal_example_is_short_and_stands_alone():
    source = MINIMAL.read_text()
    assert source.count("\n") <= 100
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported == {"sys", "pathlib", "jax", "flax", "optax"}
