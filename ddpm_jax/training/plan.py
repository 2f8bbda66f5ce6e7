"""Whether a run fits its devices, and how long it takes.

Everything is computed from shapes and traced programs; no array is made.
"""

import functools
import importlib.util
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.extend.core import Literal
from jax.sharding import AbstractMesh, AxisType, Mesh

from ddpm_jax.config import Config
from ddpm_jax.ddpm import DDPM
from ddpm_jax.devices.mesh import batch_sharding, state_shardings
from ddpm_jax.errors import UserError
from ddpm_jax.keys import seed_key
from ddpm_jax.shapes import PyTree
from ddpm_jax.training.flops import batch_shapes, peak_of, step_flops
from ddpm_jax.training.peak import live_bytes
from ddpm_jax.training.update import check_batch, init_state, train_step

AXES = ("data", "fsdp")


class Traffic(NamedTuple):
    """The bytes that one kind of collective operation moves in a step."""

    operation: str
    size: int
    """Bytes that each device contributes or receives."""
    sent: float
    """Bytes that each device sends in a ring."""


class Plan(NamedTuple):
    """The resources that a run takes; sizes are bytes on one device."""

    config: Config
    devices: int
    fsdp: int
    parameters: int
    params: int
    ema_params: int
    opt_state: int
    gathered: int
    gradient: int
    activations: int
    forward: int
    flops: int
    traffic: list[Traffic]

    @property
    def memory(self) -> int:
        """Bytes on one device at the end of the backward pass; the activations are estimated."""
        return self.state + self.gathered + self.gradient + self.activations

    @property
    def in_evaluations(self) -> int:
        """Bytes on one device as it evaluates and draws samples; the forward pass is estimated.

        These take the averaged weights, whole on each device, and free them afterwards.
        """
        return self.state + self.gathered + self.forward

    @property
    def state(self) -> int:
        """Bytes of parameters, average and optimiser on one device."""
        return self.params + self.ema_params + self.opt_state

    def hours(self, flops_per_s: float, utilisation: float) -> float:
        """Hours for config.train.steps if each device computes `utilisation` * `flops_per_s`."""
        flops = self.flops * self.config.train.steps
        return flops / (self.devices * flops_per_s * utilisation) / 3600


class Compiled(NamedTuple):
    """The compiler's report of the train step on one device of `kind`.

    Sizes are bytes. If compiling failed they are 0, and `failure` has the reason.
    """

    topology: str
    kind: str
    arguments: int = 0
    temporaries: int = 0
    program: int = 0
    failure: str = ""

    @property
    def memory(self) -> int:
        """Total bytes; the results of the step reuse the memory of its arguments."""
        return self.arguments + self.temporaries + self.program


def plan(config: Config, devices: int, fsdp: int = 1) -> Plan:
    """The resources that `config` takes on a mesh of (devices / fsdp) x fsdp devices.

    Raises UserError if fsdp does not divide devices, or devices do not divide the batch.
    """
    mesh = AbstractMesh(_mesh_shape(config, devices, fsdp), AXES, axis_types=(AxisType.Auto,) * 2)
    ddpm = DDPM(config)
    evaluated = _evaluated_at_once(config, devices)
    state = _on(mesh, jax.eval_shape(functools.partial(init_state, ddpm), ddpm.shapes))
    return Plan(
        config=config,
        devices=devices,
        fsdp=fsdp,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        params=bytes_a_device(state.params),
        ema_params=bytes_a_device(state.ema_params),
        opt_state=bytes_a_device(state.opt_state),
        # Sharded parameters are gathered for the network; XLA may hold fewer of them at a time.
        gathered=sum(
            leaf.size * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(state.params)
            if _is_divided(leaf)
        ),
        gradient=bytes_a_device(state.params),
        activations=activation_bytes(
            ddpm, state.params, config.train.batch_size // devices // config.train.accumulate
        ),
        forward=forward_bytes(ddpm, state.params, evaluated) if evaluated else 0,
        flops=step_flops(ddpm, state),
        traffic=ring_traffic(state.params),
    )


