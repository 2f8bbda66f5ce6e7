"""The training loop: updates, held-out loss, checkpoints, pictures, signals."""

import contextlib
import logging
from collections.abc import Collection
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from numpy.typing import ArrayLike

from ddpm_jax.config import Config, Train
from ddpm_jax.data import open_batches
from ddpm_jax.devices.mesh import describe_devices, local_rows, replicate
from ddpm_jax.devices.processes import agreed
from ddpm_jax.errors import DataLost, NonFiniteSamples
from ddpm_jax.keys import SAMPLES
from ddpm_jax.storage.checkpoint import Checkpoints
from ddpm_jax.storage.run import start_run
from ddpm_jax.training.flops import model_flops_rate
from ddpm_jax.training.logs import open_log
from ddpm_jax.training.prepare import Prepared, abstract_state, describe, new_state, prepare
from ddpm_jax.training.quality import Quality, names_of_samples
from ddpm_jax.training.signals import Stopped, StopSignals, UntilSignal
from ddpm_jax.training.update import TrainState, Update, run_key
from ddpm_jax.training.watch import Watch, check_watch
from ddpm_jax.training.window import Window

log = logging.getLogger(__name__)


def fit(
    config: Config,
    workdir: epath.PathLike,
    images: np.ndarray | None = None,
    labels: ArrayLike | None = None,
    *,
    init_from: epath.PathLike | None = None,
    given: Collection[str] = (),
) -> TrainState:
    """Trains `config` in `workdir`, or resumes the run there; returns the last state.

    `images` [N,H,W,C], uint8 unless config.data.values says otherwise, and their `labels` [N]
    replace config.data.source. With `init_from` (anything that `load` takes), a new run and its
    average start from those weights instead of fresh ones. Ctrl-C and SIGTERM end training after
    the current step, with everything saved.
    Settings without an effect in this run are named in the log; some only if they are among
    `given`, the names of those that the user asked for ("train.sample_every"). Raises UserError if
    an argument cannot be used or the run is past config.train.steps already, NonFiniteLoss if
    training diverges.
    """
    prepared = prepare(config, workdir, images, labels, init_from)
    check_watch(prepared)
    config = prepared.config
    label = None if prepared.initial is None else prepared.initial.label
    devices = describe_devices(prepared.mesh)
    with start_run(workdir, config, prepared.source, devices, label) as run:
        describe(prepared, given)
        log.info(
            "run directory: %s (config, metrics.jsonl, checkpoints, samples, tensorboard)",
            run,
        )
        quality = None
        if config.train.evaluate_every:  # Before signals are caught: it may train a classifier.
            quality = Quality(prepared, run / "evaluation" / "real")
        return _train_in(run, prepared, quality, devices, init_from)


def _train_in(
    run: epath.Path,
    prepared: Prepared,
    quality: Quality | None,
    devices: str,
    init_from: epath.PathLike | None,
) -> TrainState:
    """Trains in the run directory `run`; returns the last state."""
    config = prepared.config
    steps = config.train.steps
    # Signals must not end the process before the last checkpoint is on disk.
    with (
        StopSignals() as signals,
        contextlib.closing(Checkpoints(run, config.checkpoint.keep)) as checkpoints,
    ):
        state = _first_state(prepared, checkpoints, run)
        _log_start(state, steps, devices, init_from)
        rows = local_rows(prepared.mesh, config.train.batch_size)
        batches = open_batches(
            prepared.source, prepared.train, config.train.batch_size, config.seed, config.data, rows
        )
        with (
            contextlib.closing(batches),
            contextlib.closing(open_log(run, int(state.step), steps)) as run_log,
        ):
            update = Update(prepared.ddpm, prepared.mesh, batches)
            watch = Watch(prepared, quality, run, checkpoints)
            return _train(update, state, watch, checkpoints, run_log, signals)


def _first_state(prepared: Prepared, checkpoints: Checkpoints, run: epath.Path) -> TrainState:
    """The state of the newest checkpoint, or else a new one."""
    parts = checkpoints.restore(abstract_state(prepared.ddpm, prepared.mesh)._asdict())
    return new_state(prepared, run) if parts is None else TrainState(**parts)


def _log_start(
    state: TrainState, steps: int, devices: str, init_from: epath.PathLike | None
) -> None:
    step = int(state.step)
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    log.info("%d parameters on %s, step %d of %d", size, devices, step, steps)
    if step and init_from is not None:
        log.info("init_from: this run resumes from its own checkpoint")
    if step == steps:
        log.info("this run is complete; raise train.steps to train on")
    else:
        log.info("compiling the update; the first step waits for it")


