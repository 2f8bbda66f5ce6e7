"""What it costs to run a chain in segments: python benchmarks/segments.py [--rounds 9].

`DDPM.sample` against the same chain as one program (`sample_batch`), in alternating turns, with
the smallest shipped network: the faster the step, the more the cuts weigh. Prints the ratio of the
medians; 1.01 means that the segments take one percent longer. Compiling is not timed.
"""

import argparse

import jax
import numpy as np
from rounds import alternate

from ddpm_jax import DDPM, configure_jax
from ddpm_jax.calls.conditions import FREE
from ddpm_jax.calls.programs import sample_batch
from ddpm_jax.config import load_config
from ddpm_jax.sampler import Sampler

CASES = [
    ("ancestral, all 1000 steps", Sampler()),
    ("ddim, 50 steps", Sampler("ddim", steps=50)),
    ("ddim, 10 steps", Sampler("ddim", steps=10)),
]


def main(network: str, batch: int, rounds: int) -> None:
    """Prints a line for each case."""
    configure_jax()
    ddpm = DDPM(load_config(network))
    params = ddpm.init(jax.random.key(0))
    key = jax.random.key(0)
    indices = np.arange(batch, dtype=np.uint32)
    print(f"{network}, {batch} images, {jax.devices()[0].device_kind}")
    for name, sampler in CASES:

        def in_segments(sampler=sampler):
            ddpm.sample(params, key, batch, batch_size=batch, sampler=sampler)

        def as_one(sampler=sampler):
            np.asarray(sample_batch(ddpm, sampler, params, FREE, key, indices))

        timings = alternate({"segments": in_segments, "one program": as_one}, rounds)
        segments = timings["segments"]
        one = timings["one program"]
        print(
            f"{name:26} {1000 * segments.median:9.1f} ms in segments, "
            f"{1000 * one.median:9.1f} ms as one: ratio {segments.median / one.median:.3f}, "
            f"spreads {segments.spread:.3f} and {one.spread:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="digits")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    main(**vars(parser.parse_args()))
