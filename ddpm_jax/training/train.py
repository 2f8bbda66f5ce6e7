"""The loop around the updates: checkpoints, held-out loss, pictures, signals."""

import contextlib
import dataclasses
import functools
import logging
import time

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ddpm_jax.config import Config
from ddpm_jax.data import Source, from_array, load_source, open_batches, split
from ddpm_jax.data.images import to_float
from ddpm_jax.ddpm import DDPM
from ddpm_jax.devices.mesh import (
    describe_devices,
    fetch,
    local_rows,
    make_mesh,
    mesh_of,
    place,
    replicate,
    state_shardings,
)
from ddpm_jax.devices.processes import agreed
from ddpm_jax.devices.rows import full_batches
from ddpm_jax.errors import DataLost, NonFiniteLoss, UserError
from ddpm_jax.keys import HOLDOUT, SAMPLES
from ddpm_jax.storage.checkpoint import Checkpoints, abstract_like
from ddpm_jax.storage.run import start_run, starts_from
from ddpm_jax.training.flops import model_flops_rate
from ddpm_jax.training.logs import open_log
from ddpm_jax.training.signals import StopSignals
from ddpm_jax.training.update import TrainState, Update, check_batch, init_state, run_key
from ddpm_jax.weights.load import weights_for

log = logging.getLogger(__name__)


def holdout_loss(ddpm: DDPM, params, source: Source, indices: np.ndarray) -> float:
    """The mean loss over the held-out images `indices` of `source`.

    Each image has the same t and noise at every call.
    """
    config = ddpm.config
    mesh = mesh_of(params)
    total = 0.0
    for rows, count in full_batches(len(indices), config.train.batch_size):
        rng = jax.random.fold_in(run_key(config, HOLDOUT), rows[0])
        losses = _loss(ddpm, params, rng, place(source.read(indices[rows]), mesh))
        total += float(np.sum(fetch(losses)[:count], dtype=np.float64))
    return total / len(indices)


def fit(
    config: Config,
    workdir: epath.PathLike,
    images: np.ndarray | None = None,
    *,
    init_from: epath.PathLike | None = None,
) -> TrainState:
    """Trains `config` in `workdir`, or goes on with what is there; returns the last state.

    `images` uint8 [N,H,W,C] take the place of config.data.source. A new run starts from the weights of
    `init_from` (what `load` takes) instead of fresh ones, and their average from them too. Ctrl-C and
    SIGTERM end it after the step at hand, with everything saved. Raises UserError for what cannot be
    used, NonFiniteLoss if training diverges.
    """
    if images is None:
        source = load_source(config.data)
    else:
        source = from_array(images, config.data.image_shape)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, source="array"))
    train, held_out = split(source, config.data.holdout)
    held_out = held_out[
        np.linspace(0, len(held_out) - 1, min(len(held_out), config.train.eval_images)).astype(int)
    ]
    mesh = make_mesh(config.parallel.devices, config.parallel.fsdp)
    check_batch(config.train, mesh.size)

    ddpm = DDPM(config)
    first = None if init_from is None else weights_for(ddpm, init_from, mesh)
    # Signals are held back until the last checkpoint is on disk.
    with (
        start_run(
            workdir, config, source, describe_devices(mesh), first and first.label
        ) as workdir,
        StopSignals() as signals,
        contextlib.closing(Checkpoints(workdir, config.checkpoint.keep)) as checkpoints,
    ):
        log.info(
            "data: %d images, %d of them to train on, fingerprint %s",
            len(source),
            len(train),
            source.fingerprint,
        )
        log.info(
            "run: %s (config.json, run.json, metrics.jsonl, checkpoints, samples, tensorboard)",
            workdir,
        )
        state = _first_state(ddpm, mesh, checkpoints, first and first.params, workdir)
        step, steps = int(state.step), config.train.steps
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        log.info(
            "%d parameters on %s, step %d of %d", parameters, describe_devices(mesh), step, steps
        )
        rows = local_rows(mesh, config.train.batch_size)
        batches = open_batches(
            source, train, config.train.batch_size, config.seed, config.data, rows
        )
        with (
            contextlib.closing(batches),
            contextlib.closing(open_log(workdir, step, steps)) as run_log,
        ):
            update = Update(ddpm, mesh, batches)
            return _train(update, state, held_out, checkpoints, run_log, signals)


