"""Commands in processes of their own, in surroundings where something is wrong."""

import os
import subprocess
import sys

import pytest
from PIL import Image

pytestmark = pytest.mark.slow

TRAIN = """train digits --workdir run --model.base-channels 4 --model.norm-groups 2
--model.channel-multipliers 1 --model.num-res-blocks 1 --diffusion.num-timesteps 4
--train.steps 2 --train.eval-every 0 --train.num-samples 2"""
SAMPLE = "sample {run} -n 1 --out x.png"
COMMANDS = {
    "train": TRAIN,
    "plan": "plan digits",
    "sample": SAMPLE,
    "likelihood": "likelihood {run} --split holdout",
    "evaluate": "evaluate {run} -n 20",
    "figure": "figure progressive {run}",
    "export": "export {run}",
}
SETTINGS = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONUNBUFFERED": ""}


def shell(line, folder, **environment):
    """(exit code, stdout, stderr) of a line for bash in `folder`; $D is the command."""
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "D": f"{sys.executable} -m ddpm_jax",
            "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path]),
            **SETTINGS,
            **environment,
        },
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JAX_PLATFORMS", "cuda"),
        ("JAX_PLATFORMS", "gpu"),
        ("JAX_PLATFORMS", "nonsense"),
        ("JAX_PLATFORM_NAME", "gpu"),
        ("JAX_NUM_CPU_DEVICES", "0"),
        ("JAX_NUM_CPU_DEVICES", "many"),
        ("JAX_ENABLE_X64", "perhaps"),
        ("XLA_FLAGS", "--xla_no_such_flag=1"),
        ("XLA_FLAGS", "/nowhere/flags.txt"),
    ],
)
@pytest.mark.parametrize("command", ["sample", "train"])
def test_settings_that_cannot_be_used_are_one_line(run, tmp_path, command, name, value):
    line = "$D " + " ".join(COMMANDS[command].format(run=run).split())
    code, _, said = shell(line, tmp_path, **{name: value})
    assert code == 2 and said.count("\n") == 1, said
    assert said.startswith("ddpm-jax: ") and name in said and "unset" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("streams", [">&- 2>&- <&-", "2>&1 | true", "2>&-", ">/dev/full"])
def test_training_loses_nothing_without_its_streams(tmp_path, streams):
    code, _, said = shell(f"set -o pipefail; $D {' '.join(TRAIN.split())} {streams}", tmp_path)
    assert code == 0 and "Traceback" not in said
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"checkpoints", "metrics.jsonl", "samples.png", "config.json"} <= names
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("command", ["plan", "likelihood"])
def test_a_table_that_nothing_reads_is_no_error(run, tmp_path, command):
    options = COMMANDS[command].format(run=run) + (" --out out" if command == "likelihood" else "")
    code, _, said = shell(f"set -o pipefail; $D {options} | true", tmp_path)
    assert code == 141 and "Traceback" not in said and "Broken pipe" not in said


def test_a_streamed_fit_without_the_main_guard_names_it(run, tmp_path):
    for i in range(20):
        Image.new("L", (8, 8), i).save(tmp_path / f"{i}.png")
    script = f"""
import dataclasses
from ddpm_jax import fit
from ddpm_jax.storage.run import read_config

config = read_config({str(run)!r})
data = dataclasses.replace(config.data, source="folder:.", cache_mb=0, workers=2)
fit(dataclasses.replace(config, data=data), "run")
"""
    (tmp_path / "script.py").write_text(script)
    code, _, said = shell(f"{sys.executable} script.py", tmp_path)
    assert code == 1 and said.count("Traceback") == 1
    assert 'under if __name__ == "__main__":' in said.splitlines()[-1]
