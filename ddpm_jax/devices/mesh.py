"""The mesh of devices that a programme runs on, and where arrays lie on it."""

import math
import os
import shutil

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ddpm_jax.errors import UserError

SMALL = 2**16
"""Arrays of fewer elements are not worth dividing."""


def make_mesh(num_devices: int | None = None, fsdp: int = 1) -> Mesh:
    """A mesh with the axes `data` and `fsdp` over the first `num_devices` devices, None for all of all processes.

    Raises UserError if there are not so many, or `fsdp` does not divide them.
    """
    devices = jax.devices()
    if num_devices is not None and num_devices != len(devices) and jax.process_count() > 1:
        raise UserError(
            f"parallel.devices: {num_devices} asked for, and with several processes all are used; omit it"
        )
    if num_devices is not None and num_devices > len(devices):
        raise UserError(
            f"parallel.devices: {num_devices} asked for, {len(devices)} here ({devices[0].platform})"
        )
    devices = devices[:num_devices]
    if len(devices) % fsdp:
        raise UserError(f"parallel.fsdp: {fsdp} does not divide the {len(devices)} devices")
    shape = (len(devices) // fsdp, fsdp)
    return jax.make_mesh(shape, ("data", "fsdp"), devices=devices, axis_types=(AxisType.Auto,) * 2)


def fsdp_spec(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """How an array of `shape` is divided over the axis `fsdp` of so many devices: along its largest divisible axis.

    Whole on every device where it has fewer than SMALL elements or no axis divides.
    """
    axes = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or math.prod(shape) < SMALL or not axes:
        return PartitionSpec()
    largest = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*(None,) * largest, "fsdp")


def state_shardings(tree, mesh: Mesh):
    """Where the leaves of `tree` (arrays or the like) lie: each by `fsdp_spec`."""
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, fsdp_spec(leaf.shape, mesh.shape["fsdp"])), tree
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis divided over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def mesh_of(tree) -> Mesh | None:
    """The mesh that the arrays of `tree` lie on, or None where they are on one device or on the host."""
    sharding = getattr(jax.tree.leaves(tree)[0], "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 else None


def place(batch, mesh: Mesh | None):
    """`batch`, which every process has whole, divided over the devices of `mesh`; as it is where that is None."""
    return batch if mesh is None else _put(batch, batch_sharding(mesh))


def replicate(tree, mesh: Mesh):
    """`tree`, divided over `mesh` or whole in every process, copied to each device of `mesh`."""
    return jax.tree.map(lambda leaf: _put(leaf, replicated(mesh)), tree)


def _put(array, sharding):
    if sharding.is_fully_addressable or (
        isinstance(array, jax.Array) and not array.is_fully_addressable
    ):
        return jax.device_put(array, sharding)
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(
            _put(jax.random.key_data(array), sharding), impl=jax.random.key_impl(array)
        )
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this process's devices hold [R], ascending."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.sort(np.concatenate([np.arange(batch_size)[rows] for rows in slices]))


def place_rows(rows: np.ndarray, mesh: Mesh, batch_size: int):
    """The global batch [batch_size, ...] of which this process has read its `local_rows`."""
    sharding = batch_sharding(mesh)
    if sharding.is_fully_addressable:
        return jax.device_put(rows, sharding)
    return jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))


def on_mesh(tree, mesh: Mesh):
    """Arrays that each device of this process has a copy of, as arrays of `mesh`; nothing is moved."""

    def relabel(leaf):
        copies = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, replicated(mesh), copies)

    return jax.tree.map(relabel, tree)


def fetch(tree):
    """The arrays of `tree` as NumPy, whole in every process wherever they lie."""
    leaf = jax.tree.leaves(tree)[0]
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        tree = jax.jit(lambda tree: tree, out_shardings=replicated(leaf.sharding.mesh))(tree)
    return jax.tree.map(np.asarray, tree)


def device_advice() -> str | None:
    """One line for a machine whose NVIDIA GPU this jax cannot use, else None."""
    if jax.default_backend() != "cpu" or os.environ.get("JAX_PLATFORMS"):
        return None
    if not (os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi")):
        return None
    return (
        "this machine has an NVIDIA GPU but jax runs on the CPU: "
        "pip install 'ddpm-jax[cuda12]' (or cuda13), or set JAX_PLATFORMS=cpu to stay"
    )


def describe_devices(mesh: Mesh) -> str:
    """For example "2 x cpu", or "32 x TPU v4, fsdp 8, 4 processes"."""
    words = [f"{mesh.size} x {np.asarray(mesh.devices).flat[0].device_kind}"]
    if mesh.shape["fsdp"] > 1:
        words.append(f"fsdp {mesh.shape['fsdp']}")
    if jax.process_count() > 1:
        words.append(f"{jax.process_count()} processes")
    return ", ".join(words)
