"""The operations that take the time of a call.

    python benchmarks/hotspots.py NETWORK KIND BATCH [--dtype bfloat16] [--top 20]

KIND is forward, training or reverse. Prints milliseconds from XLA's profile, summed over all
threads or streams and over operations whose names differ only in the number at the end. On a CPU,
work that convolutions do on other threads is missing. On a GPU, kernels are counted one by one,
even if a call runs them as one graph.
"""

import argparse
import collections
import re
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import ours

from ddpm_jax import configure_jax, load_config


def hotspots(call) -> collections.Counter:
    """{operation: milliseconds in one call}; the call must be compiled already."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        profile = jax.profiler.ProfileData.from_file(str(next(Path(folder).rglob("*.xplane.pb"))))
    on_gpu = [plane for plane in profile.planes if plane.name.startswith("/device:GPU")]
    found = collections.Counter()
    for plane in on_gpu or profile.planes:
        for line in plane.lines:
            for event in line.events:
                name = dict(event.stats).get("hlo_op") or (
                    event.name if line.name.startswith("Stream") else None
                )
                if name is not None and (not on_gpu or line.name.startswith("Stream")):
                    found[re.sub(r"[._\d]+$", "", name)] += event.duration_ns / 1e6
    return found


def table(found: collections.Counter, top: int) -> str:
    """A Markdown table, largest first."""
    total = sum(found.values())
    rows = [f"| {name} | {ms:.2f} | {ms / total:.1%} |" for name, ms in found.most_common(top)]
    return "\n".join(
        ["| operation | ms | |", "|---|---|---|", *rows, f"| all {len(found)} | {total:.2f} | |"]
    )


def call_of(network: str, kind: str, batch: int, dtype: str):
    """The call to profile, compiled."""
    config = ours.with_dtype(load_config(network), dtype)
    params = ours.parameters(config)
    shape = (batch, *config.data.image_shape)
    if kind == "forward":
        x = np.zeros(shape, np.float32)
        t = np.zeros(batch, np.int32)
        call = ours.forward(config, params, x, t)
    elif kind == "training":
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        call = ours.training(config, params, images)
    else:
        call = ours.reverse(config, params, batch, 5)
    call()  # Compiles.
    call()
    return call


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network")
    parser.add_argument("kind", choices=["forward", "training", "reverse"])
    parser.add_argument("batch", type=int)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--top", type=int, default=20)
    options = parser.parse_args()
    configure_jax()
    call = call_of(options.network, options.kind, options.batch, options.dtype)
    print(table(hotspots(call), options.top))
    times = []
    processor = time.process_time()
    for _ in range(9):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    cores = (time.process_time() - processor) / sum(times)
    milliseconds = 1e3 * statistics.median(times)
    print(f"\nWithout the profiler a call takes {milliseconds:.2f} ms on {cores:.2f} busy cores.")
