"""One update (Ho et al. 2020, Algorithm 1 and Appendix B), on one device or many."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from ddpm_jax.average import average
from ddpm_jax.config import Config, Optim, Train
from ddpm_jax.data import Batch, BatchReader, Source
from ddpm_jax.data.images import to_float
from ddpm_jax.ddpm import DDPM
from ddpm_jax.devices.mesh import on_mesh, place_rows, replicate, replicated, state_shardings
from ddpm_jax.errors import UserError
from ddpm_jax.keys import INIT, example_keys, random_flip, seed_key
from ddpm_jax.shapes import AnyKey, Array, Integer, PyTree, UInt8

PMAP_AXIS = "data"
"""The axis of devices within pmap."""


class TrainState(NamedTuple):
    """All that training changes."""

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any


def make_optimizer(optim: Optim) -> optax.GradientTransformation:
    """Clipping to a global norm, then Adam(0.9, 0.999, 1e-8); linear warm-up from 0, no decay."""
    learning_rate = optax.linear_schedule(0.0, optim.learning_rate, optim.warmup_steps)
    if not optim.warmup_steps:
        learning_rate = optim.learning_rate
    clip = optax.clip_by_global_norm(optim.clip_norm)
    if optim.clip == "device":  # Each device has clipped its own gradient before the mean.
        clip = optax.identity()
    return optax.chain(clip, adam(learning_rate))


def adam(learning_rate: optax.Schedule | float) -> optax.GradientTransformation:
    """optax.adam, computed in float32 with and without jax's 64-bit mode."""
    b1 = 0.9
    b2 = 0.999
    init = optax.scale_by_adam(b1, b2).init

    def update(gradient, state, params=None):
        count = optax.safe_increment(state.count)
        bias_1 = _bias(b1, count)
        bias_2 = _bias(b2, count)

        # Arrays of the same shape are traced once: a fifth of the time of tracing was spent here.
        @functools.partial(jax.jit, inline=True)
        def of_leaf(g, m, v, bias_1, bias_2):
            m = optax.tree.update_moment(g, m, b1, 1)
            v = optax.tree.update_moment_per_elem_norm(g, v, b2, 2)
            return m / bias_1 / (jnp.sqrt(v / bias_2) + 1e-8), m, v

        leaves, tree = jax.tree.flatten(gradient)
        moments = zip(leaves, jax.tree.leaves(state.mu), jax.tree.leaves(state.nu), strict=True)
        rows = [of_leaf(*leaf, bias_1, bias_2) for leaf in moments]
        updates, mu, nu = (jax.tree.unflatten(tree, column) for column in zip(*rows, strict=True))
        return updates, optax.ScaleByAdamState(count, mu, nu)

    if callable(learning_rate):
        learning_rate = _in_float32(learning_rate)
    return optax.chain(
        optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate)
    )


@functools.partial(jax.jit, inline=True)
def _bias(decay, count):
    """What `count` steps of an average from zero lack: 1 - decay^count."""
    return 1 - jnp.float32(decay) ** count


def _in_float32(schedule: optax.Schedule) -> optax.Schedule:
    return lambda count: schedule(jnp.float32(count))


def init_state(ddpm: DDPM, params: PyTree = None) -> TrainState:
    """The state before the first update, from `params` or fresh ones.

    The average starts as a copy of the parameters.
    """
    if params is None:
        params = ddpm.init(run_key(ddpm.config, INIT))
    opt_state = make_optimizer(ddpm.config.optim).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), opt_state)


