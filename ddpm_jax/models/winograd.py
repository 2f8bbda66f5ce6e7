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

LEAST_PIXELS = 256
"""With fewer, one image takes longer to read the transformed kernels than to compute with them."""


def tile_kernels(params: PyTree, image_shape: tuple[int, int, int]) -> PyTree:
    """The transformed kernels of the convolutions that are faster so, of the U-Net's `params`.

    They stand in a tree like `params`, as Affine looks for them. Which these are follows from the
    shapes of image and kernel, and neither from the batch nor from the machine, so that an image is
    the same in any batch.
    """
    deepest = max(_level(name, 0) for name in params)
    tiles = {}
    for name, block in params.items():
        rows, columns = (side >> _level(name, deepest) for side in image_shape[:2])
        has_stride_1 = not name.endswith("downsample")
        if rows * columns >= LEAST_PIXELS and has_stride_1:
            tiles[name] = _tiles_of(block)
    return {name: block for name, block in tiles.items() if block}


def _level(name: str, of_middle: int) -> int:
    """The level at which a block of that name computes; 0 has the most pixels."""
    place, *rest = name.split("_")
    if place == "mid":
        return of_middle
    if place not in ("down", "up"):
        return 0
    return int(rest[0]) - (rest[1] == "upsample")


def _tiles_of(block: PyTree) -> PyTree:
    tiles: dict[str, Any] = {}
    for name, child in block.items():
        if name == "kernel":
            if len(child.shape) == 4 and min(child.shape[2:]) >= LEAST_CHANNELS:
                tiles[name] = transformed_kernel(child)
        elif isinstance(child, dict):
            tiles[name] = _tiles_of(child)
    return {name: child for name, child in tiles.items() if not isinstance(child, dict) or child}


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
