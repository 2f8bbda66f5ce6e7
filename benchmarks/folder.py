"""How long a start takes to read a folder of many small images: the first, and the next.

    python benchmarks/folder.py [--images 50000]

Seconds of `load_source`, and processor seconds of all processes, each start in a process
of its own and with a cache folder of the benchmark's own. The PNGs of 32x32 are smooth noise in ten
folders, written to a temporary folder. "nothing kept" is with data.disk_cache_mb 0, and "threads"
also without the processes that decode.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data import picture

SIZE = 32

START = """
import json, resource, sys, time
from ddpm_jax.config import Data
from ddpm_jax.data import decode_all, load_source

def used():
    both = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in both)

folder, options, in_threads = json.loads(sys.argv[1])
if in_threads:
    decode_all.MANY = sys.maxsize
start, before = time.perf_counter(), used()
source = load_source(Data(source=f"folder:{folder}", **options))
print(json.dumps([time.perf_counter() - start, used() - before, source.fingerprint]))
"""

WAYS = {
    "first start": ({}, False),
    "second start": ({}, False),
    "nothing kept": ({"disk_cache_mb": 0}, False),
    "nothing kept, threads": ({"disk_cache_mb": 0}, True),
    "first start, streamed": ({"cache_mb": 0}, False),
    "second start, streamed": ({"cache_mb": 0}, False),
}


def write(folder: Path, count: int) -> None:
    """Writes `count` images into ten folders below `folder`."""
    for label in range(10):
        (folder / f"class_{label}").mkdir(parents=True)
    for i in range(count):
        picture(SIZE, i).save(folder / f"class_{i % 10}/{i:06}.png")


def start(folder: Path, cache: Path, options: dict, in_threads: bool) -> tuple[float, float, str]:
    """(seconds, processor seconds, fingerprint) of a start in a process of its own."""
    order = json.dumps([str(folder), options, in_threads])
    done = subprocess.run(
        [sys.executable, "-c", START, order],
        env={**os.environ, "XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(done.stdout)


def main(images: int, rounds: int) -> None:
    """Writes the images, starts in every way, and prints a table of the rounds."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "images"
        write(folder, images)
        time.sleep(3)  # What changed two seconds ago or less is not kept.
        print(
            f"{'seconds (processor seconds)':28}" + "".join(f"{i + 1:>16}" for i in range(rounds))
        )
        table: dict[str, list[str]] = {name: [] for name in WAYS}
        fingerprints = set()
        for i in range(rounds):
            for name, (options, in_threads) in WAYS.items():
                cache = Path(root) / f"cache_{i}"
                wall, used, fingerprint = start(folder, cache, options, in_threads)
                table[name].append(f"{wall:.1f} ({used:.1f})")
                fingerprints.add(fingerprint)
        for name, cells in table.items():
            print(f"{name:28}" + "".join(f"{cell:>16}" for cell in cells))
        size = sum(each.stat().st_size for each in Path(root).glob("cache_0/ddpm_jax/images/*"))
        print(f"kept: {size / 2**20:.1f} MiB; one fingerprint: {len(fingerprints) == 1}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    main(**vars(parser.parse_args()))