def train_step(
    ddpm: DDPM,
    state: TrainState,
    batch: Batch,
    pixels: UInt8[Array, "n h w c"] | None = None,
    *,
    mesh: Mesh | None = None,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Algorithm 1: one update on a batch of uint8 images [B,H,W,C].

    Returns the new state and scalar metrics. Row i of the batch draws its flip, t, noise and
    dropout from fold_in(fold_in(key(seed), step), i). With `pixels` [N,H,W,C], the batch holds
    places [B] in them. With `mesh`, the new state lies on it as `state_shardings` say. Within
    jax.pmap over `axis_name`, the batch is the rows of one device, and the update is made from the
    mean over all devices. The batch's labels count where the model has classes.
    """
    config = ddpm.config
    optim = config.optim
    images = batch.image if pixels is None else pixels[batch.image]
    first_row = 0 if axis_name is None else jax.lax.axis_index(axis_name) * len(images)
    params = state.params
    if mesh is not None:  # Whole for the network; only what is kept is divided.
        params = jax.lax.with_sharding_constraint(params, replicated(mesh))
    labels = batch.label if config.model.num_classes else None
    rng = run_key(config, state.step)
    if mesh is not None and mesh.size > 1 and config.train.accumulate > 1:
        loss, gradient = _reduced_once(ddpm, mesh, params, rng, images, labels)
    else:
        loss, gradient = _mean_gradient(ddpm, params, rng, images, labels, first_row)
    if optim.clip == "device":
        clip = optax.clip_by_global_norm(optim.clip_norm)
        gradient, _ = clip.update(gradient, optax.EmptyState())
    if axis_name is not None:
        loss, gradient = jax.lax.pmean((loss, gradient), axis_name)
    updates, opt_state = make_optimizer(optim).update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = average(
        state.ema_params, params, state.step, decay=optim.ema_decay, warmup=optim.ema_warmup
    )
    new_state = TrainState(state.step + 1, params, ema_params, opt_state)
    if mesh is not None:
        shardings = state_shardings(new_state, mesh)
        new_state = jax.lax.with_sharding_constraint(new_state, shardings)
    return new_state, {"loss": loss, "grad_norm": optax.tree.norm(gradient)}


def _mean_gradient(ddpm: DDPM, params, rng, images, labels, first_row):
    """(mean loss, its gradient) over uint8 `images` [B,H,W,C] with `labels` [B] or None.

    Computed in train.accumulate parts one after the other.
    """
    parts = ddpm.config.train.accumulate

    def mean_loss(params, rows, images, labels):
        keys = example_keys(rng, rows)
        x_0 = to_float(images)
        if ddpm.config.data.flip:
            x_0 = random_flip(keys, x_0)
        return ddpm.loss_of_examples(params, keys, x_0, labels=labels, train=True).mean()

    value_and_grad = jax.value_and_grad(mean_loss)
    rows = first_row + jnp.arange(len(images), dtype=jnp.uint32)
    if parts == 1:
        return value_and_grad(params, rows, images, labels)

    def add_part(total, part):
        return jax.tree.map(jnp.add, total, value_and_grad(params, *part)), None

    def divide(x):
        # Every parts-th row, so that each part lies on all devices.
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    zero = jax.tree.map(jnp.zeros_like, (jnp.zeros((), jnp.float32), params))
    total, _ = jax.lax.scan(add_part, zero, jax.tree.map(divide, (rows, images, labels)))
    return jax.tree.map(lambda x: x / parts, total)


def _reduced_once(ddpm: DDPM, mesh: Mesh, params, rng, images, labels):
    """As `_mean_gradient`: each device sums the parts of its rows, then comes the mean over all.

    Left to itself, XLA reduces the gradient of each part over all devices, but on TPUs.
    """
    axes = mesh.axis_names

    def of_device(params, rng, images, labels):
        first_row = jax.lax.axis_index(axes) * len(images)
        mean = _mean_gradient(ddpm, params, rng, images, labels, first_row)
        return jax.lax.pmean(mean, axes)

    rows = PartitionSpec(axes)
    whole = PartitionSpec()
    specs = (whole, whole, rows, rows)
    mapped = jax.shard_map(of_device, mesh=mesh, in_specs=specs, out_specs=whole, check_vma=False)
    return mapped(params, rng, images, labels)


def check_batch(train: Train, devices: int) -> None:
    """Raises UserError if the batch does not divide over the devices and train.accumulate parts."""
    if train.batch_size % (devices * train.accumulate) == 0:
        return
    parts = f"{train.accumulate} parts (train.accumulate) on " if train.accumulate > 1 else ""
    raise UserError(
        f"train.batch_size: {train.batch_size} is not divisible by the {parts}{devices} devices; "
        "choose a multiple"
    )


class Update:
    """One update after another on `mesh`, in the mode of config.parallel.

    Update number `step` takes batch `step` of `batches`, which reads this process's rows.
    """

    def __init__(self, ddpm: DDPM, mesh: Mesh, batches: BatchReader):
        self.ddpm = ddpm
        self.mesh = mesh
        self.batches = batches
        self.pixels = None
        if ddpm.config.data.on_device:
            self.pixels = _on_device(ddpm.config, batches.source, mesh)

    def __call__(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, jax.Array]]:
        """`train_step` number `step`, from which `state` comes; takes the old state's memory.

        The new state is for the next call; `settled` is for everything else.
        """
        batch = self._read(step)
        config = self.ddpm.config
        if config.parallel.mode == "jit":
            size = config.train.batch_size
            batch = jax.tree.map(lambda rows: place_rows(rows, self.mesh, size), batch)
            return _step(self.ddpm, state, batch, self.pixels, mesh=self.mesh)
        devices = self._mesh_of_pmap.size
        batch = jax.tree.map(lambda rows: rows.reshape(devices, -1, *rows.shape[1:]), batch)
        # On another mesh than pmap's own results, the step would be compiled twice.
        if state.step.sharding.mesh != self._mesh_of_pmap:  # type: ignore[attr-defined]
            state = on_mesh(state, self._mesh_of_pmap)
        return _pmap_step(tuple(self.mesh.devices.flat))(self.ddpm, state, batch, self.pixels)

    def settled(self, state: TrainState) -> TrainState:
        """`state`, which a call returned, as arrays on the mesh; they share its memory.

        What pmap returns is on a mesh of its own. To relabel the thousand arrays of a state in
        Python takes longer than to start an update, so it waits until somebody looks.
        """
        return state if self.ddpm.config.parallel.mode == "jit" else on_mesh(state, self.mesh)

    @functools.cached_property
    def _mesh_of_pmap(self) -> Mesh:
        """The one that pmap puts its results on: this process's devices in their order."""
        own = [each for each in self.mesh.devices.flat if each in self.mesh.local_devices]
        return Mesh(np.array(own), (PMAP_AXIS,))

    def _read(self, step: int) -> Batch:
        return self.batches.batch_at(step) if self.pixels is None else self.batches.places_at(step)


def _on_device(config: Config, source: Source, mesh: Mesh):
    """All images of `source`, [N,H,W,C], on each device."""
    size = len(source) * source.read(np.arange(1)).nbytes / 2**20
    if size > config.data.cache_mb:
        raise UserError(
            f"data.on_device: {len(source)} images take {size:.0f} MiB, more than data.cache_mb "
            f"{config.data.cache_mb}; leave it out, or raise data.cache_mb if the devices have room"
        )
    return replicate(source.read(np.arange(len(source))), mesh)


def run_key(config: Config, number: int | Integer[Array, ""]) -> AnyKey:
    """The key of update `number` of a run, or of one of the run's numbers in keys.py."""
    return jax.random.fold_in(seed_key(config.seed), number)


_step = jax.jit(train_step, static_argnums=0, static_argnames="mesh", donate_argnums=1)


@functools.cache
def _pmap_step(devices: tuple):
    """train_step, a program for each device.

    The state goes in and comes out as one array that all have.
    """
    return jax.pmap(
        functools.partial(train_step, axis_name=PMAP_AXIS),
        axis_name=PMAP_AXIS,
        devices=devices,
        in_axes=(None, None, 0, None),
        out_axes=None,
        static_broadcasted_argnums=0,
        donate_argnums=1,
    )
