"""Error and speed of the samplers with few steps.

    python benchmarks/samplers.py RUN [--n 64]

The error is the root mean squared difference of the images, of 255, from those of DDIM with all
steps and the same key. The time is a fraction of ancestral sampling's with all steps. Compiling is
not timed.
"""

import argparse
import time

import jax
import numpy as np

from ddpm_jax import load

ROWS = [
    ("ddim", None),
    ("ddim", "trailing"),
    ("ddim", "quad"),
    ("dpm-solver++", None),
    ("dpm-solver++", "linspace"),
]


def main(run: str, n: int) -> None:
    """Draws images with every sampler and prints error and time."""
    ddpm, params = load(run)

    def timed(**options):
        for _ in range(2):  # The first compiles.
            start = time.perf_counter()
            images = ddpm.sample(params, jax.random.key(0), n, batch_size=n, **options)
        return images, time.perf_counter() - start

    _, whole = timed()
    exact, _ = timed(sampler="ddim")
    print(f"{n} images, ancestral on all steps: {whole:.1f} s")
    for sampler, grid in ROWS:
        for steps in (10, 20, 50):
            images, seconds = timed(sampler=sampler, steps=steps, grid=grid)
            rmse = 127.5 * np.sqrt(np.mean(np.square(images - exact)))
            print(
                f"{sampler:13} {grid or 'default':9} {steps:3d} steps  RMSE {rmse:6.2f}  "
                f"time x {seconds / whole:.4f}"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--n", type=int, default=64)
    main(**vars(parser.parse_args()))
