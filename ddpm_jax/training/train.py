"""The training loop: updates, held-out loss, checkpoints, pictures, signals."""

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Collection
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from numpy.typing import ArrayLike

from ddpm_jax.config import Config
from ddpm_jax.data import Source, from_array, load_source, open_batches, split
from ddpm_jax.data.class_names import numbered_words
from ddpm_jax.data.guard import leave_unguarded_reader
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
from ddpm_jax.errors import DataLost, NonFiniteLoss, NonFiniteSamples, UserError
from ddpm_jax.guidance import NO_CLASS
from ddpm_jax.keys import HOLDOUT, SAMPLES
from ddpm_jax.shapes import PyTree
from ddpm_jax.storage.checkpoint import Checkpoints, abstract_like, last_step
from ddpm_jax.storage.run import start_run, starts_from
from ddpm_jax.training.flops import model_flops_rate
from ddpm_jax.training.idle import idle_settings
from ddpm_jax.training.logs import open_log
from ddpm_jax.training.signals import StopSignals
from ddpm_jax.training.update import TrainState, Update, check_batch, init_state, run_key
from ddpm_jax.weights.load import weights_for

log = logging.getLogger(__name__)


def holdout_loss(ddpm: DDPM, params: PyTree, source: Source, indices: np.ndarray) -> float:
    """The mean loss over the held-out images `indices` of `source`.

    Each image gets the same t and noise in every call.
    """
    config = ddpm.config
    mesh = mesh_of(params)
    total = 0.0
    for rows, count in full_batches(len(indices), config.train.batch_size):
        rng = jax.random.fold_in(run_key(config, HOLDOUT), rows[0])
        images = place(source.read(indices[rows]), mesh)
        labels = None
        if config.model.num_classes and source.labels is not None:
            labels = place(source.labels[indices[rows]], mesh)
        losses = _loss(ddpm, params, rng, images, labels)
        total += float(np.sum(fetch(losses)[:count], dtype=np.float64))
    return total / len(indices)


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

    `images` uint8 [N,H,W,C] and their `labels` [N] replace config.data.source. With `init_from`
    (anything that `load` takes), a new run and its average start from those weights instead of
    fresh ones. Ctrl-C and SIGTERM end training after the current step, with everything saved.
    Settings without an effect in this run are named in the log; some only if they are among
    `given`, the names of those that the user asked for ("train.sample_every"). Raises UserError if
    an argument cannot be used or the run is past config.train.steps already, NonFiniteLoss if
    training diverges.
    """
    leave_unguarded_reader()
    config, source = _with_source(config, images, labels)
    config = with_classes(config, source)
    train, held_out = split(source, config.data.holdout)
    held_out = _spread(held_out, config.train.eval_images)
    mesh = make_mesh(config.parallel.devices, config.parallel.fsdp)
    check_batch(config.train, mesh.size)
    _check_steps(workdir, config.train.steps)

    ddpm = DDPM(config)
    devices = describe_devices(mesh)
    params = None
    label = None
    if init_from is not None:
        initial = weights_for(ddpm, init_from, mesh)
        params = initial.params
        label = initial.label
    # Signals must not end the process before the last checkpoint is on disk.
    with (
        start_run(workdir, config, source, devices, label) as run,
        StopSignals() as signals,
        contextlib.closing(Checkpoints(run, config.checkpoint.keep)) as checkpoints,
    ):
        log.info(
            "data: %d images, %d of them for training, fingerprint %s",
            len(source),
            len(train),
            source.fingerprint,
        )
        if config.data.class_names:
            log.info("data: the classes are %s", numbered_words(config.data.class_names))
        _warn_of_idle(config, source, len(held_out), mesh.size, given)
        log.info(
            "run directory: %s (config, metrics.jsonl, checkpoints, samples, tensorboard)",
            run,
        )
        state = _first_state(ddpm, mesh, checkpoints, params, run)
        steps = config.train.steps
        _log_start(state, steps, devices, init_from)

        batch_size = config.train.batch_size
        rows = local_rows(mesh, batch_size)
        batches = open_batches(source, train, batch_size, config.seed, config.data, rows)
        with (
            contextlib.closing(batches),
            contextlib.closing(open_log(run, int(state.step), steps)) as run_log,
        ):
            update = Update(ddpm, mesh, batches)
            return _train(update, state, held_out, checkpoints, run_log, signals)


def _with_source(
    config: Config, images: np.ndarray | None, labels: ArrayLike | None
) -> tuple[Config, Source]:
    """(the config, the images): those of config.data, or `images`, which the config then names."""
    if images is None:
        if labels is not None:
            raise UserError("labels: belong to images that are given, too; pass both")
        return config, load_source(config.data)
    source = from_array(images, config.data.image_shape, labels)
    data = dataclasses.replace(config.data, source="array")
    return dataclasses.replace(config, data=data), source


def with_classes(config: Config, source: Source) -> Config:
    """The config with the number of the data's classes in the place of auto, and their names.

    Raises UserError if the data have no labels, or labels or names that the model has no class for.
    """
    wanted = config.model.num_classes
    if wanted is None:
        return config
    if source.labels is None:
        raise UserError(
            "model.num_classes: these images have no labels; sort them into a folder a class, or "
            "leave it out"
        )
    least = int(source.labels.min())
    last = int(source.labels.max())
    given = config.data.class_names
    if wanted == "auto":
        wanted = len(given) or last + 1
    if least < NO_CLASS or last >= wanted or wanted < 1:
        raise UserError(
            f"model.num_classes: {wanted} classes are 0 to {wanted - 1}, and -1 is none, but the "
            f"labels of these images are from {least} to {last}; number them so, or raise it"
        )
    if len(given) > wanted:
        raise UserError(
            f"data.class_names: {len(given)} names for {wanted} classes; leave some out, or raise "
            "model.num_classes"
        )
    names = given or (source.class_names or ())[:wanted]
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_classes=wanted),
        data=dataclasses.replace(config.data, class_names=names),
    )


def _check_steps(workdir: epath.PathLike, steps: int) -> None:
    """Raises UserError if the run in `workdir` is past `steps`: nothing would be trained."""
    last = last_step(workdir)
    if last > steps:
        raise UserError(
            f"train.steps: {steps}, but the run in {workdir} is at step {last} already; raise it, "
            "or choose another --workdir"
        )


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


def _warn_of_idle(
    config: Config, source: Source, held_out: int, devices: int, given: Collection[str]
) -> None:
    lines = idle_settings(
        config,
        streamed=source.streamed,
        held_out=held_out,
        devices=devices,
        given=given,
        has_no_class=source.labels is not None and NO_CLASS in source.labels,
    )
    for line in lines:
        log.warning("%s", line)


def _spread(indices: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of `indices`, evenly spaced."""
    places = np.linspace(0, len(indices) - 1, min(len(indices), most)).astype(int)
    return indices[places]


