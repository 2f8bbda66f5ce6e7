"""Kills a run with -9 at random moments and compares its result with an uninterrupted run's.

crashtest.py [--kills 20] [--saving 8] [--steps 210] [--seed 0] [--folder DIR]

`saving` of the kills wait for a checkpoint that is being written. Prints one line per kill. Raises
AssertionError if the parameters, their average or a line of metrics.jsonl differ. The run has
`steps` steps, or more if there are more after the last kill.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

ENDLESS = 1_000_000
"""Steps of a run that is killed: there is always one left."""

HANG = 1800
"""Seconds after which a child counts as hung and is killed."""

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
    """Trains folder/killed through `kills` kills, and folder/whole in one go.

    `saving` of the kills come while a checkpoint is being written.
    """
    rng = random.Random(seed)
    np.savez(
        folder / "data.npz",
        images=np.random.default_rng(0).integers(0, 256, (50, 4, 4, 1), dtype=np.uint8),
    )
    run = folder / "killed"
    plan = [number < saving for number in range(kills)]
    rng.shuffle(plan)
    for number, in_a_save in enumerate(plan, 1):
        more = rng.randint(int(in_a_save), 2 * steps // (kills + 1))
        with _Child(folder, ["killed"], ENDLESS) as child:
            while child.steps_made() < more:
                child.let_run(0.01)
            child.let_run(rng.uniform(0, 0.5))
            if in_a_save:
                child.stop_in_a_save(run, rng)
        step = _unfinished(run)
        assert step is not None or not in_a_save
        during = "" if step is None else f", while checkpoint {step} was being written"
        print(f"kill {number} after step {_last_step(run)}{during}", flush=True)
    steps = max(steps, _last_step(run) + 1)
    # One process for both, since starting one takes longest.
    with _Child(folder, ["killed", "whole"], steps) as child:
        assert child.process.wait() == 0, child.end_of_log()
    _compare(run, folder / "whole", steps)
    print(f"{kills} kills, at least {saving} of them while a checkpoint was being written:")
    print(f"parameters and average bit for bit, and {steps} lines of metrics, as without kills")


class _Child:
    """A process that trains folder/run for each of `runs`; killed at the block's end."""

    def __init__(self, folder: Path, runs: list[str], steps: int):
        common = [
            "train",
            "digits",
            "--data.source",
            f"npz:{folder}/data.npz",
            *NETWORK.split(),
            *LOOP.split(),
        ]
        args = [
            [*common, "--train.steps", str(steps), "--workdir", str(folder / run)] for run in runs
        ]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, "-c", CHILD, json.dumps(args)]
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        self.watchdog = threading.Timer(HANG, self.process.kill)

    def __enter__(self) -> "_Child":
        self.watchdog.start()
        return self

    def __exit__(self, *_) -> None:
        self.watchdog.cancel()
        self.process.kill()
        self.process.wait()

    def steps_made(self) -> int:
        """How many it has reported itself; metrics.jsonl also has those of the process before."""
        return self.log.read_text().count("\nstep ")

    def let_run(self, seconds: float) -> None:
        """Waits so long. Raises AssertionError if it ends."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
            raise AssertionError(self.end_of_log())

    def stop_in_a_save(self, run: Path, rng: random.Random) -> None:
        """Stops it while it writes a checkpoint, which it has not finished where it stands then."""
        while True:
            while _unfinished(run) is None:
                self.let_run(0.002)
            self.let_run(rng.uniform(0, 0.02))
            self.process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            if _unfinished(run) is not None:
                return
            self.process.send_signal(signal.SIGCONT)

    def end_of_log(self) -> str:
        """What it said last."""
        return self.log.read_text()[-2000:]


def _last_step(run: Path) -> int:
    """The last step in metrics.jsonl, 0 before there is one."""
    file = run / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def _unfinished(run: Path) -> int | None:
    """The step whose checkpoint is half written."""
    for path in (run / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
        return int(path.name.partition(".")[0])
    return None


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
    assert _unfinished(killed) is None
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
