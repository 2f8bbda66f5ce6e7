"""What a training step takes at a device's measured rates, and in fact: benchmarks/roofline.py NETWORK BATCH ...

Matrix products and convolutions at the rate of a large product; what norms, attention, skip connections and the
optimiser read and write at the bandwidth of a large array. "sum" takes them one after the other; a norm that kept
its input on the chip would read it once. --dtype float32 or bfloat16 (default).
"""

import argparse
import dataclasses
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import ours
from flax import linen as nn

from ddpm_jax import DDPM, configure_jax, load_config
from ddpm_jax.models.layers import Attention, GroupNorm, ResBlock
from ddpm_jax.training.flops import step_flops
from ddpm_jax.training.update import init_state

# How often a training step reads and writes an array, forward + backward, where all that is elementwise is fused with
# what comes next; operands and results of matrix products and convolutions are not counted.
NORM = (3 + 1) + (4 + 1)
"""A norm's input: read for the mean, the variance and the result, which is written; backward it and the gradient are
read for the sums and for the result."""
SKIP = (1 + 1) + (1 + 1)
"""The concatenation before a block on the way up; backward its parts."""
RESIDUAL = (2 + 1) + (2 + 1)
"""What is added at the end of a block or of attention, and backward the two gradients."""
ADAM = 1 + 5 + 4
"""Of float32 parameters: the gradient read for its norm; it, parameters, two moments and average read; all but it
written."""


def seconds_of(call, waits: bool = False) -> float:
    """Of one call of a device's function: the median of five turns of ten calls, or of one that itself `waits`."""
    jax.block_until_ready(call())
    times, number = [], 1 if waits else 10
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(number):
            result = call()
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / number)
    return float(np.median(times))


def matrix_rate(dtype: str) -> float:
    """FLOP/s of a product of square matrices of random numbers."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    a, b = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in range(2))
    product = jax.jit(jnp.matmul)
    return 2 * n**3 / seconds_of(lambda: product(a, b))


def bandwidth() -> float:
    """Bytes/s, read and written together."""
    x = jnp.ones(2**26 if jax.default_backend() == "cpu" else 2**29)
    add = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / seconds_of(lambda: add(x))


def traffic(ddpm: DDPM, batch: int, itemsize: int) -> dict[str, float]:
    """Bytes that a training step reads and writes outside of matrix products and convolutions, by part."""
    params = jax.eval_shape(lambda: ddpm.init(jax.random.key(0)))
    x, t = jnp.zeros((batch, *ddpm.image_shape)), jnp.zeros(batch, jnp.int32)
    found, norms = {"norms": 0.0, "attention": 0.0, "skips and sums": 0.0}, []

    def look(next_fun, args, kwargs, context):
        module = context.module if context.method_name == "__call__" else None
        result = next_fun(*args, **kwargs)
        if isinstance(module, GroupNorm):
            norms.append(module)
            found["norms"] += NORM * args[0].size * itemsize
        elif isinstance(module, Attention | ResBlock):
            found["skips and sums"] += RESIDUAL * result.size * itemsize
        if isinstance(module, Attention):
            # Logits written and read and their gradient read in float32; probabilities written and read, the
            # gradient of the logits written.
            found["attention"] += (
                (3 * 4 + 3 * itemsize) * batch * math.prod(args[0].shape[1:3]) ** 2
            )
        if isinstance(module, ResBlock) and module.name.startswith("up"):
            found["skips and sums"] += SKIP * args[0].size * itemsize
        return result

    with nn.intercept_methods(look):
        jax.eval_shape(lambda params: ddpm.network.apply({"params": params}, x, t), params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    assert len(norms) == sum(path[-1].key == "scale" for path, _ in leaves), "norms were missed"
    found["optimiser"] = ADAM * sum(leaf.size for _, leaf in leaves) * 4
    return found


def measure(network: str, batch: int, dtype: str, rates: tuple[float, float]) -> dict[str, float]:
    """ms of each part at `rates`, (FLOP/s, bytes/s), of all, and of the step itself."""
    config = ours.with_dtype(load_config(network), dtype)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=batch))
    ddpm = DDPM(config)
    flops = step_flops(ddpm, jax.eval_shape(lambda: init_state(ddpm)))
    parts = {"matrix": flops / rates[0]}
    parts |= {
        name: size / rates[1]
        for name, size in traffic(ddpm, batch, 2 if dtype == "bfloat16" else 4).items()
    }
    images = np.random.default_rng(0).integers(0, 256, (batch, *ddpm.image_shape), dtype=np.uint8)
    step = ours.training(config, ours.parameters(config), images)
    measured = seconds_of(step, waits=True)
    return {
        name: 1e3 * seconds
        for name, seconds in {**parts, "sum": sum(parts.values()), "measured": measured}.items()
    }


def table(
    network: str, dtype: str, rates: tuple[float, float], rows: dict[int, dict[str, float]]
) -> str:
    """Markdown."""
    names = list(next(iter(rows.values())))
    head = f"{network}, {dtype}: {rates[0] / 1e12:.3g} TFLOP/s of matrix products, {rates[1] / 1e9:.3g} GB/s"
    lines = [
        f"{head}\n",
        f"| batch | {', ms | '.join(names)}, ms | images/s | of the matrix rate |",
    ]
    lines.append("|---" * (len(names) + 3) + "|")
    for batch, row in rows.items():
        cells = " | ".join(f"{row[name]:.3g}" for name in names)
        rate = batch / row["measured"] * 1e3
        lines.append(f"| {batch} | {cells} | {rate:,.0f} | {row['matrix'] / row['measured']:.0%} |")
    return "\n".join(lines)


def main(network: str, batches: list[int], dtype: str) -> str:
    """The table."""
    rates = matrix_rate(dtype), bandwidth()
    return table(
        network, dtype, rates, {batch: measure(network, batch, dtype, rates) for batch in batches}
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network")
    parser.add_argument("batches", nargs="+", type=int, metavar="BATCH")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    configure_jax()
    print(main(**vars(options)))
