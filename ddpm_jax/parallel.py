"""The mesh of devices that a programme runs on, and where arrays lie on it."""

import os
import shutil

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ddpm_jax.errors import UserError


def make_mesh(num_devices: int | None = None) -> Mesh:
    """A mesh with the axis `data` over the first `num_devices` local devices, None for all of them.

    Raises UserError if there are not so many.
    """
    devices = jax.local_devices()
    if num_devices is not None and num_devices > len(devices):
        raise UserError(f"parallel.devices: {num_devices} asked for, {len(devices)} here ({devices[0].platform})")
    devices = devices[:num_devices]
    return jax.make_mesh((len(devices),), ("data",), devices=devices, axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis divided over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def mesh_of(tree) -> Mesh | None:
    """The mesh that the arrays of `tree` lie on, or None where they are on one device or on the host."""
    sharding = getattr(jax.tree.leaves(tree)[0], "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 else None


def place(batch, mesh: Mesh | None):
    """`batch` divided over the devices of `mesh`; as it is where that is None."""
    return batch if mesh is None else jax.device_put(batch, batch_sharding(mesh))


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
    """For example "2 x cpu"."""
    return f"{mesh.size} x {np.asarray(mesh.devices).flat[0].device_kind}"
