"""How time and memory grow with the amount of work.

    python benchmarks/scaling.py [TABLE ...] [--rounds 3]

Each case runs in its own process, and its peak memory is recorded. The processes of a table take
turns; results are medians. The tables are `steps` and `images` (sampling with the digits' network),
`batch` and `resolution` (the training step of small32), `devices` (the same on fake devices of one
CPU), `start` (the first update on a folder, kept in memory or streamed) and `reading` (a batch).
"""

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

UNITS_IN_MIB = 2**20 if sys.platform == "darwin" else 2**10
"""The kernel reports peak memory in bytes on a Mac, in KiB elsewhere."""


def sampling(n: int, steps: int) -> dict:
    """Sampling with DDIM in batches of 64."""
    import jax
    import ours

    from ddpm_jax import DDPM, load_config

    config = load_config("digits")
    ddpm = DDPM(config)
    params = jax.device_put(ours.parameters(config))

    def draw():
        return ddpm.sample(params, jax.random.key(0), n, batch_size=64, sampler="ddim", steps=steps)

    seconds = _seconds(draw, 1)
    return {"s": seconds, "ms a step and batch": 1e3 * seconds / (steps * -(-n // 64))}


def training(batch: int, size: int = 32, devices: int = 1) -> dict:
    """An update of small32 on images of size x size, divided over `devices` devices."""
    import jax
    import numpy as np
    import ours

    from ddpm_jax import DDPM, load_config
    from ddpm_jax.data import Batch
    from ddpm_jax.devices.mesh import batch_sharding, make_mesh, state_shardings
    from ddpm_jax.training.update import init_state, train_step

    config = load_config("small32")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, image_shape=(size, size, 3)),
        train=dataclasses.replace(config.train, batch_size=batch),
    )
    shape = (batch, size, size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    call = ours.training(config, ours.parameters(config), images, devices)
    used = []

    def counted():
        before = time.process_time()
        call()
        used.append(time.process_time() - before)

    seconds = _seconds(counted, 3)
    ddpm = DDPM(config)
    mesh = make_mesh(devices)
    state = jax.eval_shape(lambda: init_state(ddpm))
    state = jax.tree.map(
        lambda leaf, sharding: leaf.update(sharding=sharding), state, state_shardings(state, mesh)
    )
    images = jax.ShapeDtypeStruct(shape, np.uint8, sharding=batch_sharding(mesh))
    step = jax.jit(train_step, static_argnums=0, static_argnames="mesh", donate_argnums=1)
    step = step.lower(ddpm, state, Batch(images), mesh=mesh).compile()
    return {
        "ms": 1e3 * seconds,
        "ms an image": 1e3 * seconds / batch,
        "processor ms": 1e3 * sum(used[-3:]) / 3,
        "GFLOP of all devices": devices * step.cost_analysis()["flops"] / 1e9,
        "MiB of temporaries, of a device": step.memory_analysis().temp_size_in_bytes / 2**20,
    }


def starting(count: int, cache_mb: int) -> dict:
    """From process start to the first update, on a folder of `count` images of 32x32.

    The images are kept in memory, or streamed if `cache_mb` is 0.
    """
    import startup

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        _pictures(folder / "images", count)
        command = [sys.executable, "-c", startup.OURS, "train", "digits"]
        command += ["--data.source", f"folder:{folder}/images", "--workdir", f"{folder}/run"]
        command += ["--data.cache-mb", str(cache_mb)]
        command += ["--train.steps", "1", "--train.log-every", "1"]
        for _ in range(2):  # The first compiles.
            seconds, _ = startup.run(command, folder, startup.FIRST_UPDATE)
    return {"s": seconds}


def reading(count: int) -> dict:
    """Bringing a batch of 128 out of `count` images of 32x32 to the device.

    Its pixels, or with data.on_device only its indices.
    """
    import jax
    import numpy as np

    from ddpm_jax.data import Batches, from_array

    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    batches = Batches(from_array(images, (32, 32, 3)), np.arange(count), 128, 0)
    repeats = 1000

    def seconds_of(read):
        steps = iter(range(repeats + 2))
        return _seconds(lambda: jax.block_until_ready(jax.device_put(read(next(steps)))), repeats)

    pixels = seconds_of(lambda step: batches.batch_at(step).image)
    return {
        "ms": 1e3 * pixels,
        "images/s": 128 / pixels,
        "ms on_device": 1e3 * seconds_of(batches.indices_at),
    }


TABLES = {
    "steps": (sampling, [{"n": 64, "steps": steps} for steps in (25, 50, 100, 200)]),
    "images": (sampling, [{"n": n, "steps": 25} for n in (64, 128, 256, 512)]),
    "batch": (training, [{"batch": batch} for batch in (8, 16, 32, 64)]),
    "resolution": (training, [{"batch": 8, "size": size} for size in (16, 32, 64, 128)]),
    "devices": (training, [{"batch": 64, "devices": devices} for devices in (1, 2, 4, 8)]),
    "start": (
        starting,
        [{"count": count, "cache_mb": mb} for mb in (4096, 0) for count in (500, 5000, 50_000)],
    ),
    "reading": (reading, [{"count": count} for count in (5000, 50_000)]),
}


def _seconds(call, repeats: int) -> float:
    """Seconds per call, after two calls that compile."""
    call()
    call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _pictures(folder: Path, count: int) -> None:
    import numpy as np
    from PIL import Image

    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    for i, pixels in enumerate(noise):
        picture = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)
        picture.save(folder / f"{i:06}.png")


def measure(name: str, case: dict) -> dict:
    """The results of one case in a fresh process, including its peak memory."""
    environment = dict(os.environ)
    if name == "devices":
        flags = f"--xla_force_host_platform_device_count={case['devices']}"
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flags}"
    command = [sys.executable, __file__, "--only", name, json.dumps(case)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[tuple[dict, list[dict]]]) -> str:
    """A Markdown table: the medians of each case's rounds."""
    case, first = rows[0]
    names = [*case, *first[0]]
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for case, rounds in rows:
        medians = [statistics.median(each[name] for each in rounds) for name in first[0]]
        cells = [str(value) for value in case.values()] + [f"{value:,.4g}" for value in medians]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(names: list[str], number: int) -> None:
    """Measures the tables and prints them."""
    for name in names or TABLES:
        rows = [(case, []) for case in TABLES[name][1]]
        for _ in range(number):
            for case, results in rows:
                results.append(measure(name, case))
        print(f"\n{name}\n\n{table(rows)}", flush=True)


def only(name: str, case: str) -> None:
    """Measures one case in this process and prints the result as JSON."""
    from ddpm_jax import configure_jax

    configure_jax()
    values = TABLES[name][0](**json.loads(case))
    if name != "start":
        values["MiB at most"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / UNITS_IN_MIB
    print(json.dumps(values))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="TABLE", help=f"any of {', '.join(TABLES)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        only(*options.only)
    else:
        main(options.names, options.rounds)
