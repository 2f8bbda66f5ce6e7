"""The most memory that a traced program needs at once."""

from typing import Any

from jax.extend.core import Jaxpr, Literal, Var

from ddpm_jax.training.flops import inner_jaxprs


def live_bytes(jaxpr: Jaxpr) -> int:
    """The most bytes that the values made in `jaxpr` take at once.

    Each lives from the operation that makes it to the last that reads it; arguments and constants
    do not count. A compiler that fuses operations needs less.
    """
    last_use = _last_uses(jaxpr)
    alive: dict[Var, int] = {}
    most = 0
    for number, eqn in enumerate(jaxpr.eqns):
        before = sum(alive.values())
        made = {var: _bytes_of(var.aval) for var in eqn.outvars}
        inside = max((live_bytes(inner) for inner in inner_jaxprs(eqn)), default=0)
        most = max(most, before + max(sum(made.values()), inside))
        alive |= made
        alive = {var: size for var, size in alive.items() if last_use.get(var, -1) > number}
    return most


def _bytes_of(aval: Any) -> int:
    return aval.size * aval.dtype.itemsize


def _last_uses(jaxpr: Jaxpr) -> dict[Var, int]:
    """The number of the last operation that reads each value; results are read at the end."""
    reads = [(number, var) for number, eqn in enumerate(jaxpr.eqns) for var in eqn.invars]
    reads += [(len(jaxpr.eqns), var) for var in jaxpr.outvars]
    return {var: number for number, var in reads if not isinstance(var, Literal)}
