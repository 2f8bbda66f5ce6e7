"""Training (Ho et al. 2020, Algorithm 1 and Appendix B)."""

import contextlib
import dataclasses
import functools
import logging
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from ddpm_jax.checkpoint import Checkpoints, abstract_like
from ddpm_jax.config import Config, Optim
from ddpm_jax.data import Batches, Source, from_array, load_source, split
from ddpm_jax.ddpm import DDPM, random_flip, seed_key
from ddpm_jax.errors import DataLost, NonFiniteLoss, UserError
from ddpm_jax.images import to_float
from ddpm_jax.logs import RunLog
from ddpm_jax.parallel import describe_devices, make_mesh, mesh_of, place, replicated
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
    return optax.chain(optax.clip_by_global_norm(optim.clip_norm), optax.adam(learning_rate))


def init_state(ddpm: DDPM) -> TrainState:
    """The state before the first update; the average starts as a copy of the parameters."""
    params = ddpm.init(_key(ddpm.config, INIT))
    opt_state = make_optimizer(ddpm.config.optim).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), opt_state)


def train_step(ddpm: DDPM, state: TrainState, images) -> tuple[TrainState, dict[str, jax.Array]]:
    """Algorithm 1, one update on uint8 `images` [B,H,W,C]; returns the new state and scalar metrics.

    Row i of the batch draws its flip, t, noise and dropout from fold_in(fold_in(key(seed), step), i).
    """
    config = ddpm.config
    rng = _key(config, state.step)
    x_0 = to_float(images)
    if config.data.flip:
        x_0 = random_flip(example_keys(rng, jnp.arange(len(images), dtype=jnp.uint32)), x_0)

    def mean_loss(params):
        return ddpm.loss(params, rng, x_0, train=True).mean()

    loss, gradient = jax.value_and_grad(mean_loss)(state.params)
    updates, opt_state = make_optimizer(config.optim).update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = optax.incremental_update(params, state.ema_params, 1 - config.optim.ema_decay)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradient)}
    return TrainState(state.step + 1, params, ema_params, opt_state), metrics


def holdout_loss(ddpm: DDPM, params, source: Source, indices: np.ndarray) -> float:
    """The mean loss over the held-out images `indices` of `source`, each with the same t and noise at every call."""
    config, total = ddpm.config, 0.0
    size = config.train.batch_size
    for start in range(0, len(indices), size):
        # The last batch is filled up with images that do not count: one program for all.
        chosen = np.resize(indices[start : start + size], size)
        rng = jax.random.fold_in(_key(config, HOLDOUT), start)
        losses = _loss(ddpm, params, rng, place(source.read(chosen), mesh_of(params)))
        total += float(np.sum(np.asarray(losses)[: len(indices) - start], dtype=np.float64))
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
    mesh = make_mesh(config.parallel.devices)
    if config.train.batch_size % mesh.size:
        raise UserError(f"train.batch_size: {config.train.batch_size} is not divisible by the {mesh.size} devices")

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
        batches = Batches(source, train, config.train.batch_size, config.seed)
        with contextlib.closing(RunLog(workdir, step, steps)) as run_log:
            return _train(ddpm, state, batches, held_out, checkpoints, run_log, signals)


def _first_state(ddpm: DDPM, mesh, checkpoints: Checkpoints) -> TrainState:
    """The newest checkpoint's state, or a fresh one: shapes first, then shardings, then arrays."""
    init = functools.partial(init_state, ddpm)
    if checkpoints.latest_step is None:
        return jax.jit(init, out_shardings=replicated(mesh))()
    abstract = abstract_like(jax.eval_shape(init), replicated(mesh))
    return TrainState(**checkpoints.restore(checkpoints.latest_step, abstract._asdict()))


def _train(ddpm, state, batches, held_out, checkpoints, run_log, signals) -> TrainState:
    """The loop, from state.step to config.train.steps or a signal."""
    config, steps = ddpm.config, ddpm.config.train.steps
    mesh = mesh_of(state.params)
    done = int(state.step)
    window, stopping = _Window(done, checkpoints), None
    try:
        while done < steps and not stopping:
            images = batches.batch_at(done)["image"]
            state, metrics = _step(ddpm, state, place(images, mesh))
            window.add(metrics)
            run_log.progress.update()
            done += 1

            stopping = signals.received  # Read once: one may come at any line below.
            saves = done == steps or stopping or done % config.checkpoint.every == 0
            evaluates = len(held_out) and config.train.eval_every and _due(done, config.train.eval_every, steps)
            draws = not stopping and _due(done, config.train.sample_every, steps)
            # A line never reaches across a checkpoint, so that an interrupted run writes the same ones.
            if saves or evaluates or draws or done % config.train.log_every == 0:
                evaluated = {}
                if evaluates:
                    evaluated["holdout_loss"] = holdout_loss(ddpm, state.ema_params, batches.source, held_out)
                run_log.tick(done, window.close(**evaluated))
            if saves:
                checkpoints.save(done, state._asdict())
            if draws:
                run_log.pictures(done, _pictures(ddpm, state))
            if not window.metrics:
                window.restart_clock()
    except DataLost:
        if window.metrics:
            run_log.tick(done, window.close())
        checkpoints.save(done, state._asdict())
        raise
    if stopping:
        log.info("%s: saved after step %d of %d; the same command goes on", stopping, done, steps)
    elif not run_log.has_pictures(done):  # The run ended before they were drawn.
        run_log.pictures(done, _pictures(ddpm, state))
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


def _pictures(ddpm, state):
    rng = _key(ddpm.config, SAMPLES)
    return ddpm.sample(state.ema_params, rng, ddpm.config.train.num_samples)


def _due(done: int, every: int, steps: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)


def _key(config: Config, number):
    return jax.random.fold_in(seed_key(config.seed), number)


_step = jax.jit(train_step, static_argnums=0, donate_argnums=1)


@functools.partial(jax.jit, static_argnums=0)
def _loss(ddpm, params, rng, images):
    return ddpm.loss(params, rng, to_float(images))
