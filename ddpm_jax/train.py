"""Training (Ho et al. 2020, Algorithm 1 and Appendix B)."""

import contextlib
import dataclasses
import functools
import logging
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh

from ddpm_jax.checkpoint import Checkpoints, abstract_like
from ddpm_jax.config import Config, Optim, Train
from ddpm_jax.data import Source, from_array, load_source, open_batches, split
from ddpm_jax.ddpm import DDPM, random_flip, seed_key
from ddpm_jax.errors import DataLost, NonFiniteLoss, UserError
from ddpm_jax.images import to_float
from ddpm_jax.logs import open_log
from ddpm_jax.parallel import (
    describe_devices,
    fetch,
    local_rows,
    make_mesh,
    mesh_of,
    on_mesh,
    place,
    place_rows,
    replicate,
    replicated,
    state_shardings,
)
from ddpm_jax.processes import agreed
from ddpm_jax.runs import start_run
from ddpm_jax.samplers import example_keys
from ddpm_jax.signals import StopSignals

log = logging.getLogger(__name__)

# What key(seed) is folded with apart from the steps, which are far below.
INIT, SAMPLES, HOLDOUT = 2**32 - 1, 2**32 - 2, 2**32 - 3


class TrainState(NamedTuple):
    """All that training changes."""

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any


def make_optimizer(optim: Optim) -> optax.GradientTransformation:
    """Clipping to a global norm, then Adam(0.9, 0.999, 1e-8) with linear warm-up from 0, no decay."""
    learning_rate = optax.linear_schedule(0.0, optim.learning_rate, optim.warmup_steps)
    if not optim.warmup_steps:
        learning_rate = optim.learning_rate
    # Each device has clipped its own gradient before the mean.
    clip = optax.identity() if optim.clip == "device" else optax.clip_by_global_norm(optim.clip_norm)
    return optax.chain(clip, optax.adam(learning_rate))


def init_state(ddpm: DDPM) -> TrainState:
    """The state before the first update; the average starts as a copy of the parameters."""
    params = ddpm.init(_key(ddpm.config, INIT))
    opt_state = make_optimizer(ddpm.config.optim).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), opt_state)


