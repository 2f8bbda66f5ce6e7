"""The reports of a run: metrics.jsonl, TensorBoard, sample pictures and a progress bar."""

import contextlib
import io
import json
import logging
import time
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
from etils import epath
from tensorboardX import record_writer, summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tqdm.contrib.logging import logging_redirect_tqdm

from ddpm_jax.data.images import grid, png
from ddpm_jax.devices.processes import is_first
from ddpm_jax.devices.progress import progress_bar
from ddpm_jax.storage.best import METRICS, values_of
from ddpm_jax.storage.files import append_line, parse_json, write_file

log = logging.getLogger(__name__)

Values: TypeAlias = dict[str, Any]
"""What a line of the log holds: numbers by their names, or lists of numbers and None."""


def open_log(workdir: epath.Path, step: int, steps: int) -> "RunLog | NoLog":
    """The log of a run that trains from `step` to `steps`. Only process 0 keeps one."""
    return RunLog(workdir, step, steps) if is_first() else NoLog()


class NoLog:
    """Stands in for a RunLog in all processes but the first, and does nothing."""

    def advance(self) -> None:
        """Does nothing."""

    def tick(self, step: int, metrics: Values) -> None:
        """Does nothing."""

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """Does nothing."""

    def pictures(self, step: int, x: np.ndarray) -> None:
        """Does nothing."""

    def has_pictures(self, step: int) -> bool:
        """False; the processes agree on the answer of process 0."""
        return False

    def has_values(self, step: int, name: str) -> bool:
        """False, likewise."""
        return False

    def close(self) -> None:
        """Does nothing."""


class RunLog:
    """Writes the run's reports to `workdir`. Opening it drops lines and scalars after `step`.

    An interrupted run wrote those after its last checkpoint. Their updates are made again.
    """

    def __init__(self, workdir: epath.Path, step: int, steps: int):
        self.workdir = workdir
        self.lines_file = workdir / METRICS
        self._keep_lines_until(step)
        self.tensorboard = _TensorBoard(workdir, step)
        self.progress = progress_bar(
            total=steps, initial=step, unit="step", leave=True, lines=False
        )
        self._redirect = logging_redirect_tqdm([logging.getLogger("ddpm_jax")])
        self._redirect.__enter__()
        self.started = time.monotonic()
        self.start_step = step

    def advance(self) -> None:
        """Moves the progress bar by one step."""
        self.progress.update()

    def tick(self, step: int, metrics: Values) -> None:
        """Writes one line of metrics.jsonl, and the same values to TensorBoard and the screen."""
        self._write(step, metrics)
        self.progress.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
        if self.progress.disable:
            log.info(
                "step %d/%d  %s  %s",
                step,
                self.progress.total,
                _words_of(metrics),
                self._time_left(step),
            )

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """Writes a line of its own, as `tick` does; such values take long, and may come late."""
        self._write(step, values)
        log.info("evaluation of step %d: %s", step, _words_of(values))

    def _write(self, step: int, values: Values) -> None:
        line = json.dumps({"step": step, **values}, allow_nan=False)
        append_line(self.lines_file, line.encode() + b"\n")
        for name, value in _scalars(values):
            self.tensorboard.add(step, summary.scalar(name, value))

    def pictures(self, step: int, images: np.ndarray) -> None:
        """Writes pictures uint8 [N,H,W,C] of samples as a grid.

        It goes to samples/, to samples.png and to TensorBoard.
        """
        picture = grid(images)
        content = png(picture)
        write_file(self._picture_file(step), content)
        write_file(self.workdir / "samples.png", content)
        self.tensorboard.add(step, summary.image("samples", picture, dataformats="HWC"))
        log.info("samples of step %d: %s", step, self.workdir / "samples.png")

    def has_pictures(self, step: int) -> bool:
        """Whether the samples of `step` have been written."""
        return self._picture_file(step).exists()

    def has_values(self, step: int, name: str) -> bool:
        """Whether `evaluated` has written the value called `name` for `step`."""
        return step in values_of(self.workdir, name)

    def close(self) -> None:
        """Writes what is still buffered and closes the log."""
        self.progress.close()
        self._redirect.__exit__(None, None, None)
        self.tensorboard.close()

    def _picture_file(self, step: int) -> epath.Path:
        return self.workdir / "samples" / f"{step:08d}.png"

    def _time_left(self, step: int) -> str:
        seconds_per_step = (time.monotonic() - self.started) / (step - self.start_step)
        seconds = seconds_per_step * (self.progress.total - step)
        return f"{self.progress.format_interval(seconds)} left"

    def _keep_lines_until(self, step: int) -> None:
        if not self.lines_file.exists():
            return
        kept = []
        damaged = []
        for line in self.lines_file.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break  # A killed process can leave half a line at the end.
            line_step = _step_of(line)
            if line_step is None:
                damaged.append(line)
            elif line_step > step:
                break
            else:
                kept.append(line)
        if damaged:
            aside = self.workdir / "metrics.damaged"
            append_line(aside, b"".join(damaged))
            log.warning(
                "%s: %d damaged lines were moved to %s",
                self.lines_file,
                len(damaged),
                aside.name,
            )
        write_file(self.lines_file, b"".join(kept))


