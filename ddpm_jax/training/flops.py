"""What a step computes, and what devices could: model FLOPs utilisation."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import Mesh

from ddpm_jax.data import Batch
from ddpm_jax.ddpm import DDPM
from ddpm_jax.training.update import train_step

# Peak FLOP/s of one device of jax, dense, with float32 and bfloat16 networks: NVIDIA's data sheets (the SXM boards,
# float32 in TF32, jax's default there) and Google Cloud's documentation (whose TPUs multiply in bfloat16 either way;
# a device of v2 and v3 is a core, half a chip).
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
    """FLOP/s that one device can reach with a network of `dtype` (float32 or bfloat16), or None if not known."""
    peaks = PEAKS.get(device_kind)
    return peaks and peaks[dtype == "bfloat16"]


def model_flops_rate(ddpm: DDPM, state, mesh: Mesh) -> float | None:
    """The updates a second that would take all that the devices of `mesh` can compute, or None if that is not known.

    A run's own rate by this is its model FLOPs utilisation (Chowdhery et al. 2022, Appendix B): what `model.remat`
    has computed twice counts once.
    """
    peak = peak_of(mesh.devices.flat[0].device_kind, ddpm.config.model.dtype)
    if peak is None:
        return None
    model = dataclasses.replace(ddpm.config.model, remat=())
    return mesh.size * peak / step_flops(DDPM(dataclasses.replace(ddpm.config, model=model)), state)


def step_flops(ddpm: DDPM, state) -> int:
    """Of one update of `state`, arrays or their shapes, on all devices together: see `count_flops`."""
    images = jax.ShapeDtypeStruct((ddpm.config.train.batch_size, *ddpm.image_shape), jnp.uint8)
    return count_flops(
        jax.make_jaxpr(functools.partial(train_step, ddpm))(state, Batch(images)).jaxpr
    )


def count_flops(jaxpr: Jaxpr) -> int:
    """The multiplications and additions, counted as two, of all matrix products and convolutions of `jaxpr`.

    Elementwise work is left out. A kernel's taps on padding count, those on the zeros that the gradient of a
    strided convolution puts between its rows do not. A scan counts as often as it runs, of a cond's branches the
    dearest. Raises ValueError for a while loop with any such work: how often it runs is not known.
    """
    return sum(_flops(eqn) for eqn in jaxpr.eqns)


def _flops(eqn) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return (
            2
            * eqn.outvars[0].aval.size
            * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        )
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval
        taps = kernel.size // kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2 * eqn.outvars[0].aval.size * taps // math.prod(params["lhs_dilation"])
    inner = [count_flops(jaxpr) for jaxpr in _jaxprs(list(params.values()))]
    if name == "while" and any(inner):
        raise ValueError(
            "while: how often it runs is not known, and so neither is what it computes"
        )
    if name == "cond":
        return max(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _jaxprs(values):
    """Yields the programs among an equation's parameters."""
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, list | tuple):
            yield from _jaxprs(value)