def train_step(
    ddpm: DDPM, state: TrainState, images, pixels=None, *, mesh: Mesh | None = None, axis_name: str | None = None
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Algorithm 1, one update on uint8 `images` [B,H,W,C]; returns the new state and scalar metrics.

    Row i of the batch draws its flip, t, noise and dropout from fold_in(fold_in(key(seed), step), i).
    With `pixels` [N,H,W,C], `images` [B] are places in them. With `mesh`, the new state lies on it as
    `state_shardings` say. Within jax.pmap over `axis_name`, `images` are the rows of one device, and the
    update is made from the mean over all.
    """
    config, optim = ddpm.config, ddpm.config.optim
    images = images if pixels is None else pixels[images]
    first_row = 0 if axis_name is None else jax.lax.axis_index(axis_name) * len(images)
    params = state.params
    if mesh is not None:  # Whole for the network; only what is kept is divided.
        params = jax.lax.with_sharding_constraint(params, replicated(mesh))
    loss, gradient = _mean_gradient(ddpm, params, _key(config, state.step), images, first_row)
    if optim.clip == "device":
        gradient, _ = optax.clip_by_global_norm(optim.clip_norm).update(gradient, optax.EmptyState())
    if axis_name is not None:
        loss, gradient = jax.lax.pmean((loss, gradient), axis_name)
    updates, opt_state = make_optimizer(optim).update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = optax.incremental_update(params, state.ema_params, 1 - optim.ema_decay)
    new_state = TrainState(state.step + 1, params, ema_params, opt_state)
    if mesh is not None:
        new_state = jax.lax.with_sharding_constraint(new_state, state_shardings(new_state, mesh))
    return new_state, {"loss": loss, "grad_norm": optax.tree.norm(gradient)}


def _mean_gradient(ddpm: DDPM, params, rng, images, first_row):
    """(mean loss, its gradient) over uint8 `images` [B,H,W,C], in train.accumulate parts one after the other."""
    parts = ddpm.config.train.accumulate

    def mean_loss(params, rows, images):
        x_0 = to_float(images)
        if ddpm.config.data.flip:
            x_0 = random_flip(example_keys(rng, rows), x_0)
        return ddpm.loss(params, rng, x_0, rows=rows, train=True).mean()

    value_and_grad = jax.value_and_grad(mean_loss)
    rows = first_row + jnp.arange(len(images), dtype=jnp.uint32)
    if parts == 1:
        return value_and_grad(params, rows, images)

    def add_part(total, part):
        return jax.tree.map(jnp.add, total, value_and_grad(params, *part)), None

    # Every parts-th row, so that each part lies on all devices.
    divided = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), (rows, images))
    zero = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params))
    total, _ = jax.lax.scan(add_part, zero, divided)
    return jax.tree.map(lambda x: x / parts, total)


def holdout_loss(ddpm: DDPM, params, source: Source, indices: np.ndarray) -> float:
    """The mean loss over the held-out images `indices` of `source`, each with the same t and noise at every call."""
    config, total = ddpm.config, 0.0
    size = config.train.batch_size
    for start in range(0, len(indices), size):
        # The last batch is filled up with images that do not count: one program for all.
        chosen = np.resize(indices[start : start + size], size)
        rng = jax.random.fold_in(_key(config, HOLDOUT), start)
        losses = _loss(ddpm, params, rng, place(source.read(chosen), mesh_of(params)))
        total += float(np.sum(fetch(losses)[: len(indices) - start], dtype=np.float64))
    return total / len(indices)


def fit(config: Config, workdir: epath.PathLike, images: np.ndarray | None = None) -> TrainState:
    """Trains `config` in `workdir`, or goes on with what is there; returns the last state.

    `images` uint8 [N,H,W,C] take the place of config.data.source. Ctrl-C and SIGTERM end it after the
    step at hand, with everything saved. Raises UserError for what cannot be used, NonFiniteLoss if
    training diverges.
    """
    if images is None:
        source = load_source(config.data)
    else:
        source = from_array(images, config.data.image_shape)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, source="array"))
    train, held_out = split(source, config.data.holdout)
    held_out = held_out[np.linspace(0, len(held_out) - 1, min(len(held_out), config.train.eval_images)).astype(int)]
    mesh = make_mesh(config.parallel.devices, config.parallel.fsdp)
    check_batch(config.train, mesh.size)

    workdir = start_run(workdir, config, source, describe_devices(mesh))
    log.info("data: %d images, %d of them to train on, fingerprint %s", len(source), len(train), source.fingerprint)
    log.info("run: %s (config.json, run.json, metrics.jsonl, checkpoints, samples, tensorboard)", workdir)
    ddpm = DDPM(config)
    # Signals are held back until the last checkpoint is on disk.
    with StopSignals() as signals, contextlib.closing(Checkpoints(workdir, config.checkpoint.keep)) as checkpoints:
        state = _first_state(ddpm, mesh, checkpoints)
        step, steps = int(state.step), config.train.steps
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        log.info("%d parameters on %s, step %d of %d", parameters, describe_devices(mesh), step, steps)
        rows = local_rows(mesh, config.train.batch_size)
        batches = open_batches(source, train, config.train.batch_size, config.seed, config.data, rows)
        with contextlib.closing(batches), contextlib.closing(open_log(workdir, step, steps)) as run_log:
            update = Update(ddpm, mesh, batches)
            return _train(update, state, held_out, checkpoints, run_log, signals)


def check_batch(train: Train, devices: int) -> None:
    """Raises UserError if the batch cannot be divided over so many devices, in train.accumulate parts."""
    if train.batch_size % (devices * train.accumulate):
        parts = f"{train.accumulate} parts (train.accumulate) on " if train.accumulate > 1 else ""
        raise UserError(f"train.batch_size: {train.batch_size} is not divisible by the {parts}{devices} devices")


def _first_state(ddpm: DDPM, mesh: Mesh, checkpoints: Checkpoints) -> TrainState:
    """The newest checkpoint's state, or a fresh one: shapes first, then shardings, then arrays."""
    init = functools.partial(init_state, ddpm)
    shapes = jax.eval_shape(init)
    shardings = state_shardings(shapes, mesh)
    if checkpoints.latest_step is None:
        return jax.jit(init, out_shardings=shardings)()
    abstract = abstract_like(shapes, shardings)
    return TrainState(**checkpoints.restore(checkpoints.latest_step, abstract._asdict()))


class Update:
    """One update after another on `mesh`, in the mode of config.parallel, on the batches of their steps.

    `batches` (see `open_batches`) gives this process's rows.
    """

    def __init__(self, ddpm: DDPM, mesh: Mesh, batches):
        self.ddpm, self.mesh, self.batches = ddpm, mesh, batches
        self.pixels = _on_device(ddpm.config, batches.source, mesh) if ddpm.config.data.on_device else None

    def __call__(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, jax.Array]]:
        """`train_step` number `step`, from which `state` comes; takes the memory of the old state."""
        images = self._read(step)
        if self.ddpm.config.parallel.mode == "jit":
            images = place_rows(images, self.mesh, self.ddpm.config.train.batch_size)
            return _step(self.ddpm, state, images, self.pixels, mesh=self.mesh)
        images = images.reshape(len(self.mesh.local_devices), -1, *images.shape[1:])
        result = _pmap_step(tuple(self.mesh.devices.flat))(self.ddpm, state, images, self.pixels)
        return on_mesh(result, self.mesh)

    def _read(self, step: int) -> np.ndarray:
        if self.pixels is not None:
            return self.batches.indices_at(step)
        return self.batches.batch_at(step)["image"]