def bytes_a_device(tree: PyTree) -> int:
    """Bytes that a tree of arrays or shapes takes on each device of its sharding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def activation_bytes(ddpm: DDPM, params: PyTree, batch_size: int) -> int:
    """Bytes of the forward pass that JAX keeps for the backward pass on `batch_size` images.

    Parameters are not counted. This is an estimate: XLA recomputes some of these values where that
    is cheaper, and needs memory of its own. On the CPU the two roughly cancel; a small network
    compiled for a TPU v5e took a tenth.
    """
    x_0 = jax.ShapeDtypeStruct((batch_size, *ddpm.image_shape), jnp.float32)
    rng = jax.eval_shape(lambda: seed_key(0))
    labels = 0 if ddpm.config.model.num_classes else None

    def residuals(params, rng, x_0):
        def loss(params):
            return ddpm.loss(params, rng, x_0, labels=labels, train=True).mean()

        _, backward = jax.vjp(loss, params)
        return jax.tree.leaves(backward)

    jaxpr = jax.make_jaxpr(residuals)(params, rng, x_0).jaxpr
    kept = {var for var in jaxpr.outvars if not isinstance(var, Literal)}
    kept -= {*jaxpr.invars[:-1], *jaxpr.constvars}
    return sum(var.aval.size * var.aval.dtype.itemsize for var in kept)


def forward_bytes(ddpm: DDPM, params: PyTree, batch_size: int) -> int:
    """Bytes that the losses of `batch_size` images take, without a gradient, by `live_bytes`."""
    x_0 = jax.ShapeDtypeStruct((batch_size, *ddpm.image_shape), jnp.float32)
    rng = jax.eval_shape(lambda: seed_key(0))
    loss = functools.partial(ddpm.loss, labels=0 if ddpm.config.model.num_classes else None)
    return live_bytes(jax.make_jaxpr(loss)(params, rng, x_0).jaxpr)


def _evaluated_at_once(config: Config, devices: int) -> int:
    """The images that a device has at once in held-out losses and samples."""
    train = config.train
    samples = -(-min(train.num_samples, 64 * devices) // devices)
    compares = train.eval_every > 0 and config.data.holdout > 0
    return max(samples, train.batch_size // devices if compares else 0)


def ring_traffic(params: PyTree) -> list[Traffic]:
    """The bytes that devices exchange in a step, over rings of n = data * fsdp devices.

    Gradients are float32, as parameters are. For a parameter of N bytes, each device sends:

    - replicated: the gradient is all-reduced over all n devices, 2 N (n - 1) / n;
    - sharded over fsdp: the parameter is all-gathered for the forward pass and again for the
      backward pass, N (fsdp - 1) / fsdp each. The gradient is reduce-scattered, which takes the
      same again. Each device's shard of it is all-reduced over data,
      2 (N / fsdp) (data - 1) / data.

    This is the most: the compiler may gather only once, and for a network that computes in bfloat16
    it gathers and reduces some parameters in bfloat16, with half of the bytes.
    """
    leaves = jax.tree.leaves(params)
    data, fsdp = (leaves[0].sharding.mesh.shape[axis] for axis in AXES)
    n = data * fsdp
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if not _is_divided(leaf))
    divided = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if _is_divided(leaf))
    over_data = divided // fsdp if data > 1 else 0
    reduced = 2 * whole * (n - 1) / n + 2 * over_data * (data - 1) / data
    scattered = divided * (fsdp - 1) / fsdp
    gathered = 2 * divided * (fsdp - 1) / fsdp
    rows = [
        Traffic("all-reduced", whole + over_data, reduced),
        Traffic("reduce-scattered", divided, scattered),
        Traffic("all-gathered", 2 * divided, gathered),
    ]
    return [row for row in rows if row.sent]


def compile_for(config: Config, topology: str, devices: int, fsdp: int = 1) -> Compiled:
    """Compiles the train step for the TPUs of `topology`, for example "v5e:2x2"; no TPU is needed.

    Raises UserError if libtpu is not installed or does not know the topology, or if the topology
    does not have `devices` devices.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compile: libtpu is not installed; pip install 'ddpm-jax[tpu]'")
    try:
        tpus: Any = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # libtpu does not document what it raises.
        raise UserError(
            f"compile: {topology!r}: {_first_line(error)}; name a topology such as v5e:2x2"
        ) from None
    if len(tpus) != devices:
        raise UserError(
            f"compile: {topology} has {len(tpus)} devices, not {devices}; "
            f"pass --devices {len(tpus)}"
        )
    mesh = Mesh(np.asarray(tpus).reshape(_mesh_shape(config, devices, fsdp)), AXES)
    ddpm = DDPM(config)
    state = _on(mesh, jax.eval_shape(functools.partial(init_state, ddpm), ddpm.shapes))
    batch = batch_shapes(config, batch_sharding(mesh))
    step = jax.jit(train_step, static_argnums=0, static_argnames="mesh", donate_argnums=1)
    try:
        memory: Any = step.lower(ddpm, state, batch, mesh=mesh).compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        return Compiled(topology, tpus[0].device_kind, failure=_first_line(error))
    return Compiled(
        topology,
        tpus[0].device_kind,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        program=memory.generated_code_size_in_bytes,
    )