def _first_state(
    ddpm: DDPM, mesh: Mesh, checkpoints: Checkpoints, params, workdir: epath.Path
) -> TrainState:
    """The newest checkpoint's state, or one from `params`, None for fresh ones: shapes first, then arrays."""
    init = functools.partial(init_state, ddpm)
    shapes = jax.eval_shape(init)
    shardings = state_shardings(shapes, mesh)
    parts = checkpoints.restore(abstract_like(shapes, shardings)._asdict())
    if parts is not None:
        return TrainState(**parts)
    if params is None and starts_from(workdir):
        raise UserError(
            f"{workdir}: it has no checkpoint yet; name the weights it starts from again with --init-from"
        )
    return jax.jit(init, out_shardings=shardings)(params)


def _train(update, state, held_out, checkpoints, run_log, signals) -> TrainState:
    """The loop, from state.step to config.train.steps or a signal."""
    ddpm, mesh, config = update.ddpm, update.mesh, update.ddpm.config
    done, steps = int(state.step), config.train.steps
    window, stopping = (
        _Window(done, checkpoints, config.train.batch_size, model_flops_rate(ddpm, state, mesh)),
        None,
    )
    try:
        while done < steps and not stopping:
            state, metrics = update(state, done)
            window.add(metrics)
            run_log.advance()
            done += 1

            stopping = signals.stop_after(done)
            evaluates = (
                len(held_out)
                and config.train.eval_every
                and _due(done, config.train.eval_every, steps)
            )
            draws = not stopping and _due(done, config.train.sample_every, steps)
            # Drawing may take longer than the time between SIGTERM and SIGKILL, so what is learned is saved before.
            saves = done == steps or stopping or draws or done % config.checkpoint.every == 0
            # A line never reaches across a checkpoint, so that an interrupted run writes the same ones.
            if saves or evaluates or draws or done % config.train.log_every == 0:
                evaluated = {}
                if evaluates:
                    ema_params = replicate(state.ema_params, mesh)
                    evaluated["holdout_loss"] = holdout_loss(
                        ddpm, ema_params, update.batches.source, held_out
                    )
                run_log.tick(done, window.close(**evaluated))
                checkpoints.check()
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
    elif not agreed(bool(run_log.has_pictures(done))):  # The run ended before they were drawn.
        run_log.pictures(done, _pictures(ddpm, state, mesh))
    return state


class _Window:
    """The metrics of the updates since the last line, left on the device until the next one."""

    def __init__(
        self, step: int, checkpoints: Checkpoints, batch_size: int, full_rate: float | None
    ):
        self.step, self.checkpoints = step, checkpoints
        self.batch_size, self.full_rate = batch_size, full_rate
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
        rate = steps / (time.monotonic() - self.started)
        rates = {"steps_per_s": rate, "images_per_s": rate * self.batch_size}
        if self.full_rate is not None:
            rates["mfu"] = rate / self.full_rate
        return {**means, "steps": steps, **rates, **evaluated}

    def _check(self, step, values) -> None:
        for name, value in values.items():
            if not np.isfinite(value):
                self.checkpoints.wait()
                last = self.checkpoints.latest_step
                good = (
                    "there is no checkpoint yet"
                    if last is None
                    else f"the last good checkpoint is {last}"
                )
                raise NonFiniteLoss(
                    f"{name} is {value} at step {step}; {good}. Try a lower optim.learning_rate"
                )


def _pictures(ddpm, state, mesh):
    rng = run_key(ddpm.config, SAMPLES)
    return ddpm.sample(replicate(state.ema_params, mesh), rng, ddpm.config.train.num_samples)


def _due(done: int, every: int, steps: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)


@functools.partial(jax.jit, static_argnums=0)
def _loss(ddpm, params, rng, images):
    return ddpm.loss(params, rng, to_float(images))
