"""How long a process lives on after another of its program was killed: python benchmarks/death.py.

Two processes train on this machine's CPU, and one of them is killed: first the one, and in a
second run the other. The one that is left must end within `ddpm_jax.devices.processes.BOUND`
seconds. If it does not, the exit code is 1. Takes three minutes.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ddpm_jax.devices.processes import BOUND

OURS = "import sys; from ddpm_jax.cli import main; sys.exit(main())"
NETWORK = "--model.base-channels 4 --model.norm-groups 2 --model.channel-multipliers 1"
LOOP = "--train.steps 1000000 --train.log-every 1 --train.eval-every 0 --train.sample-every 0"


def start(folder: Path) -> list[subprocess.Popen]:
    """Two processes of one run, training."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", OURS, "train", "digits", "--workdir", str(folder / "run")]
    command += [*NETWORK.split(), *LOOP.split()]
    command += ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder / "cache")}
    with open(folder / "output", "w") as output:
        processes = [
            subprocess.Popen([*command, str(i)], env=environment, stdout=output, stderr=output)
            for i in range(2)
        ]
    while not (folder / "run/metrics.jsonl").exists():
        if any(process.poll() is not None for process in processes):
            sys.exit((folder / "output").read_text())
        time.sleep(0.1)
    return processes


def seconds_until_the_other_ends(dies: int) -> float:
    """After number `dies` of two processes was killed."""
    with tempfile.TemporaryDirectory() as folder:
        processes = start(Path(folder))
        began = time.perf_counter()
        processes[dies].kill()
        processes[1 - dies].wait()
        seconds = time.perf_counter() - began
        processes[dies].wait()
        return seconds


def main() -> None:
    """Prints a line for each of them that dies."""
    late = False
    for dies in (0, 1):
        seconds = seconds_until_the_other_ends(dies)
        late |= seconds > BOUND
        print(f"process {dies} killed: the other ended after {seconds:.0f} s, at most {BOUND}")
    sys.exit(late)


if __name__ == "__main__":
    main()
