"""What a run reports: metrics.jsonl, TensorBoard, pictures, and a progress bar."""

import io
import json
import logging
import time

import numpy as np
from etils import epath
from tensorboardX import SummaryWriter, record_writer
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ddpm_jax.files import write_file
from ddpm_jax.images import grid, png, to_uint8
from ddpm_jax.processes import is_first

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
        _write_tensorboard_through_epath(workdir)
        self.tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)
        self.progress = tqdm(total=steps, initial=step, unit="step", disable=None, dynamic_ncols=True)
        self._redirect = logging_redirect_tqdm([logging.getLogger("ddpm_jax")])
        self._redirect.__enter__()
        self.started, self.start_step = time.monotonic(), step

    def advance(self) -> None:
        """One step more on the progress bar."""
        self.progress.update()

    def tick(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl, the same in TensorBoard and on the screen."""
        self._append(json.dumps({"step": step, **metrics}, allow_nan=False) + "\n")
        for name, value in metrics.items():
            self.tensorboard.add_scalar(name, value, step)
        self.progress.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
        if self.progress.disable:
            figures = "  ".join(f"{name} {value:.5g}" for name, value in metrics.items())
            log.info("step %d/%d  %s  %s", step, self.progress.total, figures, self._time_left(step))

    def pictures(self, step: int, x: np.ndarray) -> None:
        """A grid of samples [N,H,W,C] in [-1, 1], in samples/, as samples.png and in TensorBoard."""
        picture = grid(to_uint8(x))
        content = png(picture)
        for path in (self._picture_file(step), self.workdir / "samples.png"):
            write_file(path, content)
        self.tensorboard.add_image("samples", picture, step, dataformats="HWC")
        log.info("samples of step %d: %s", step, self.workdir / "samples.png")

    def has_pictures(self, step: int) -> bool:
        """Whether the samples of `step` were drawn."""
        return self._picture_file(step).exists()

    def close(self) -> None:
        """Flushes everything."""
        self.progress.close()
        self._redirect.__exit__(None, None, None)
        self.tensorboard.close()

    def _append(self, line: str) -> None:
        if "://" in str(self.lines_file):  # Object stores cannot append.
            before = self.lines_file.read_text() if self.lines_file.exists() else ""
            self.lines_file.write_text(before + line)
        else:
            with self.lines_file.open("a") as file:
                file.write(line)

    def _picture_file(self, step: int) -> epath.Path:
        return self.workdir / "samples" / f"{step:08d}.png"

    def _time_left(self, step: int) -> str:
        seconds = (time.monotonic() - self.started) / (step - self.start_step) * (self.progress.total - step)
        return f"{tqdm.format_interval(seconds)} left"

    def _keep_lines_until(self, step: int) -> None:
        if not self.lines_file.exists():
            return
        kept = []
        for line in self.lines_file.read_text().splitlines(keepends=True):
            # A kill can leave half a line at the end.
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
            kept.append(line)
        write_file(self.lines_file, "".join(kept).encode())


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


def _write_tensorboard_through_epath(workdir: epath.Path) -> None:
    scheme, separator, _ = str(workdir).partition("://")
    if separator:
        record_writer.register_writer_factory(scheme, _EpathWriters())
