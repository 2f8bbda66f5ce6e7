"""The FLOPs of a training step and the peak rates of devices, for model FLOPs utilisation."""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.sharding import Mesh, Sharding

from ddpm_jax.config import Config
from ddpm_jax.data import Batch
from ddpm_jax.ddpm import DDPM
from ddpm_jax.shapes import PyTree
from ddpm_jax.training.update import train_step

# Dense peak FLOP/s of one jax device: (with float32 networks, with bfloat16 networks).
# NVIDIA: data sheets of the SXM boards; float32 is in TF32, jax's default there.
# TPU: Google Cloud's documentation; TPUs multiply in bfloat16 either way. A device of v2 and v3 is
# a core, half a chip.
PEAKS = {
    "NVIDIA A100-SXM4-40GB": (156e12, 312e12),
    "NVIDIA A100-SXM4-80GB": (156e12, 312e12),
    "NVIDIA H100 80GB HBM3": (494.7e12, 989.4e12),
    "NVIDIA H200": (494.7e12, 989.4e12),
    "TPU v2": (22.5e12, 22.5e12),
    "TPU v3": (61.5e12, 61.5e12),
    "TPU v4": (275e12, 275e12),
    "TPU v5 lite": (197e12, 197e12),
    "TPU v5": (459e12, 459e12),  # v5p
    "TPU v6 lite": (918e12, 918e12),
}


def peak_of(device_kind: str, dtype: str) -> float | None:
    """Peak FLOP/s of one device with networks of `dtype`, float32 or bfloat16; None if unknown."""
    if device_kind not in PEAKS:
        return None
    in_float32, in_bfloat16 = PEAKS[device_kind]
    return in_bfloat16 if dtype == "bfloat16" else in_float32


def model_flops_rate(ddpm: DDPM, state: PyTree, mesh: Mesh) -> float | None:
    """Updates per second if the devices of `mesh` ran at their peak, None if the peak is unknown.

    A run's updates per second divided by this are its model FLOPs utilisation (Chowdhery et al.
    2022, Appendix B). Work that `model.remat` repeats counts once.
    """
    peak = peak_of(mesh.devices.flat[0].device_kind, ddpm.config.model.dtype)
    if peak is None:
        return None
    model = dataclasses.replace(ddpm.config.model, remat=())
    return mesh.size * peak / step_flops(DDPM(dataclasses.replace(ddpm.config, model=model)), state)


def step_flops(ddpm: DDPM, state: PyTree) -> int:
    """FLOPs of one update on all devices together, as `count_flops` counts them.

    `state` holds arrays or only their shapes.
    """
    batch = batch_shapes(ddpm.config)
    return count_flops(jax.make_jaxpr(functools.partial(train_step, ddpm))(state, batch).jaxpr)


def batch_shapes(config: Config, sharding: Sharding | None = None) -> Batch:
    """The shapes of a batch of `config`; it has labels where the model has classes."""
    n = config.train.batch_size
    images = jax.ShapeDtypeStruct((n, *config.data.image_shape), jnp.uint8, sharding=sharding)
    if not config.model.num_classes:
        return Batch(images)
    return Batch(images, jax.ShapeDtypeStruct((n,), jnp.int32, sharding=sharding))


def count_flops(jaxpr: Jaxpr) -> int:
    """FLOPs of all matrix products and convolutions of `jaxpr`; a multiply-add counts as two.

    Elementwise work is left out. Kernel taps on padding count. Taps on the zeros that the gradient
    of a strided convolution inserts between rows do not. The body of a scan counts once per
    iteration, a cond as its most expensive branch. Raises ValueError for a while loop that contains
    such work, because the number of its iterations is unknown.
    """
    return sum(_flops(eqn) for eqn in jaxpr.eqns)


def _flops(eqn) -> int:
    name = eqn.primitive.name
    params = eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        terms = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        return 2 * eqn.outvars[0].aval.size * terms
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval
        taps = kernel.size // kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2 * eqn.outvars[0].aval.size * taps // math.prod(params["lhs_dilation"])
    inner = [count_flops(jaxpr) for jaxpr in inner_jaxprs(eqn)]
    if name == "while" and any(inner):
        raise ValueError(
            "while: FLOPs cannot be counted, the number of iterations is unknown; use lax.scan"
        )
    if name == "cond":
        return max(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def inner_jaxprs(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """The programs within an operation: the body of a scan, the branches of a cond."""
    return _jaxprs(list(eqn.params.values()))


def _jaxprs(values):
    """Yields the jaxprs among an equation's parameters."""
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, list | tuple):
            yield from _jaxprs(value)
