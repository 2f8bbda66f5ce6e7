"""What a run reports: metrics.jsonl, TensorBoard, pictures, and a progress bar."""

import contextlib
import io
import json
import logging
import time

import numpy as np
from etils import epath
from tensorboardX import record_writer, summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tqdm.contrib.logging import logging_redirect_tqdm

from ddpm_jax.data.images import grid, png, to_uint8
from ddpm_jax.devices.processes import is_first
from ddpm_jax.devices.progress import progress_bar
from ddpm_jax.storage.files import append_line, write_file

log = logging.getLogger(__name__)


def open_log(workdir: epath.Path, step: int, steps: int) -> "RunLog | NoLog":
    """The log of a run that goes from `step` to `steps`: kept by process 0, by the others not at all."""
    return RunLog(workdir, step, steps) if is_first() else NoLog()


class NoLog:
    """What the other processes have in place of a RunLog: nothing happens."""

    def _nothing(self, *_) -> None:
        """Takes any of RunLog's arguments."""

    advance = tick = pictures = has_pictures = close = _nothing


class RunLog:
    """Writes what happens in `workdir`. Lines and scalars after `step` are dropped when it opens.

    They come from updates that an interrupted run had made since its last checkpoint, and that
    are made again.
    """

    def __init__(self, workdir: epath.Path, step: int, steps: int):
        self.workdir = workdir
        self.lines_file = workdir / "metrics.jsonl"
        self._keep_lines_until(step)
        self.tensorboard = _TensorBoard(workdir, step)
        self.progress = progress_bar(total=steps, initial=step, unit="step", leave=True)
        self._redirect = logging_redirect_tqdm([logging.getLogger("ddpm_jax")])
        self._redirect.__enter__()
        self.started, self.start_step = time.monotonic(), step

    def advance(self) -> None:
        """One step more on the progress bar."""
        self.progress.update()

    def tick(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl, the same in TensorBoard and on the screen."""
        append_line(
            self.lines_file, json.dumps({"step": step, **metrics}, allow_nan=False).encode() + b"\n"
        )
        for name, value in metrics.items():
            self.tensorboard.add(step, summary.scalar(name, value))
        self.progress.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
        if self.progress.disable:
            figures = "  ".join(f"{name} {value:.5g}" for name, value in metrics.items())
            log.info(
                "step %d/%d  %s  %s", step, self.progress.total, figures, self._time_left(step)
            )

    def pictures(self, step: int, x: np.ndarray) -> None:
        """A grid of samples [N,H,W,C] in [-1, 1], in samples/, as samples.png and in TensorBoard."""
        picture = grid(to_uint8(x))
        content = png(picture)
        for path in (self._picture_file(step), self.workdir / "samples.png"):
            write_file(path, content)
        self.tensorboard.add(step, summary.image("samples", picture, dataformats="HWC"))
        log.info("samples of step %d: %s", step, self.workdir / "samples.png")

    def has_pictures(self, step: int) -> bool:
        """Whether the samples of `step` were drawn."""
        return self._picture_file(step).exists()

    def close(self) -> None:
        """Flushes everything."""
        self.progress.close()
        self._redirect.__exit__(None, None, None)
        self.tensorboard.close()

    def _picture_file(self, step: int) -> epath.Path:
        return self.workdir / "samples" / f"{step:08d}.png"

    def _time_left(self, step: int) -> str:
        seconds = (
            (time.monotonic() - self.started)
            / (step - self.start_step)
            * (self.progress.total - step)
        )
        return f"{self.progress.format_interval(seconds)} left"

    def _keep_lines_until(self, step: int) -> None:
        if not self.lines_file.exists():
            return
        kept, damaged = [], []
        for line in self.lines_file.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break  # A kill can leave half a line at the end.
            of_step = _step_of(line)
            if of_step is None:
                damaged.append(line)
            elif of_step > step:
                break
            else:
                kept.append(line)
        if damaged:
            aside = self.workdir / "metrics.damaged"
            append_line(aside, b"".join(damaged))
            log.warning(
                "%s: %d lines are damaged and lie in %s now",
                self.lines_file,
                len(damaged),
                aside.name,
            )
        write_file(self.lines_file, b"".join(kept))


def _step_of(line: bytes) -> int | None:
    """The step of a line of metrics.jsonl, None if that is not what it is."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return None
    return step if isinstance(step, int) else None


class _TensorBoard:
    """Writes one of TensorBoard's event files. Nothing depends on it: what cannot be written is told once.

    tensorboardX's own SummaryWriter writes in a thread that dies of a full disk, and waits for it forever.
    """

    def __init__(self, workdir: epath.Path, step: int):
        """TensorBoard then hides what earlier files have after `step`."""
        _write_through_epath(workdir)
        self.folder, self.flushed = workdir / "tensorboard", 0.0
        self.writer: EventsWriter | None = None
        with self._told():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.writer = EventsWriter(str(self.folder / "events"))
            self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, values) -> None:
        """Adds a Summary."""
        with self._told():
            self._write(step=step, summary=values)

    def close(self) -> None:
        """Writes what has not been written yet."""
        with self._told():
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
    def _told(self):
        try:
            yield
        except OSError as error:
            self.writer = None
            log.warning(
                "%s: cannot be written (%s), and no more is", self.folder, error.strerror or error
            )


class _EpathWriters:
    """How tensorboardX opens its files where the workdir is not a local path."""

    def open(self, path: str):
        return _WholeFile(epath.Path(path))

    def directory_check(self, path: str):
        epath.Path(path).mkdir(parents=True, exist_ok=True)


class _WholeFile:
    """A file of an object store, written anew at every flush: it has no file number to sync, and cannot grow."""

    def __init__(self, path: epath.Path):
        self.path, self.content = path, io.BytesIO()
        self.write = self.content.write

    def flush(self) -> None:
        self.path.write_bytes(self.content.getvalue())

    close = flush


def _write_through_epath(workdir: epath.Path) -> None:
    scheme, separator, _ = str(workdir).partition("://")
    if separator:
        record_writer.register_writer_factory(scheme, _EpathWriters())
