"""How long a save blocks the training loop of the CIFAR10 network, compared with a step.

    python benchmarks/checkpoint.py

Alternates plain steps with steps followed by a save, and prints medians. It takes a few minutes on
two CPU cores.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time

import jax
import numpy as np

from ddpm_jax import DDPM
from ddpm_jax.config import load_config
from ddpm_jax.data import Batches, from_array
from ddpm_jax.devices.mesh import make_mesh, replicated
from ddpm_jax.storage.checkpoint import Checkpoints
from ddpm_jax.training.update import Update, init_state


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=8,
        help="images per step; the paper's 128 takes half a minute per step on a CPU",
    )
    parser.add_argument("--saves", type=int, default=3, help="number of saves")
    options = parser.parse_args()
    config = load_config("cifar10")
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, batch_size=options.batch_size)
    )
    images = np.random.default_rng(0).integers(0, 256, (256, 32, 32, 3), dtype=np.uint8)
    source = from_array(images, (32, 32, 3))
    mesh = make_mesh()
    ddpm = DDPM(config)
    update = Update(ddpm, mesh, Batches(source, np.arange(256), options.batch_size, 0))
    state = jax.jit(lambda: init_state(ddpm), out_shardings=replicated(mesh))()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6
    done = 0
    plain = []
    blocked = []
    saving = []
    while_saving = []

    def step():
        nonlocal state, done
        start = time.perf_counter()
        state, metrics = update(state, done)
        jax.block_until_ready((state, metrics))
        done += 1
        return time.perf_counter() - start

    step()  # Compiles.
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder, keep=1)
        for _ in range(options.saves):
            plain.append(step())
            start = time.perf_counter()
            checkpoints.save(done, state._asdict())
            blocked.append(time.perf_counter() - start)
            while_saving.append(step())
            checkpoints.wait()
            saving.append(time.perf_counter() - start)
        checkpoints.close()
    device = jax.devices()[0].device_kind
    print(f"{size:.0f} MB of state, batch {options.batch_size}, {mesh.size} x {device}; seconds:")
    rows = {
        "a step": plain,
        "save: the loop waits": blocked,
        "a step during a save": while_saving,
        "save: until it is on disk": saving,
    }
    for name, seconds in rows.items():
        median = statistics.median(seconds)
        print(f"{name:28}{median:8.3f}  ({min(seconds):.3f} to {max(seconds):.3f})")


if __name__ == "__main__":
    main()
