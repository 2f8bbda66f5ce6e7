"""Kills a run with -9 at random moments and compares its result with an uninterrupted run's.

crashtest.py [--kills 20] [--saving 8] [--steps 210] [--seed 0] [--folder DIR]

`saving` of the kills wait for a checkpoint that is being written. Prints one line per kill. Raises
AssertionError if the parameters, their average or a line of metrics.jsonl differ.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

# A few large arrays: quick to compile, and a checkpoint (9 MB) takes longer to write than a step.
NETWORK = "--model.base-channels 96 --model.channel-multipliers 1 --model.num-res-blocks 1"
NETWORK += " --model.dropout 0.1 --model.attention-resolutions --diffusion.num-timesteps 20"
NETWORK += " --data.image-shape 4 4 1"
LOOP = "--train.batch-size 4 --train.log-every 1 --train.eval-every 0 --train.sample-every 0"
LOOP += " --train.num-samples 1 --checkpoint.every 4 --checkpoint.keep 2"
CHILD = """
import json, sys
from ddpm_jax.cli import main
for args in json.loads(sys.argv[1]):
    if main(args):
        sys.exit(2)
"""


def crashtest(folder: Path, kills: int, saving: int, steps: int, seed: int) -> None:
    """Trains folder/whole in one go and folder/killed through `kills` kills.

    At least `saving` of the kills happen while a checkpoint is saved.
    """
    rng = random.Random(seed)
    np.savez(
        folder / "data.npz",
        images=np.random.default_rng(0).integers(0, 256, (50, 4, 4, 1), dtype=np.uint8),
    )
    run, started = folder / "killed", time.monotonic()
    plan = [number < saving for number in range(kills)]
    rng.shuffle(plan)
    hits = 0
    for number, in_a_save in enumerate(plan):
        # Never beyond this kill's share of the steps, so that there is something left to kill.
        target = rng.randint(steps * number // (kills + 1), steps * (number + 1) // (kills + 1))
        with (folder / "killed.log").open("a") as log:
            child = _start(folder, ["killed"], steps, log)
            while _last_step(run) < target or (in_a_save and not _unfinished(run)):
                assert child.poll() is None, (folder / "killed.log").read_text()[-2000:]
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.02 if in_a_save else 0.5))
            child.send_signal(signal.SIGKILL)
            child.wait()
        hits += bool(_unfinished(run))
        written = (
            f", while checkpoint {_unfinished(run)[0]} was being written"
            if _unfinished(run)
            else ""
        )
        print(
            f"{time.monotonic() - started:5.0f} s  kill {number + 1} "
            f"after step {_last_step(run)}{written}",
            flush=True,
        )
    with (folder / "killed.log").open("a") as log:
        # One process for both, since starting one takes longest.
        assert _start(folder, ["killed", "whole"], steps, log).wait() == 0, (
            folder / "killed.log"
        ).read_text()[-2000:]
    assert hits >= saving, f"only {hits} kills while a checkpoint was being written"
    _compare(run, folder / "whole", steps)
    print(
        f"{time.monotonic() - started:5.0f} s  {kills} kills, "
        f"{hits} of them while a checkpoint was being written:"
    )
    print(
        f"parameters and average are bit for bit those of an uninterrupted run, and so are {steps} "
        "lines of metrics"
    )


def _start(folder, runs, steps, log) -> subprocess.Popen:
    common = [
        "train",
        "digits",
        "--data.source",
        f"npz:{folder}/data.npz",
        *NETWORK.split(),
        *LOOP.split(),
    ]
    args = [[*common, "--train.steps", str(steps), "--workdir", str(folder / run)] for run in runs]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-c", CHILD, json.dumps(args)]
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def _last_step(run: Path) -> int:
    """The last step in metrics.jsonl, 0 before there is one."""
    file = run / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def _unfinished(run: Path) -> list[int]:
    """The steps whose checkpoints are half written."""
    folder = run / "checkpoints"
    return (
        [int(path.name.partition(".")[0]) for path in folder.glob("*.orbax-checkpoint-tmp*")]
        if folder.exists()
        else []
    )


def _compare(killed: Path, whole: Path, steps: int) -> None:
    import jax

    from ddpm_jax import load

    for weights in ("raw", "ema"):
        trees = [load(run, weights=weights, step=steps)[1] for run in (killed, whole)]
        for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
            assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes(), (
                weights
            )
    lines = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (killed, whole)
    ]
    assert [line["step"] for line in lines[0]] == list(range(1, steps + 1))
    for name in ("step", "loss", "grad_norm"):
        assert [line[name] for line in lines[0]] == [line[name] for line in lines[1]], name
    assert not _unfinished(killed)
    assert sorted(path.name for path in (killed / "checkpoints").iterdir()) == sorted(
        path.name for path in (whole / "checkpoints").iterdir()
    )


def main() -> None:
    """Parses the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in {"kills": 20, "saving": 8, "steps": 210, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path, help="an empty folder to keep the runs in")
    options = vars(parser.parse_args())
    folder = options.pop("folder")
    with tempfile.TemporaryDirectory() as temporary:
        crashtest((folder or Path(temporary)).resolve(), **options)


if __name__ == "__main__":
    main()
