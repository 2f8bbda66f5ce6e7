"""Types of arrays: their shapes and dtypes in a signature, as `Float[Array, "b h w c"]`.

Dimensions that bear the same name in a signature are equal; "..." stands for any number of them.
The usual names: b examples, h rows and w columns of an image, c its channels, T steps of a chain.
The tests check the annotations of the mathematics and of the networks at every call.
"""

import jax
import numpy as np
from jaxtyping import (
    Bool,
    Float,
    Float32,
    Float64,
    Int,
    Int32,
    Integer,
    Key,
    PyTree,
    Shaped,
    UInt8,
    UInt32,
)

__all__ = [
    "AnyKey",
    "AnyKeys",
    "Array",
    "Bool",
    "Float",
    "Float32",
    "Float64",
    "Int",
    "Int32",
    "Integer",
    "PyTree",
    "Shaped",
    "UInt8",
]

Array = jax.Array | np.ndarray
"""An array of either library. What jax computes is a `jax.Array`."""

AnyKey = Key[jax.Array, ""] | UInt32[jax.Array, "2"]
"""A key of jax.random, typed or of the old style."""

AnyKeys = Key[jax.Array, " b"] | UInt32[jax.Array, "b 2"]
"""A key for each example, likewise."""
