"""Checks of what users pass to a model from Python: each gives one line with the remedy."""

import operator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType

from ddpm_jax.data.images import warn_of_range
from ddpm_jax.devices.mesh import mesh_of, with_auto_axes
from ddpm_jax.errors import UserError
from ddpm_jax.keys import MAKE_KEY
from ddpm_jax.shapes import AnyKey, AnyKeys, Array, PyTree


def check_count(name: str, value: Any) -> int:
    """`value` as an int: a whole number of any integer type, 0-dimensional arrays included.

    Raises UserError for anything else; True is no number.
    """
    if isinstance(value, jax.core.Tracer):
        raise UserError(
            f"{name}: must be a number, got one that jax.jit traces; pass it from outside jax.jit"
        )
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        return operator.index(value)
    except TypeError:
        kind = type(value).__name__
        raise UserError(f"{name}: must be a whole number, got {value!r} ({kind})") from None


def check_concrete(call: str, **values: PyTree) -> None:
    """Raises UserError if one of `values` is traced by jax.jit, jax.grad or jax.vmap.

    `call` returns images in the host's memory, which such a function cannot hold.
    """
    for name, value in values.items():
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value)):
            raise UserError(
                f"{name}: {call} returns arrays in the host's memory and compiles its program "
                "itself; call it outside jax.jit, jax.grad and jax.vmap"
            )


def checked_images(name: str, x: Any, image_shape: tuple[int, ...]) -> Any:
    """x, a batch [B,H,W,C] of images of `image_shape` (H, W, C), as float32.

    Warns of images x_0 whose range is [0, 1]. Raises UserError for other shapes, and TypeError
    unless x is an array of floats.
    """
    if not isinstance(x, Array):
        raise TypeError(f"{name}: must be an array of jax or NumPy, got {type(x).__name__}")
    if not jax.numpy.issubdtype(x.dtype, np.floating):
        raise TypeError(f"{name}: must be floats in [-1, 1], got {x.dtype}; use x / 127.5 - 1")
    if x.ndim == 4 and x.shape[1:] == image_shape:
        if name in ("x_0", "images"):
            warn_of_range(x, name)
        return x.astype(np.float32)
    H, W, C = image_shape
    remedy = "pass images of the model's data.image_shape"
    if x.shape == image_shape:
        remedy = f"pass {name}[None]"
    elif x.ndim == 4 and x.shape[1:] == (C, H, W):
        remedy = f"pass {name}.transpose(0, 2, 3, 1)"
    raise UserError(f"{name}: must be [B, {H}, {W}, {C}], got {list(x.shape)}; {remedy}")


def check_numbers(name: str, numbers: Any, n: int) -> None:
    """Raises UserError unless `numbers` are `n` whole numbers, one for each image of a batch."""
    if not isinstance(numbers, Array) or not jax.numpy.issubdtype(numbers.dtype, np.integer):
        kind = getattr(numbers, "dtype", type(numbers).__name__)
        raise UserError(f"{name}: must be an array of {n} integers, got {kind}")
    if numbers.shape != (n,):
        raise UserError(f"{name}: must be [{n}], one per image, got {list(numbers.shape)}")


def checked_params(params: PyTree, expected: PyTree) -> PyTree:
    """`params` as the network takes them, on whatever mesh of the user's they are.

    Raises UserError if they have not the arrays and shapes of the tree `expected`.
    """
    _check_shapes(params, expected)
    leaves = jax.tree.leaves(params)
    divided = any(
        isinstance(leaf, jax.core.Tracer) and any(jax.typeof(leaf).sharding.spec) for leaf in leaves
    )
    inside = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
    if divided or (inside and mesh_of(params)):
        raise UserError(
            "params: inside jax.set_mesh and jax.jit they cannot be on a mesh with axes of the "
            "type Explicit; make it with "
            "jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto, ...))"
        )
    return with_auto_axes(params)


def _check_shapes(params: PyTree, expected: PyTree) -> None:
    leaves, tree = jax.tree.flatten(params)
    expected_leaves, expected_tree = jax.tree.flatten(expected)
    # The names take most of the time, and only other models need them.
    same = tree == expected_tree  # type: ignore[operator]
    if same and all(
        np.shape(leaf) == like.shape for leaf, like in zip(leaves, expected_leaves, strict=True)
    ):
        return
    given = _shapes(params)
    wanted = _shapes(expected)
    if given == wanted:
        return
    missing = next((name for name in wanted if given.get(name) != wanted[name]), None)
    remedy = "pass the params that ddpm_jax.load returned with this model, or of its init"
    if missing is None:
        extra = next(name for name in given if name not in wanted)
        raise UserError(f"params: of another model, which has {extra} too; {remedy}")
    found = f"has the shape {list(given[missing])}" if missing in given else "is missing"
    raise UserError(
        f"params: of another model: {missing}, of shape {list(wanted[missing])} here, {found}; "
        f"{remedy}"
    )


def check_key(rng: Any) -> None:
    """Raises UserError unless `rng` is one threefry key, and says how to make one."""
    _check_keys("rng", rng, ())


def check_keys(keys: Any, n: int) -> None:
    """Raises UserError unless `keys` are `n` threefry keys."""
    _check_keys("keys", keys, (n,))


def _check_keys(name: str, keys: AnyKey | AnyKeys, shape: tuple[int, ...]) -> None:
    wanted = f"{shape[0]} threefry keys" if shape else "a threefry key"
    make = f"jax.random.split({MAKE_KEY}, {shape[0]})" if shape else MAKE_KEY
    if not isinstance(keys, Array):
        raise UserError(f"{name}: must be {wanted}, got {keys!r}; use {make}")
    found = keys.shape
    if jax.dtypes.issubdtype(keys.dtype, jax.dtypes.prng_key):
        implementation = str(jax.random.key_impl(keys))
        if "threefry" not in implementation:
            raise UserError(f"{name}: must be {wanted}, got {implementation}; use {make}")
    else:
        # Keys of the old style: two numbers each, of the kind that is jax's default.
        if keys.dtype != np.uint32 or keys.shape[-1:] != (2,):
            raise UserError(
                f"{name}: must be {wanted}, got {keys.dtype} {list(keys.shape)}; use {make}"
            )
        if "threefry" not in str(jax.config.jax_default_prng_impl):  # type: ignore[attr-defined]
            raise UserError(
                f"{name}: two numbers are no key where jax_default_prng_impl is "
                f"{jax.config.jax_default_prng_impl}; "  # type: ignore[attr-defined]
                f'use jax.random.wrap_key_data({name}, impl="threefry2x32")'
            )
        found = keys.shape[:-1]
    if found != shape:
        remedy = "pass one of them" if not shape else f"use {make}"
        raise UserError(f"{name}: must be {wanted}, got keys of shape {list(found)}; {remedy}")


def _shapes(params: PyTree) -> dict[str, tuple[int, ...]]:
    """{"conv_in/kernel": its shape} of a tree."""
    leaves, _ = jax.tree.flatten_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(np.shape(leaf))
        for path, leaf in leaves
    }
