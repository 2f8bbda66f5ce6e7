"""A training up to its third update: what it takes, as measured; nothing is written."""

import contextlib
import logging
import resource
import sys
import time
from collections.abc import Collection
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from numpy.typing import ArrayLike
from tqdm import tqdm

from ddpm_jax.config import Config
from ddpm_jax.data import open_batches
from ddpm_jax.devices.mesh import describe_devices, local_rows
from ddpm_jax.errors import NonFiniteLoss
from ddpm_jax.storage.files import check_writable, path_of
from ddpm_jax.storage.restore import newest_of
from ddpm_jax.storage.run import check_run
from ddpm_jax.training.prepare import Prepared, abstract_state, describe, new_state, prepare
from ddpm_jax.training.update import TrainState, Update
from ddpm_jax.training.watch import check_watch

log = logging.getLogger(__name__)

UPDATES = 3


class DryRun(NamedTuple):
    """What a training takes, measured in UPDATES updates."""

    devices: str
    parameters: int
    step: int
    """The updates that are made already: the run resumes from there; 0 for a new run."""
    steps: int
    """train.steps."""
    loss: float
    """Of the last of the updates."""
    memory: int
    """Peak bytes in use on the fullest device, or of this process where devices do not say."""
    of_device: bool
    """Whether `memory` is a device's."""
    room: int | None
    """Bytes of that device's memory, or None where they are not known."""
    first_s: float
    """Seconds of the first update, most of which is compiling."""
    update_s: float
    """Seconds of one update after the first, the mean."""

    @property
    def seconds_left(self) -> float:
        """Of the updates up to train.steps alone, without compiling, evaluations and saves."""
        return (self.steps - self.step) * self.update_s


def dry_run(
    config: Config,
    workdir: epath.PathLike,
    images: np.ndarray | None = None,
    labels: ArrayLike | None = None,
    *,
    init_from: epath.PathLike | None = None,
    given: Collection[str] = (),
) -> DryRun:
    """Does all that `fit` does up to its third update, and writes nothing.

    The arguments are those of `fit`, and it raises UserError and NonFiniteLoss where `fit` does. An
    existing run in `workdir` is read and stays as it is.
    """
    prepared = prepare(config, workdir, images, labels, init_from)
    check_watch(prepared)
    workdir = path_of(workdir)
    label = None if prepared.initial is None else prepared.initial.label
    check_run(workdir, prepared.config, prepared.source, label)
    check_writable(workdir / "run.json")
    describe(prepared, given)
    state = _state(prepared, workdir)
    step = int(state.step)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    log.info("three updates from step %d; the first is compiled", step)
    loss, seconds = _updates(prepared, state, step)
    memory, room = _peak(prepared)
    return DryRun(
        devices=describe_devices(prepared.mesh),
        parameters=parameters,
        step=step,
        steps=prepared.config.train.steps,
        loss=loss,
        memory=_peak_of_process() if memory is None else memory,
        of_device=memory is not None,
        room=room,
        first_s=seconds[0],
        update_s=sum(seconds[1:]) / (len(seconds) - 1),
    )


def table(result: DryRun) -> str:
    """The result as text."""
    run = f"would make {result.steps:,} updates"
    if result.step:
        run = f"would resume from step {result.step:,} of {result.steps:,}"
    if result.step == result.steps:
        run = f"is complete at step {result.step:,}; raise train.steps to train on"
    compiling = max(0.0, result.first_s - result.update_s)
    where = "peak of a device" if result.of_device else "peak of this process"
    of_room = "" if result.room is None else f" of {_gib(result.room)}"
    rows = {
        "devices": result.devices,
        "parameters": f"{result.parameters:,}",
        "run": run,
        "memory": f"{_gib(result.memory)}{of_room}, {where}",
        "compiling": f"{compiling:.1f} s, once",
        "update": f"{result.update_s:.4g} s, {1 / result.update_s:.4g} a second",
        "time left": f"{tqdm.format_interval(result.seconds_left)} of updates, without compiling, "
        "evaluations and checkpoints",
        "written": "nothing",
    }
    return "\n".join(f"{name:12}{value}" for name, value in rows.items())


def _state(prepared: Prepared, workdir: epath.Path) -> TrainState:
    """The state that the run would train from."""
    abstract = abstract_state(prepared.ddpm, prepared.mesh)
    found = newest_of(workdir, abstract._asdict())
    if found is None:
        return new_state(prepared, workdir)
    step, parts, damaged = found
    for bad, reason in damaged.items():
        log.warning("checkpoint %d is damaged (%s): the run would use %d", bad, reason, step)
    return TrainState(**parts)


def _updates(prepared: Prepared, state: TrainState, step: int) -> tuple[float, list[float]]:
    """(the last loss, the seconds of each of UPDATES updates); takes the state's memory."""
    config = prepared.config
    size = config.train.batch_size
    rows = local_rows(prepared.mesh, size)
    batches = open_batches(prepared.source, prepared.train, size, config.seed, config.data, rows)
    seconds = []
    with contextlib.closing(batches):
        update = Update(prepared.ddpm, prepared.mesh, batches)
        for number in range(step, step + UPDATES):
            begin = time.perf_counter()
            state, metrics = update(state, number)
            values = jax.device_get(metrics)
            seconds.append(time.perf_counter() - begin)
            for name, value in values.items():
                if not np.isfinite(value):
                    raise NonFiniteLoss(
                        f"{name} is {value} at step {number + 1}; try a lower optim.learning_rate"
                    )
    return float(values["loss"]), seconds


def _peak(prepared: Prepared) -> tuple[int | None, int | None]:
    """(peak bytes, bytes there are) of the fullest of this process's devices; None if not known."""
    stats = [device.memory_stats() or {} for device in prepared.mesh.local_devices]
    fullest = max(stats, key=lambda each: each.get("peak_bytes_in_use", 0))
    return fullest.get("peak_bytes_in_use"), fullest.get("bytes_limit")


def _peak_of_process() -> int:
    """The most bytes of memory that this process has had."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # Linux counts in KiB.


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