def _first_state(
    ddpm: DDPM, mesh: Mesh, checkpoints: Checkpoints, params, workdir: epath.Path
) -> TrainState:
    """The state of the newest checkpoint, or else a new one from `params`; None means fresh ones.

    Its shapes are found first, so that every array is made where it belongs on the mesh.
    """
    abstract, init = _init_on(ddpm, mesh)
    parts = checkpoints.restore(abstract._asdict())
    if parts is not None:
        return TrainState(**parts)
    if params is None and starts_from(workdir):
        raise UserError(
            f"{workdir}: this run has no checkpoint yet; "
            "name the weights that it starts from with --init-from"
        )
    return init(params)


@functools.lru_cache(maxsize=16)
def _init_on(ddpm: DDPM, mesh: Mesh):
    """(the shapes of a state with their places on the mesh, the program that makes the first).

    They are kept for the next run of the same model in this process.
    """
    init = functools.partial(init_state, ddpm)
    shapes = jax.eval_shape(init)
    shardings = state_shardings(shapes, mesh)
    return abstract_like(shapes, shardings), jax.jit(init, out_shardings=shardings)


def _train(update, state, held_out, checkpoints, run_log, signals) -> TrainState:
    """Updates `state` until config.train.steps or a signal; returns the last state."""
    ddpm = update.ddpm
    mesh = update.mesh
    config = ddpm.config
    steps = config.train.steps
    done = int(state.step)
    full_rate = model_flops_rate(ddpm, state, mesh)
    window = _Window(done, checkpoints, config.train.batch_size, full_rate)
    stopping = None
    if done == steps and not agreed(bool(run_log.has_pictures(done))):
        # An earlier start ended before drawing.
        stopping = _draw(ddpm, state, mesh, run_log, signals)
    try:
        while done < steps and not stopping:
            state, metrics = update(state, done)
            window.add(metrics)
            run_log.advance()
            done += 1
            stopping = signals.stop_after(done)
            due = _due_after(done, config, bool(stopping), len(held_out) > 0)

            evaluated = {}
            if due.evaluate:
                evaluated["holdout_loss"] = _evaluate(update, state, held_out)
            if due.log:
                run_log.tick(done, window.close(**evaluated))
                checkpoints.check()
            if due.save:
                checkpoints.save(done, state._asdict())
            if due.draw:
                stopping = _draw(ddpm, state, mesh, run_log, signals)
            if due.log:
                window.restart_clock()
    except DataLost:
        # A checkpoint needs all processes. With several, the others do not know of the lost data.
        if jax.process_count() == 1:
            if window.metrics:
                run_log.tick(done, window.close())
            checkpoints.save(done, state._asdict())
        raise
    if stopping:
        log.info(
            "%s: saved after step %d of %d; run the same command to resume", stopping, done, steps
        )
    return state


