"""The time of a training step as predicted from a device's measured rates, and as measured.

    python benchmarks/roofline.py NETWORK BATCH ... [--dtype float32]

Matrix products and convolutions are taken at the rate of one large product. The reads and writes of
norms, attention, skip connections and the optimiser are taken at the bandwidth of one large array.
"sum" assumes that they run one after the other. A norm that kept its input on the chip would read
it only once.
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

# How often a training step reads and writes an array: (forward) + (backward), each reads + writes.
# Elementwise operations are assumed to be fused with the next operation. Operands and results of
# matrix products and convolutions are not counted.
NORM = (3 + 1) + (4 + 1)
"""The input of a norm.

Forward, it is read for the mean, the variance and the result, which is written. Backward, it and
the gradient are read once for the sums and once for the result, which is written.
"""
SKIP = (1 + 1) + (1 + 1)
"""The concatenation before a block on the way up; backward, its parts."""
RESIDUAL = (2 + 1) + (2 + 1)
"""The sum at the end of a block or of attention; backward, the two gradients."""
ADAM = 1 + 5 + 4
"""The float32 parameters.

The gradient is read for its norm. Then gradient, parameters, two moments and average are read, and
all but the gradient are written.
"""


def seconds_of(call, waits: bool = False) -> float:
    """Seconds per call: the median of five turns of ten calls.

    A call that `waits` for its own result is made once per turn.
    """
    jax.block_until_ready(call())
    times = []
    number = 1 if waits else 10
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(number):
            result = call()
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / number)
    return float(np.median(times))


def matrix_rate(dtype: str) -> float:
    """FLOP/s of a product of square random matrices."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    a, b = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in range(2))
    product = jax.jit(jnp.matmul)
    return 2 * n**3 / seconds_of(lambda: product(a, b))


def bandwidth() -> float:
    """Bytes/s, reads and writes together."""
    x = jnp.ones(2**26 if jax.default_backend() == "cpu" else 2**29)
    add = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / seconds_of(lambda: add(x))


def traffic(ddpm: DDPM, batch: int, itemsize: int) -> dict[str, float]:
    """Bytes that a training step reads and writes, {part: bytes}.

    Matrix products and convolutions are not counted.
    """
    params = jax.eval_shape(lambda: ddpm.init(jax.random.key(0)))
    x = jnp.zeros((batch, *ddpm.image_shape))
    t = jnp.zeros(batch, jnp.int32)
    found = {"norms": 0.0, "attention": 0.0, "skips and sums": 0.0}
    norms = []

    def look(next_fun, args, kwargs, context):
        module = context.module if context.method_name == "__call__" else None
        result = next_fun(*args, **kwargs)
        if isinstance(module, GroupNorm):
            norms.append(module)
            found["norms"] += NORM * args[0].size * itemsize
        elif isinstance(module, Attention | ResBlock):
            found["skips and sums"] += RESIDUAL * result.size * itemsize
        if isinstance(module, Attention):
            # In float32: logits written and read, their gradient read. In the network's dtype:
            # probabilities written and read, the gradient of the logits written.
            pixels = math.prod(args[0].shape[1:3])
            found["attention"] += (3 * 4 + 3 * itemsize) * batch * pixels**2
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
    """Milliseconds of each part at `rates` (FLOP/s, bytes/s), of their sum, and as measured."""
    config = ours.with_dtype(load_config(network), dtype)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=batch))
    ddpm = DDPM(config)
    flops = step_flops(ddpm, jax.eval_shape(lambda: init_state(ddpm)))
    seconds = {"matrix": flops / rates[0]}
    for name, size in traffic(ddpm, batch, 2 if dtype == "bfloat16" else 4).items():
        seconds[name] = size / rates[1]
    seconds["sum"] = sum(seconds.values())
    images = np.random.default_rng(0).integers(0, 256, (batch, *ddpm.image_shape), dtype=np.uint8)
    step = ours.training(config, ours.parameters(config), images)
    seconds["measured"] = seconds_of(step, waits=True)
    return {name: 1e3 * value for name, value in seconds.items()}


def table(
    network: str, dtype: str, rates: tuple[float, float], rows: dict[int, dict[str, float]]
) -> str:
    """A Markdown table with a row per batch size."""
    names = list(next(iter(rows.values())))
    lines = [
        f"{network}, {dtype}: {rates[0] / 1e12:.3g} TFLOP/s of matrix products, "
        f"{rates[1] / 1e9:.3g} GB/s\n",
        f"| batch | {', ms | '.join(names)}, ms | images/s | of the matrix rate |",
    ]
    lines.append("|---" * (len(names) + 3) + "|")
    for batch, row in rows.items():
        cells = " | ".join(f"{row[name]:.3g}" for name in names)
        rate = batch / row["measured"] * 1e3
        lines.append(f"| {batch} | {cells} | {rate:,.0f} | {row['matrix'] / row['measured']:.0%} |")
    return "\n".join(lines)


def main(network: str, batches: list[int], dtype: str) -> str:
    """Measures every batch size; returns the table."""
    rates = (matrix_rate(dtype), bandwidth())
    rows = {batch: measure(network, batch, dtype, rates) for batch in batches}
    return table(network, dtype, rates, rows)


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
