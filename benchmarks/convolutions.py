"""The rates of 3x3 convolutions and of their gradients on a CPU, beside PyTorch's.

    .venv-benchmark/bin/python benchmarks/convolutions.py [--rounds 9]

Prints GFLOP/s, counting a multiplication and an addition as two, for the shapes that the shipped
networks have. The two sides take turns. `scripts/benchmark.sh` makes .venv-benchmark.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import rounds
import torch

from ddpm_jax import configure_jax

SHAPES = [
    (16, 32, 32, 32),
    (16, 16, 64, 64),
    (16, 16, 256, 256),
    (64, 32, 32, 32),
    (64, 16, 64, 64),
    (64, 16, 128, 64),
]
"""Images, height and width, channels in and out."""

KINDS = ["forward", "gradient of the images", "gradient of the kernel"]


def convolution(x, kernel):
    """x [B,H,W,C], kernel [3,3,C,D]; [B,H,W,D]."""
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)


def ours(x, kernel, gradient) -> dict:
    """A call for each of KINDS."""
    of_images = jax.jit(lambda x, k, g: jax.vjp(lambda x: convolution(x, k), x)[1](g))
    of_kernel = jax.jit(lambda x, k, g: jax.vjp(lambda k: convolution(x, k), k)[1](g))
    forward = jax.jit(convolution)
    x, kernel, gradient = jnp.asarray(x), jnp.asarray(kernel), jnp.asarray(gradient)
    calls = [
        lambda: jax.block_until_ready(forward(x, kernel)),
        lambda: jax.block_until_ready(of_images(x, kernel, gradient)),
        lambda: jax.block_until_ready(of_kernel(x, kernel, gradient)),
    ]
    return dict(zip(KINDS, calls, strict=True))


def theirs(x, kernel, gradient) -> dict:
    """The same by PyTorch, in channels_last."""

    def tensor(array, order):
        turned = torch.from_numpy(array.transpose(order))
        return turned.contiguous(memory_format=torch.channels_last)

    x = tensor(x, (0, 3, 1, 2))
    kernel = tensor(kernel, (3, 2, 0, 1))
    gradient = tensor(gradient, (0, 3, 1, 2))

    def backward(wanted):
        # None: no bias. Then stride, padding, dilation, whether it is transposed, and groups.
        settings = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
        return torch.ops.aten.convolution_backward(gradient, x, kernel, None, *settings, wanted)

    calls = [
        lambda: torch.nn.functional.conv2d(x, kernel, padding=1),
        lambda: backward([True, False, False]),
        lambda: backward([False, True, False]),
    ]
    return dict(zip(KINDS, calls, strict=True))


def main(number: int) -> None:
    """Measures and prints each shape."""
    configure_jax()
    torch.set_grad_enabled(False)
    print(f"| images, pixels, channels | {' | '.join(KINDS)} |\n|---|---|---|---|")
    for count, side, before, after in SHAPES:
        random = np.random.default_rng(0)
        x = random.standard_normal((count, side, side, before), np.float32)
        kernel = random.standard_normal((3, 3, before, after), np.float32)
        gradient = random.standard_normal((count, side, side, after), np.float32)
        operations = 2 * 9 * count * side**2 * before * after
        mine = ours(x, kernel, gradient)
        other = theirs(x, kernel, gradient)
        cells = []
        for kind in KINDS:
            times = rounds.alternate({"ours": mine[kind], "theirs": other[kind]}, number)
            rates = [operations / times[name].median / 1e9 for name in ("ours", "theirs")]
            cells.append(f"{rates[0]:.0f} / {rates[1]:.0f}")
        shape = f"{count}, {side}x{side}, {before} to {after}"
        print(f"| {shape} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, dest="number")
    main(**vars(parser.parse_args()))
