"""The mesh of devices that a program runs on, and how arrays are placed on it."""

import math
import os
import shutil
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ddpm_jax.config.choices import Mode
from ddpm_jax.errors import UserError
from ddpm_jax.shapes import PyTree

SMALL = 2**16
"""Arrays with fewer elements are not divided, since that gains too little."""


DEVICE_SETTINGS = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_NUM_CPU_DEVICES")
"""The environment variables that choose jax's devices."""


def all_devices() -> list[jax.Device]:
    """The devices of all processes; starts them.

    Raises UserError if there are none of the kind that the environment asks for.
    """
    try:
        return jax.devices()
    # The second is raised for JAX_PLATFORMS=cuda without a GPU.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0].partition(" (")[0] or "no such device"
        asked = [f"{name}={os.environ[name]}" for name in DEVICE_SETTINGS if name in os.environ]
        named = " ".join(asked)
        wants_gpu = any(name in named for name in ("cuda", "gpu"))
        remedy = "; for an NVIDIA GPU pip install 'ddpm-jax[cuda12]' (or cuda13)"
        raise UserError(
            f"{named or 'jax'}: no device can be used here ({reason.rstrip('.')}); correct or "
            f"unset it, or set JAX_PLATFORMS=cpu{remedy if wants_gpu else ''}"
        ) from error


def make_mesh(num_devices: int | None = None, fsdp: int = 1, mode: Mode = "jit") -> Mesh:
    """A mesh with the axes `data` and `fsdp` over the first `num_devices` devices.

    None means all devices of all processes. Its order suits the network between the devices;
    in the `mode` pmap, each process's devices come one after the other. Raises UserError if there
    are too few devices or `fsdp` does not divide their number.
    """
    devices = all_devices()
    if num_devices is not None and num_devices != len(devices) and jax.process_count() > 1:
        raise UserError(
            f"parallel.devices: {num_devices} requested, but several processes always use "
            f"all {len(devices)} devices; leave it out"
        )
    if num_devices is not None and num_devices > len(devices):
        raise UserError(
            f"parallel.devices: {num_devices} requested, but this machine has {len(devices)} "
            f"({devices[0].platform}); lower it or leave it out"
        )
    devices = devices[:num_devices]
    if len(devices) % fsdp:
        raise UserError(
            f"parallel.fsdp: {fsdp} does not divide the {len(devices)} devices; choose a divisor"
        )
    return mesh_over(devices, fsdp, mode)


