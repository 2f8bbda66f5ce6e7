"""Page faults and time of a program with large temporaries: python benchmarks/malloc.py.

Compares malloc as `ddpm_jax.configure_jax` sets it with malloc as it is (MALLOC_TOP_PAD_ says
something of it, so that nothing is set). Each is a process of its own, a CPU's. Takes a minute. A
kernel that gives huge pages unasked shows few faults either way:
/sys/kernel/mm/transparent_hugepage/enabled says.
"""

import os
import subprocess
import sys

CONTESTANTS = {
    "malloc as it is": {"MALLOC_TOP_PAD_": "9999"},
    "malloc as it is set": {},
}
PROGRAM = """
import resource, statistics, time
import ddpm_jax
ddpm_jax.configure_jax(compile_cache=False)
import jax, numpy as np

many = jax.jit(lambda x: jax.numpy.square(x @ x.T) @ x)  # 100 MB of temporaries.
x = np.ones((5000, 20), np.float32)
faults, milliseconds = [], []
for repeat in range(30):
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    many(x).block_until_ready()
    milliseconds.append(1000 * (time.perf_counter() - start))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(statistics.median(faults[10:]), statistics.median(milliseconds[10:]))
"""


def measure(settings: dict[str, str]) -> tuple[float, float]:
    """(page faults, milliseconds) of a call in a process with these variables; medians."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "GLIBC_"))
    }
    environment = {**kept, "JAX_PLATFORMS": "cpu", **settings}
    command = [sys.executable, "-c", PROGRAM]
    said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    faults, milliseconds = map(float, said.stdout.split())
    return faults, milliseconds


def main() -> None:
    """Prints a table."""
    print("| | page faults a call | ms a call |")
    print("|---|---|---|")
    for name, settings in CONTESTANTS.items():
        faults, milliseconds = measure(settings)
        print(f"| {name} | {faults:,.0f} | {milliseconds:.1f} |")


if __name__ == "__main__":
    main()