def _on_device(config: Config, source: Source, mesh: Mesh):
    """All images of `source`, uint8 [N,H,W,C], on each device."""
    size = len(source) * math.prod(config.data.image_shape) / 2**20
    if size > config.data.cache_mb:
        raise UserError(
            f"data.on_device: {len(source)} images take {size:.0f} MiB, above data.cache_mb {config.data.cache_mb}; "
            "leave it out, or raise data.cache_mb if the devices have room"
        )
    return replicate(source.read(np.arange(len(source))), mesh)


def _train(update, state, held_out, checkpoints, run_log, signals) -> TrainState:
    """The loop, from state.step to config.train.steps or a signal."""
    ddpm, mesh, config = update.ddpm, update.mesh, update.ddpm.config
    done, steps = int(state.step), config.train.steps
    window, stopping = _Window(done, checkpoints), None
    try:
        while done < steps and not stopping:
            state, metrics = update(state, done)
            window.add(metrics)
            run_log.advance()
            done += 1

            stopping = signals.stop_after(done)
            saves = done == steps or stopping or done % config.checkpoint.every == 0
            evaluates = len(held_out) and config.train.eval_every and _due(done, config.train.eval_every, steps)
            draws = not stopping and _due(done, config.train.sample_every, steps)
            # A line never reaches across a checkpoint, so that an interrupted run writes the same ones.
            if saves or evaluates or draws or done % config.train.log_every == 0:
                evaluated = {}
                if evaluates:
                    ema_params = replicate(state.ema_params, mesh)
                    evaluated["holdout_loss"] = holdout_loss(ddpm, ema_params, update.batches.source, held_out)
                run_log.tick(done, window.close(**evaluated))
            if saves:
                checkpoints.save(done, state._asdict())
            if draws:
                run_log.pictures(done, _pictures(ddpm, state, mesh))
            if not window.metrics:
                window.restart_clock()
    except DataLost:
        # Of several processes one alone knows, and a checkpoint needs them all.
        if jax.process_count() == 1:
            if window.metrics:
                run_log.tick(done, window.close())
            checkpoints.save(done, state._asdict())
        raise
    if stopping:
        log.info("%s: saved after step %d of %d; the same command goes on", stopping, done, steps)
    elif not agreed(run_log.has_pictures(done)):  # The run ended before they were drawn.
        run_log.pictures(done, _pictures(ddpm, state, mesh))
    return state


class _Window:
    """The metrics of the updates since the last line, left on the device until the next one."""

    def __init__(self, step: int, checkpoints: Checkpoints):
        self.step, self.checkpoints = step, checkpoints
        self.metrics: list[dict] = []
        self.restart_clock()

    def add(self, metrics: dict) -> None:
        self.metrics.append(metrics)

    def restart_clock(self) -> None:
        """Starts to time anew: what was done since the last line was no update."""
        self.started = time.monotonic()

    def close(self, **evaluated: float) -> dict[str, float]:
        """Means over the window, its rate, and `evaluated`. Raises NonFiniteLoss naming the first bad number."""
        steps, metrics, self.metrics = len(self.metrics), jax.device_get(self.metrics), []
        for number, values in enumerate(metrics, self.step + 1):
            self._check(number, values)
        self.step += steps
        self._check(self.step, evaluated)
        means = {name: float(np.mean([values[name] for values in metrics])) for name in metrics[0]}
        return {**means, "steps": steps, "steps_per_s": steps / (time.monotonic() - self.started), **evaluated}

    def _check(self, step, values) -> None:
        for name, value in values.items():
            if not np.isfinite(value):
                self.checkpoints.wait()
                last = self.checkpoints.latest_step
                good = "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"
                raise NonFiniteLoss(f"{name} is {value} at step {step}; {good}. Try a lower optim.learning_rate")


def _pictures(ddpm, state, mesh):
    rng = _key(ddpm.config, SAMPLES)
    return ddpm.sample(replicate(state.ema_params, mesh), rng, ddpm.config.train.num_samples)


def _due(done: int, every: int, steps: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)


def _key(config: Config, number):
    return jax.random.fold_in(seed_key(config.seed), number)


_step = jax.jit(train_step, static_argnums=0, static_argnames="mesh", donate_argnums=1)


@functools.cache
def _pmap_step(devices: tuple):
    """train_step, a program for each device; the state goes in and comes out as one array that all have."""
    return jax.pmap(
        functools.partial(train_step, axis_name="data"),
        axis_name="data",
        devices=devices,
        in_axes=(None, None, 0, None),
        out_axes=None,
        static_broadcasted_argnums=0,
        donate_argnums=1,
    )


@functools.partial(jax.jit, static_argnums=0)
def _loss(ddpm, params, rng, images):
    return ddpm.loss(params, rng, to_float(images))