def mesh_over(devices: Sequence[jax.Device], fsdp: int, mode: Mode) -> Mesh:
    """As `make_mesh`, over all of `devices`, a multiple of `fsdp`."""
    shape = (len(devices) // fsdp, fsdp)
    types = (AxisType.Auto,) * 2
    mesh = jax.make_mesh(shape, ("data", "fsdp"), devices=devices, axis_types=types)
    if mode == "jit":
        return mesh
    # On a slice of TPUs a ring through all chips leaves a host and comes back to it. Each process
    # hands pmap the rows of its own devices, which must be next to each other.
    by_process = sorted(mesh.devices.flat, key=lambda device: device.process_index)
    return Mesh(np.array(by_process).reshape(shape), mesh.axis_names, axis_types=types)


def fsdp_spec(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """How an array of `shape` is divided over the mesh axis `fsdp`, which has `fsdp` devices.

    It is divided along its largest axis that `fsdp` divides. Each device has the whole array if
    there is no such axis or the array has fewer than SMALL elements.
    """
    axes = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or math.prod(shape) < SMALL or not axes:
        return PartitionSpec()
    largest = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*(None,) * largest, "fsdp")


def state_shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """The sharding of each leaf of `tree`, by `fsdp_spec`. Leaves are arrays or have a `shape`."""

    def sharding_of(leaf):
        return NamedSharding(mesh, fsdp_spec(leaf.shape, mesh.shape["fsdp"]))

    return jax.tree.map(sharding_of, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis divided over all devices, whatever the mesh's axes are called."""
    return NamedSharding(mesh, PartitionSpec(tuple(mesh.axis_names)))


def mesh_of(tree: PyTree) -> Mesh | None:
    """The mesh that the arrays of `tree` are on, or None if they are on one device or the host."""
    sharding = getattr(jax.tree.leaves(tree)[0], "sharding", None)
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return None
    return sharding.mesh if sharding.mesh.size > 1 else None


def with_auto_axes(tree: PyTree) -> PyTree:
    """`tree`, with its arrays on meshes whose axes jax shares out by itself (AxisType.Auto).

    No data is moved. `jax.make_mesh` makes axes of another type by default, with which the network
    would have to say how each of its results is divided.
    """

    def relabel(leaf):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(leaf, jax.core.Tracer) or not isinstance(sharding, NamedSharding):
            return leaf
        mesh = sharding.mesh
        if not isinstance(mesh, Mesh) or set(mesh.axis_types) == {AxisType.Auto}:
            return leaf
        axes = (AxisType.Auto,) * len(mesh.axis_names)
        auto = Mesh(mesh.devices, mesh.axis_names, axis_types=axes)
        return jax.device_put(leaf, NamedSharding(auto, sharding.spec))

    return jax.tree.map(relabel, tree)


def place(batch: PyTree, mesh: Mesh | None) -> PyTree:
    """`batch`, divided over the devices of `mesh`, or unchanged if that is None.

    Every process must have the whole batch.
    """
    return batch if mesh is None else _put(batch, batch_sharding(mesh))


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """`tree`, copied whole to each device of `mesh`.

    It must be divided over `mesh`, or whole in every process.
    """
    return jax.tree.map(lambda leaf: _put(leaf, replicated(mesh)), tree)


def _put(array, sharding):
    """`array`, placed by `sharding`, which may span several processes."""
    is_global = isinstance(array, jax.Array) and not array.is_fully_addressable
    if is_global or sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(array), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows [R] of a global batch that this process's devices hold, in ascending order."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.sort(np.concatenate([np.arange(batch_size)[rows] for rows in slices]))


def place_rows(rows: np.ndarray, mesh: Mesh, batch_size: int) -> jax.Array:
    """The global batch [batch_size, ...], from `rows`, the `local_rows` that this process read."""
    sharding = batch_sharding(mesh)
    if sharding.is_fully_addressable:
        return jax.device_put(rows, sharding)
    return jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))


def on_mesh(tree: PyTree, mesh: Mesh) -> PyTree:
    """`tree`, whose arrays each device of this process has a copy of, as arrays on `mesh`.

    No data is moved.
    """

    def relabel(leaf):
        copies = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, replicated(mesh), copies)

    return jax.tree.map(relabel, tree)


def fetch(tree: PyTree) -> PyTree:
    """The arrays of `tree`, wherever they are, as whole NumPy arrays in every process."""
    leaf = jax.tree.leaves(tree)[0]
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        # Arrays of several processes lie on a mesh.
        mesh = leaf.sharding.mesh  # type: ignore[attr-defined]
        tree = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(np.asarray, tree)


def device_advice() -> str | None:
    """One line of advice if this machine has an NVIDIA GPU that jax cannot use, else None."""
    if all_devices()[0].platform != "cpu" or os.environ.get("JAX_PLATFORMS"):
        return None
    if not (os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi")):
        return None
    return (
        "this machine has an NVIDIA GPU, but jax runs on the CPU: "
        "pip install 'ddpm-jax[cuda12]' (or cuda13), or set JAX_PLATFORMS=cpu to stay on the CPU"
    )


def describe_devices(mesh: Mesh) -> str:
    """For example "2 x cpu", or "32 x TPU v4, fsdp 8, 4 processes"."""
    words = [f"{mesh.size} x {np.asarray(mesh.devices).flat[0].device_kind}"]
    if mesh.shape["fsdp"] > 1:
        words.append(f"fsdp {mesh.shape['fsdp']}")
    if jax.process_count() > 1:
        words.append(f"{jax.process_count()} processes")
    return ", ".join(words)
