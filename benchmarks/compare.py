"""This project against diffusers on PyTorch: same network, weights and batch, alternating rounds.

    scripts/benchmark.sh [--networks small32] [--kinds forward training] [--rounds 5]

Prints a table and writes benchmark.json and benchmark.md. The peers are diffusers' UNet2DModel with
its schedulers, in three variants: plain PyTorch (eager), channels_last and torch.compile. For the
reverse chain there is also a loop as people write it themselves (plain). Ratios are the peer's time
divided by ours: above 1 we are faster.
"""

import argparse
import gc
import json
import math
import os
import platform
import sys
import time
import traceback
from pathlib import Path

import diffusers
import jax
import numpy as np
import ours
import peers
import rounds
import torch

from ddpm_jax import configure_jax, load_config
from ddpm_jax.storage.run import versions

# A case is (network, kind, batch).
CASES = [
    *(
        ("digits", kind, batch)
        for kind, batch in [("forward", 1), ("forward", 64), ("training", 32)]
    ),
    *(("digits", "reverse", batch) for batch in (1, 16, 64)),
    *(("small32", "forward", batch) for batch in (1, 8)),
    ("small32", "training", 64),
    *(("small32", "reverse", batch) for batch in (1, 16, 64)),
    ("small32", "sample", 16),
    *(("fashion_mnist", "reverse", batch) for batch in (1, 16, 64)),
    ("fashion_mnist", "training", 32),
    *(("cifar10", "forward", batch) for batch in (1, 8)),
    ("cifar10", "training", 8),
    *(("cifar10", "reverse", batch) for batch in (1, 16)),
]
# The most important cases come first, because the time may run out (--seconds).
GPU_CASES = [
    ("cifar10", "training", 128),
    ("cifar10", "reverse", 256),
    *(("cifar10", "training", batch) for batch in (256, 512)),
    ("cifar10", "sample", 256),
    *(("cifar10", "reverse", batch) for batch in (16, 1)),
    *(("cifar10", "forward", batch) for batch in (1, 128, 256)),
]
KINDS = ("forward", "training", "reverse", "sample")
STEPS = 5
"""Steps of the reverse chain in one call, and of DDIM in `sample`."""

CLOSE = {"float32": 2e-5 if peers.DEVICE == "cpu" else 2e-2, "bfloat16": 0.2}
"""Largest allowed difference of both outputs, relative to the largest output.

A GPU multiplies float32 in TF32.
"""


def contestants(network: str, kind: str, batch: int, dtype: str, variants) -> dict:
    """The contestants of a case, {name: call}; a call returns when its work is done."""
    config = ours.with_dtype(load_config(network), dtype)
    params = ours.parameters(config)
    shape = (batch, *config.data.image_shape)
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, shape, dtype=np.uint8)
    x = rng.standard_normal(shape, dtype=np.float32)
    t = rng.integers(0, 1000, batch, dtype=np.int32)
    peer = {
        variant: peers.Peer(config, params, variant, dtype, train=kind == "training")
        for variant in variants
    }
    calls = {}
    if kind == "forward":
        calls["ours"] = ours.forward(config, params, x, t)
        for name, each in peer.items():
            calls[name] = peers.forward(each, x, t)
        expected = calls["ours"]()
        for name, call in calls.items():
            error = np.abs(call() - expected).max() / np.abs(expected).max()
            assert error < CLOSE[dtype], f"{name}: its output differs from ours by {error}"
    elif kind == "training":
        calls["ours"] = ours.training(config, params, images)
        for name, each in peer.items():
            calls[name] = peers.training(each, images)
    elif kind == "sample":
        calls["ours"] = ours.sample(config, params, batch, STEPS)
        for name, each in peer.items():
            calls[name] = peers.sample(each, batch, STEPS)
    else:
        calls["ours"] = ours.reverse(config, params, batch, STEPS)
        for name, each in peer.items():
            calls[name] = peers.reverse(each, batch, STEPS)
        for name, each in peer.items():
            calls[f"plain {name}"] = peers.plain_reverse(each, batch, STEPS)
    return calls