def _train(update, state, watch, checkpoints, run_log, signals) -> TrainState:
    """Updates `state` until config.train.steps or a signal; returns the last state."""
    ddpm = update.ddpm
    mesh = update.mesh
    config = ddpm.config
    steps = config.train.steps
    done = int(state.step)
    stopping = _catch_up(ddpm, state, mesh, watch, run_log, signals)
    window = Window(done, checkpoints, config.train.batch_size, model_flops_rate(ddpm, state, mesh))
    try:
        while done < steps and not stopping:
            state, metrics = update(state, done)
            window.add(metrics)
            run_log.advance()
            done += 1
            stopping = signals.stop_after(done)
            due = _due_after(done, config, bool(stopping), watch.holds_out)
            if due.looks_at_state:
                state = update.settled(state)

            improved = False
            if due.log:
                values = window.close(watch.compare(state) if due.compare else {})
                run_log.tick(done, values)
                checkpoints.check()
                improved = watch.improves(done, values)
            if due.save or improved:
                checkpoints.save(done, state._asdict())
            if due.draw:
                stopping = _draw(ddpm, state, mesh, run_log, signals)
            if due.evaluate and not stopping:
                stopping = _evaluate(state, watch, run_log, signals)
            if due.log:
                window.restart_clock()
    except DataLost:
        # A checkpoint needs all processes. With several, the others do not know of the lost data.
        if jax.process_count() == 1:
            if window.metrics:
                run_log.tick(done, window.close())
            checkpoints.save(done, update.settled(state)._asdict())
        raise
    if stopping:
        log.info(
            "%s: saved after step %d of %d; run the same command to resume", stopping, done, steps
        )
    watch.conclude()
    return state


def _catch_up(ddpm, state, mesh, watch, run_log, signals) -> str | None:
    """Does what was due after the last step of an earlier start that ended before it.

    Returns the name of the signal that ended it, else None.
    """
    step = int(state.step)
    train = ddpm.config.train
    stopping = None
    at_end = step == train.steps and _draws(step, train)
    if at_end and not agreed(bool(run_log.has_pictures(step))):
        stopping = _draw(ddpm, state, mesh, run_log, signals)
    if stopping or not step or not _evaluates(step, train):
        return stopping
    name = names_of_samples(ddpm.config)[0]
    if not agreed(bool(run_log.has_values(step, name))):
        stopping = _evaluate(state, watch, run_log, signals)
    return stopping


class _Due(NamedTuple):
    """The work that is due after an update, in the order in which it is done."""

    compare: bool
    log: bool
    save: bool
    draw: bool
    evaluate: bool

    @property
    def looks_at_state(self) -> bool:
        """Whether some of it needs the state; a line of the log alone does not."""
        return self.compare or self.save or self.draw or self.evaluate


def _due_after(done: int, config: Config, stopping: bool, has_held_out: bool) -> _Due:
    """The work that is due once `done` updates are made; `stopping` if a signal came."""
    train = config.train
    compare = has_held_out and train.eval_every > 0 and _is_due(done, train.eval_every, train.steps)
    draw = not stopping and _draws(done, train)
    evaluate = not stopping and _evaluates(done, train)
    # Drawing may take longer than the time between SIGTERM and SIGKILL, so save before it.
    save = stopping or draw or evaluate or _is_due(done, config.checkpoint.every, train.steps)
    # No line spans a checkpoint, so that an interrupted run writes the same lines.
    log_line = save or compare or done % train.log_every == 0
    return _Due(compare, log_line, save, draw, evaluate)


def _draws(done: int, train: Train) -> bool:
    """Whether a grid of samples is due after `done` updates."""
    return train.num_samples > 0 and _is_due(done, train.sample_every, train.steps)


def _evaluates(done: int, train: Train) -> bool:
    """Whether an evaluation is due after `done` updates."""
    return train.evaluate_every > 0 and _is_due(done, train.evaluate_every, train.steps)


def _is_due(done: int, every: int, steps: int) -> bool:
    """Whether work that is done after every `every` updates (0: none) and after the last is due."""
    return done == steps or (every > 0 and done % every == 0)


def _evaluate(state, watch, run_log, signals) -> str | None:
    """Measures FID, KID and bits/dim and logs them; the state must be saved before.

    Returns the name of the signal that ended it, else None.
    """
    step = int(state.step)
    try:
        values = watch.evaluate(state, UntilSignal(signals))
    except Stopped:
        return signals.received
    except NonFiniteSamples as error:
        log.warning("evaluation of step %d: none; %s", step, error)
        return None
    run_log.evaluated(step, values)
    watch.improves(step, values)
    return None


def _draw(ddpm, state, mesh, run_log, signals) -> str | None:
    """Draws samples and writes them; the state must be saved before.

    Returns the name of the signal that ended it, else None.
    """
    step = int(state.step)
    try:
        x = _pictures(ddpm, state, mesh, UntilSignal(signals))
    except Stopped:
        return signals.received
    except NonFiniteSamples as error:
        log.warning("samples of step %d: none; %s", step, error)
        return None
    run_log.pictures(step, ddpm.to_picture(x))
    return None


def _pictures(ddpm, state, mesh, progress):
    """Samples of the averaged weights, from the same noise every time."""
    rng = run_key(ddpm.config, SAMPLES)
    params = replicate(state.ema_params, mesh)
    n = ddpm.config.train.num_samples
    classes = ddpm.config.model.num_classes
    labels = np.arange(n) % classes if classes else None  # All in turn.
    return ddpm.sample(params, rng, n, labels=labels, progress=progress)