def table(
    plan: Plan,
    flops_per_s: float | None = None,
    utilisation: float = 0.3,
    memory_gib: float | None = None,
    compiled: Compiled | None = None,
) -> str:
    """The plan as text; says whether a device's memory fits in `memory_gib`, if that is given."""
    train = plan.config.train
    dtype = plan.config.model.dtype
    rate = flops_per_s
    source = ""
    if not rate:
        rate = peak_of("NVIDIA A100-SXM4-80GB", dtype)
        assert rate is not None  # The table of peaks has it.
        precision = "TF32" if dtype == "float32" else dtype
        source = f", assuming an A100's peak in {precision} (set --flops-per-s)"
    evaluating = plan.in_evaluations
    gathered = f"{_mib(plan.gathered)}  at most, while they are used"
    at_most = "" if dtype == "float32" else "at most "
    rows = [
        ("parameters", f"{plan.parameters:,}"),
        ("mesh", f"data {plan.devices // plan.fsdp} x fsdp {plan.fsdp}"),
        ("batch", f"{train.batch_size} images, {train.batch_size // plan.devices} per device"),
        ("", ""),
        ("memory per device", ""),
        ("  parameters", _mib(plan.params)),
        ("  their average", _mib(plan.ema_params)),
        ("  optimiser", _mib(plan.opt_state)),
        *([("  whole parameters", gathered)] if plan.gathered else []),
        ("  gradient", _mib(plan.gradient)),
        ("  activations", f"{_mib(plan.activations)}  an estimate"),
        ("  total", f"{_mib(plan.memory)}{_verdict(plan.memory, memory_gib)}"),
        ("  in evaluations", f"{_mib(evaluating)}  an estimate{_verdict(evaluating, memory_gib)}"),
        ("", ""),
        ("per step", ""),
        (
            "  computes",
            f"{_si(plan.flops)}FLOP, {_si(plan.flops / train.batch_size)}FLOP per image",
        ),
        *(
            (f"  {name}", f"{_mib(size)}  each device sends {at_most}{_mib(sent).strip()}")
            for name, size, sent in plan.traffic
        ),
        ("", ""),
        ("the run", f"{train.steps:,} steps, {train.steps * train.batch_size:,} images"),
        (
            "  takes",
            f"{_hours(plan.hours(rate, utilisation))} hours at {utilisation:g} of "
            f"{_si(rate)}FLOP/s per device{source}",
        ),
    ]
    if compiled is not None:
        rows += [("", ""), *_compiled_rows(compiled, memory_gib)]
    return "\n".join(f"{name:20}{value}".rstrip() for name, value in rows)


def _compiled_rows(compiled: Compiled, memory_gib: float | None) -> list[tuple[str, str]]:
    title = ("compiled", f"for {compiled.topology}, {compiled.kind}")
    if compiled.failure:
        return [title, ("  fits", f"no: {compiled.failure}")]
    return [
        title,
        ("  arguments", _mib(compiled.arguments)),
        ("  temporaries", _mib(compiled.temporaries)),
        ("  program", _mib(compiled.program)),
        ("  total", f"{_mib(compiled.memory)}{_verdict(compiled.memory, memory_gib)}"),
    ]


def _verdict(size: int, memory_gib: float | None) -> str:
    if memory_gib is None:
        return ""
    return f"  {'fits' if size <= memory_gib * 2**30 else 'does not fit'} in {memory_gib:g} GiB"


def _hours(hours: float) -> str:
    if hours > 100:
        return f"{hours:,.0f}"
    return f"{hours:.3g}" if hours > 0.01 else "under 0.01"


def _mib(size: float) -> str:
    return f"{size / 2**20:>12,.1f} MiB"


def _si(number: float) -> str:
    """The number with an SI prefix, for example "12.4 G"."""
    thousands = min(max(int(math.log10(number)) // 3, 0), 5)
    prefix = ["", "k", "M", "G", "T", "P"][thousands]
    return f"{number / 10 ** (3 * thousands):.4g} {prefix}"


def _mesh_shape(config: Config, devices: int, fsdp: int) -> tuple[int, int]:
    if devices % fsdp:
        raise UserError(
            f"fsdp: {fsdp} does not divide the {devices} devices; choose a divisor of {devices}"
        )
    check_batch(config.train, devices)
    return devices // fsdp, fsdp


def _on(mesh, tree):
    """The abstract arrays of `tree`, with their shardings on `mesh`."""
    return jax.tree.map(
        lambda leaf, sharding: leaf.update(sharding=sharding), tree, state_shardings(tree, mesh)
    )


def _is_divided(leaf) -> bool:
    return not leaf.sharding.is_fully_replicated


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