def measure(network: str, kind: str, batch: int, dtype: str, variants, number: int) -> dict:
    """Measures one case.

    Seconds are those of a network call, an update, a reverse step, or all images of `sample`.
    """
    print(f"{network} {kind} {batch} {dtype}", flush=True)
    timings = rounds.alternate(contestants(network, kind, batch, dtype, variants), number)
    torch.compiler.reset()
    jax.clear_caches()
    gc.collect()
    torch.cuda.empty_cache()  # jax cannot use memory that torch keeps. Does nothing without a GPU.
    unit = STEPS if kind == "reverse" else 1
    times = {
        name: {"seconds": timing.median / unit, "spread": timing.spread, "rounds": timing.rounds}
        for name, timing in timings.items()
    }
    return {"network": network, "kind": kind, "batch": batch, "dtype": dtype, "times": times}


def table(results: list[dict]) -> str:
    """A Markdown table: our time, and each peer's time divided by ours."""
    names = list(
        dict.fromkeys(name for result in results for name in result["times"] if name != "ours")
    )
    lines = [
        f"| case | ours, ms | {' | '.join(names)} | least |",
        f"|---|---|{'---|' * len(names)}---|",
    ]
    for result in results:
        times = result["times"]
        mine = times["ours"]
        ratios = {name: times[name]["seconds"] / mine["seconds"] for name in names if name in times}
        dtype = "" if result["dtype"] == "float32" else f", {result['dtype']}"
        cells = [
            f"{ratios[name]:.2f} ± {times[name]['spread']:.0%}" if name in ratios else ""
            for name in names
        ]
        lines.append(
            f"| {result['network']} {result['kind']}, batch {result['batch']}{dtype} "
            f"| {mine['seconds'] * 1e3:.4g} ± {mine['spread']:.0%} | {' | '.join(cells)} "
            f"| {min(ratios.values(), default=float('nan')):.2f} |"
        )
    return "\n".join(lines)


def machine() -> dict:
    """The machine and software that the timings depend on."""
    return {
        "cpu": _cpuinfo("model name") or platform.processor(),
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "versions": {**versions(), "torch": torch.__version__, "diffusers": diffusers.__version__},
        "flags": os.environ.get("XLA_FLAGS", ""),
        "torch_threads": torch.get_num_threads(),
        "cpu_flags": _cpuinfo("flags").split(),
    }


def _cpuinfo(field: str) -> str:
    """The first value of `field` in /proc/cpuinfo, empty if absent."""
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.exists() else []:
        if line.startswith(field):
            return line.partition(":")[2].strip()
    return ""


def main(
    networks, kinds, dtypes, variants, number: int, out: Path, seconds: float = math.inf
) -> None:
    """Measures the cases that start within `seconds`, prints and writes the results.

    Exits with 1 if a case failed.
    """
    configure_jax()
    until = time.monotonic() + seconds
    if (jax.default_backend() == "gpu") != (peers.DEVICE == "cuda"):
        sys.exit(
            f"jax runs on {jax.default_backend()} and torch on {peers.DEVICE}; "
            "install both for the same device"
        )
    if peers.DEVICE == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, jax's default on a GPU.
        torch.backends.cudnn.benchmark = True  # XLA searches for the fastest algorithms, too.
    cases = GPU_CASES if jax.default_backend() == "gpu" else CASES
    results, failed = [], []
    for dtype in dtypes:
        for network, kind, batch in cases:
            if network not in networks or kind not in kinds:
                continue
            if time.monotonic() > until:
                print(f"no time for {network} {kind} {batch} {dtype}", flush=True)
                continue
            try:
                results.append(measure(network, kind, batch, dtype, variants, number))
            except Exception:  # For example out of memory; the other cases still run.
                traceback.print_exc()
                failed.append(f"{network} {kind} {batch} {dtype}")
                continue
            print(table(results).splitlines()[-1], flush=True)
            out.mkdir(parents=True, exist_ok=True)
            about = {"machine": machine(), "rounds": number, "results": results}
            (out / "benchmark.json").write_text(json.dumps(about, indent=1))
            (out / "benchmark.md").write_text(table(results) + "\n")
    print(table(results))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--networks", nargs="+", default=list(dict.fromkeys(network for network, *_ in CASES))
    )
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument(
        "--variants", nargs="+", default=list(peers.VARIANTS), choices=peers.VARIANTS
    )
    parser.add_argument("--rounds", type=int, default=5, dest="number")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no case after this")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    main(**vars(parser.parse_args()))