def _scalars(values: Values) -> Iterator[tuple[str, float]]:
    """Each number with its name; those of a list as name/0, name/1, ..."""
    for name, value in values.items():
        if not isinstance(value, list):
            yield name, value
            continue
        yield from ((f"{name}/{i}", each) for i, each in enumerate(value) if each is not None)


def _words_of(values: Values) -> str:
    """The numbers for the screen; lists are too long for it."""
    numbers = {name: value for name, value in values.items() if not isinstance(value, list)}
    return "  ".join(f"{name} {value:.5g}" for name, value in numbers.items())


def _step_of(line: bytes) -> int | None:
    """The step of a line of metrics.jsonl, or None if the line is damaged."""
    try:
        step = parse_json(line)["step"]
    except (ValueError, TypeError, KeyError):
        return None
    return step if isinstance(step, int) else None


class _TensorBoard:
    """Writes a TensorBoard event file. A write error is logged once and never stops the run.

    tensorboardX's own SummaryWriter is not used: its thread dies when the disk is full, and it
    then waits for that thread forever.
    """

    def __init__(self, workdir: epath.Path, step: int):
        """Opens a new file; its first event makes TensorBoard hide earlier values after `step`."""
        _write_through_epath(workdir)
        self.folder = workdir / "tensorboard"
        self.flushed = 0.0
        self.writer: EventsWriter | None = None
        with self._stop_at_write_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.writer = EventsWriter(str(self.folder / "events"))
            self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, values) -> None:
        """Adds a tensorboardX Summary."""
        with self._stop_at_write_errors():
            self._write(step=step, summary=values)

    def close(self) -> None:
        """Writes what is still buffered."""
        with self._stop_at_write_errors():
            if self.writer:
                self.writer.close()

    def _write(self, **fields) -> None:
        if not self.writer:
            return
        self.writer.write_event(Event(wall_time=time.time(), **fields))
        if time.monotonic() > self.flushed + 60:
            self.writer.flush()
            self.flushed = time.monotonic()

    @contextlib.contextmanager
    def _stop_at_write_errors(self):
        try:
            yield
        except OSError as error:
            self.writer = None
            log.warning(
                "%s: cannot be written (%s); TensorBoard logging stops, training continues",
                self.folder,
                error.strerror or error,
            )


class _EpathWriters:
    """Opens tensorboardX's files when the workdir is not a local path."""

    def open(self, path: str):
        return _WholeFile(epath.Path(path))

    def directory_check(self, path: str):
        epath.Path(path).mkdir(parents=True, exist_ok=True)


class _WholeFile:
    """A file in an object store, rewritten at every flush.

    Such files cannot be appended to, and have no file descriptor to sync.
    """

    def __init__(self, path: epath.Path):
        self.path = path
        self.content = io.BytesIO()
        self.write = self.content.write

    def flush(self) -> None:
        self.path.write_bytes(self.content.getvalue())

    close = flush


def _write_through_epath(workdir: epath.Path) -> None:
    scheme, separator, _ = str(workdir).partition("://")
    if separator:
        record_writer.register_writer_factory(scheme, _EpathWriters())