class _Due(NamedTuple):
    """The work that is due after an update, in the order in which it is done."""

    evaluate: bool
    log: bool
    save: bool
    draw: bool


def _due_after(done: int, config: Config, stopping: bool, has_held_out: bool) -> _Due:
    """The work that is due once `done` updates are made; `stopping` if a signal came."""
    train = config.train
    evaluate = (
        has_held_out and train.eval_every > 0 and _is_due(done, train.eval_every, train.steps)
    )
    draw = not stopping and _is_due(done, train.sample_every, train.steps)
    # Drawing may take longer than the time between SIGTERM and SIGKILL, so save before it.
    save = stopping or draw or _is_due(done, config.checkpoint.every, train.steps)
    # No line spans a checkpoint, so that an interrupted run writes the same lines.
    log_line = save or evaluate or done % train.log_every == 0
    return _Due(evaluate, log_line, save, draw)


def _is_due(done: int, every: int, steps: int) -> bool:
    """Whether work that is done after every `every` updates (0: none) and after the last is due."""
    return done == steps or (every > 0 and done % every == 0)


def _evaluate(update: Update, state: TrainState, held_out: np.ndarray) -> float:
    """The held-out loss of the averaged weights."""
    params = replicate(state.ema_params, update.mesh)
    return holdout_loss(update.ddpm, params, update.batches.source, held_out)


def _draw(ddpm, state, mesh, run_log, signals) -> str | None:
    """Draws samples and writes them; the state must be saved before.

    Returns the name of the signal that ended it, else None.
    """
    step = int(state.step)
    try:
        x = _pictures(ddpm, state, mesh, _UntilSignal(signals))
    except _Stopped:
        return signals.received
    except NonFiniteSamples as error:
        log.warning("samples of step %d: none; %s", step, error)
        return None
    run_log.pictures(step, x)
    return None


def _pictures(ddpm, state, mesh, progress):
    """Samples of the averaged weights, from the same noise every time."""
    rng = run_key(ddpm.config, SAMPLES)
    params = replicate(state.ema_params, mesh)
    n = ddpm.config.train.num_samples
    classes = ddpm.config.model.num_classes
    labels = np.arange(n) % classes if classes else None  # All in turn.
    return ddpm.sample(params, rng, n, labels=labels, progress=progress)


class _Stopped(Exception):
    """A signal came while samples were drawn."""


class _UntilSignal:
    """The progress of a chain that a signal ends."""

    def __init__(self, signals: StopSignals):
        self.signals = signals

    def update(self, _steps: int) -> None:
        """Raises _Stopped if a signal has come."""
        if self.signals.received:
            raise _Stopped


class _Window:
    """Collects the metrics of the updates since the last line, on the device until the next."""

    def __init__(
        self, step: int, checkpoints: Checkpoints, batch_size: int, full_rate: float | None
    ):
        self.step = step
        self.checkpoints = checkpoints
        self.batch_size = batch_size
        self.full_rate = full_rate
        self.metrics: list[dict] = []
        self.restart_clock()

    def add(self, metrics: dict) -> None:
        """Adds the metrics of one update."""
        self.metrics.append(metrics)

    def restart_clock(self) -> None:
        """Restarts the timing. It must leave out work that is no update, such as a checkpoint."""
        self.started = time.monotonic()

    def close(self, **evaluated: float) -> dict[str, float]:
        """Empties the window. Returns the means over it, its rates, and `evaluated`.

        Raises NonFiniteLoss naming the first value that is not finite.
        """
        metrics = jax.device_get(self.metrics)
        steps = len(metrics)
        self.metrics = []
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
            if np.isfinite(value):
                continue
            self.checkpoints.wait()
            last = self.checkpoints.latest_step
            good = f"the last good checkpoint is {last}"
            if last is None:
                good = "there is no checkpoint yet"
            raise NonFiniteLoss(
                f"{name} is {value} at step {step}; {good}; try a lower optim.learning_rate"
            )


@functools.partial(jax.jit, static_argnums=0)
def _loss(ddpm, params, rng, images, labels=None):
    return ddpm.loss(params, rng, to_float(images), labels=labels)
