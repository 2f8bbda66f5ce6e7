"""Where the time of a call goes: benchmarks/hotspots.py NETWORK KIND BATCH [--dtype bfloat16] [--top 20].

KIND is forward, training or reverse. Prints milliseconds by the operations that XLA's profile names, numbers left out;
of several threads or streams together.
"""

import argparse
import collections
import re
import tempfile
from pathlib import Path

import jax
import numpy as np
import ours

from ddpm_jax import configure_jax, load_config


def hotspots(call) -> collections.Counter:
    """{operation: ms of one call} of a call that has been compiled."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        profile = jax.profiler.ProfileData.from_file(str(next(Path(folder).rglob("*.xplane.pb"))))
    found = collections.Counter()
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                operation = dict(event.stats).get("hlo_op")
                if operation is not None:
                    found[re.sub(r"[.\d]+$", "", operation)] += event.duration_ns / 1e6
    return found


def table(found: collections.Counter, top: int) -> str:
    """Markdown, the largest first."""
    total = sum(found.values())
    rows = [f"| {name} | {ms:.2f} | {ms / total:.1%} |" for name, ms in found.most_common(top)]
    return "\n".join(["| operation | ms | |", "|---|---|---|", *rows, f"| all {len(found)} | {total:.2f} | |"])


def call_of(network: str, kind: str, batch: int, dtype: str):
    """The call to be looked at, compiled."""
    config = ours.with_dtype(load_config(network), dtype)
    params, rng = ours.parameters(config), np.random.default_rng(0)
    shape = (batch, *config.data.image_shape)
    calls = {
        "forward": lambda: ours.forward(config, params, np.zeros(shape, np.float32), np.zeros(batch, np.int32)),
        "training": lambda: ours.training(config, params, rng.integers(0, 256, shape, dtype=np.uint8)),
        "reverse": lambda: ours.reverse(config, params, batch, 5),
    }
    call = calls[kind]()
    call()
    call()
    return call


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network")
    parser.add_argument("kind", choices=["forward", "training", "reverse"])
    parser.add_argument("batch", type=int)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--top", type=int, default=20)
    options = parser.parse_args()
    configure_jax()
    print(table(hotspots(call_of(options.network, options.kind, options.batch, options.dtype)), options.top))
