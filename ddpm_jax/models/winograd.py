"""3x3 convolutions with 2.25 times fewer multiplications, for CPUs.

Winograd's minimal filtering F(2x2, 3x3) (Lavin & Gray 2016, "Fast Algorithms for Convolutional
Neural Networks", Section 4.1): a tile of 2x2 outputs from 4x4 inputs takes 16 multiplications for
each pair of channels, in place of 36. The kernel g becomes G g G^T, once for a whole chain, and a
tile d of the input B^T d B. The tile of the output is A^T [(G g G^T) * (B^T d B)] A; the product,
summed over the channels, is a product of matrices for each of the 16 places.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.shapes import Array, Float, PyTree

LEAST_CHANNELS = 128
"""With fewer, the sums of the transforms cost more than the multiplications that are saved."""


def is_worthwhile(kernel_shape: tuple[int, ...]) -> bool:
    """Whether a convolution with a kernel of that shape [3,3,C_in,C_out] is faster so.

    The rule knows neither the batch nor the machine, so that an image is the same in any batch.
    """
    return len(kernel_shape) == 4 and min(kernel_shape[2:]) >= LEAST_CHANNELS


def tile_kernels(params: PyTree) -> PyTree:
    """The transformed kernels of the convolutions in `params` that are faster so.

    They stand in a tree like `params`, as Affine looks for them. Downsampling has stride 2.
    """
    tiles: dict[str, Any] = {}
    for name, child in params.items():
        if name == "kernel":
            if is_worthwhile(child.shape):
                tiles[name] = transformed_kernel(child)
        elif isinstance(child, dict) and not name.endswith("downsample"):
            of_child = tile_kernels(child)
            if of_child:
                tiles[name] = of_child
    return tiles


@jax.jit
def transformed_kernel(kernel: Float[Array, "3 3 c d"]) -> Float[jax.Array, "16 c d"]:
    """G g G^T of every pair of channels."""
    rows = [_kernel_transform(row) for row in _kernel_transform(kernel)]
    return jnp.stack([part for row in rows for part in row])


def convolution(
    x: Float[Array, "b h w c"], kernel: Float[Array, "16 c d"]
) -> Float[jax.Array, "b h w d"]:
    """The 3x3 convolution of x with a `transformed_kernel`, stride 1 and SAME padding."""
    B, H, W, C = x.shape
    rows = -(-H // 2)
    columns = -(-W // 2)
    x = jnp.pad(x, ((0, 0), (1, 1 + H % 2), (1, 1 + W % 2), (0, 0)))
    # tile[i][j] holds the inputs in row i and column j of all tiles.
    tile = [
        [x[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2] for j in range(4)]
        for i in range(4)
    ]
    tile = [_input_transform(row) for row in zip(*map(_input_transform, tile), strict=True)]
    stacked = jnp.stack([part for column in zip(*tile, strict=True) for part in column])
    product = jnp.einsum("tpc,tcd->tpd", stacked.reshape(16, B * rows * columns, C), kernel)
    product = product.reshape(4, 4, B, rows, columns, kernel.shape[-1])
    halves = [_output_transform(row) for row in product]
    quarters = [_output_transform(column) for column in zip(*halves, strict=True)]
    # quarters[j][i] holds the outputs in row i and column j of all tiles.
    y = jnp.stack([jnp.stack(column, axis=2) for column in quarters], axis=4)
    return y.reshape(B, 2 * rows, 2 * columns, kernel.shape[-1])[:, :H, :W]


def _kernel_transform(g):
    """G g."""
    ends = (g[0] + g[2]) / 2
    middle = g[1] / 2
    return [g[0], ends + middle, ends - middle, g[2]]


def _input_transform(d):
    """B^T d."""
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _output_transform(m):
    """A^T m."""
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]
