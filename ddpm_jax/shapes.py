"""Types of arrays: their shapes and dtypes in a signature, as `Float[Array, "b h w c"]`.

Dimensions that bear the same name in a signature are equal; "..." stands for any number of them.
The usual names: b examples, h rows and w columns of an image, c its channels, T steps of a chain.
The tests check the annotations of the mathematics and of the networks at every call.
"""

import jax
import numpy as np
from jaxtyping import Float, Float32, Float64, Int, Int32, Integer, Key, UInt8

__all__ = ["Array", "Float", "Float32", "Float64", "Int", "Int32", "Integer", "Key", "UInt8"]

Array = jax.Array | np.ndarray
"""An array of either library. What jax computes is a `jax.Array`."""
