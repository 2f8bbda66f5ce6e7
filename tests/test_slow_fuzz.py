"""Damaged files of every kind into every reader (see `fuzz.run`); run by scripts/test_slow.sh."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANG

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
REPEAT = "PYTHONPATH=.:tests python -m fuzz.run"


def run(folder, program, *options):
    """What a program of `fuzz` writes to stdout; its memory is limited, so it runs on its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "MALLOC_ARENA_MAX": "2",  # Else each thread takes 64 MiB of addresses, which are limited.
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", program, *options],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=HANG,
        )
    except subprocess.TimeoutExpired:
        pytest.fail(f"hangs in {_now(folder)}")
    assert done.returncode == 0, f"died in {_now(folder)}: {done.stderr[-3000:]}"
    return done.stdout


def _now(folder):
    """The case that was being read."""
    now = folder / "now"
    return now.read_text() if now.exists() else "none yet"


def test_a_damaged_file_ends_in_a_result_or_in_one_line(tmp_path):
    figures = json.loads(run(tmp_path, "fuzz.run", "--now", "now"))
    for each in figures["readers"]:
        outcomes = ", ".join(f"{count} {word}" for word, count in sorted(each["outcomes"].items()))
        print(f"{each['reader']:26}{each['cases']:6} cases {each['seconds']:6.1f} s  {outcomes}")
    total = sum(each["cases"] for each in figures["readers"])
    print(f"{total} cases of seed {figures['seed']}")
    faults = [
        f"{REPEAT} --seed {figures['seed']} --reader {each['reader']!r} --case {case}\n"
        f"  ({len(fault['cases'])} cases) {fault['fault']}\n{fault['first']}"
        for each in figures["readers"]
        for fault in each["faults"]
        for case in fault["cases"][:1]
    ]
    assert not faults, "\n".join(faults)
    assert total > 5000


def test_each_kind_of_fault_is_found(tmp_path):
    """Readers that do all that none may: else a test that is always green would go unnoticed."""
    figures = json.loads(run(tmp_path, "fuzz.faulty"))
    found = {each["reader"]: {fault["fault"] for fault in each["faults"]} for each in figures}
    assert found.pop("right") == set()
    assert len(found) > 8
    for name, faults in found.items():
        assert any(fault.startswith(name) for fault in faults), (name, faults)
