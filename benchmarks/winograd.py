"""Reverse steps with and without Winograd's convolutions, in alternating rounds on a CPU.

    python benchmarks/winograd.py [--network cifar10] [--batches 1 16] [--rounds 5]

Prints milliseconds of a step; the ratio is that without by that with. What a chain computes once of
its parameters is computed before.
"""

import argparse
import dataclasses

import ours
import rounds

from ddpm_jax import configure_jax, load_config

STEPS = 2
"""Of a turn."""


def main(network: str, batches: list[int], number: int) -> None:
    """Measures and prints each batch size."""
    configure_jax()
    config = load_config(network)
    params = ours.parameters(config)
    contestants = {
        name: dataclasses.replace(config, model=dataclasses.replace(config.model, winograd=is_on))
        for name, is_on in {"with": True, "without": False}.items()
    }
    print("| batch | with, ms | without, ms | ratio |\n|---|---|---|---|")
    for batch in batches:
        calls = {
            name: ours.reverse(each, params, batch, STEPS) for name, each in contestants.items()
        }
        times = rounds.alternate(calls, number)
        cells = [
            f"{1e3 * each.median / STEPS:.4g} ± {each.spread:.0%}"
            for each in (times["with"], times["without"])
        ]
        ratio = times["without"].median / times["with"].median
        print(f"| {batch} | {' | '.join(cells)} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="cifar10")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5, dest="number")
    main(**vars(parser.parse_args()))
