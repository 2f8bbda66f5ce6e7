"""`ddpm-jax report`: reads runs, draws a few samples, writes the page."""

import datetime
import logging
from collections.abc import Sequence

from etils import epath

from ddpm_jax.errors import UserError
from ddpm_jax.report.choice import Compute
from ddpm_jax.report.drawn import Drawn, draw
from ddpm_jax.report.page import page
from ddpm_jax.report.real import Real, read_real
from ddpm_jax.report.run import Run, read_runs
from ddpm_jax.storage.files import check_writable, path_of, write_file

log = logging.getLogger(__name__)

NOTHING = "--compute none leaves it out"


def report(
    runs: Sequence[str],
    out: epath.PathLike = "report.html",
    *,
    compute: Compute = "quick",
    data: str | None = None,
) -> epath.Path:
    """Writes one HTML file about the run directories `runs` to `out`, and returns its path.

    Nothing is written into the runs, which may train meanwhile. `compute` "quick" draws a few
    samples of each run's newest checkpoint and searches the training images nearest to them;
    "none" shows only what is there. `data` names the real images of all runs, as data.source; None
    is each config's own. Raises UserError for a path that is no run, or if `out` cannot be written.
    """
    path = path_of(out)
    if path.suffix not in (".html", ".htm") or path.is_dir():
        raise UserError(f"out: must end in .html and not be a folder, got {out}")
    check_writable(path)
    found = read_runs(runs)
    reals = {run.name: _real(run, data) for run in found}
    draws = {run.name: _drawn(run, reals[run.name], compute) for run in found}
    written = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d at %H:%M UTC")
    # A name of a file may have bytes that are no text.
    content = page(found, reals, draws, written).encode(errors="backslashreplace")
    write_file(path, content)
    log.info("report: %s, %.1f MB", path, len(content) / 1e6)
    return path


def _real(run: Run, data: str | None) -> Real | str:
    """The run's real images, or why they cannot be shown."""
    try:
        return read_real(run, data)
    except UserError as error:
        if data is not None:
            raise
        log.warning("%s: real images are left out: %s", run.name, error)
        return str(error)


def _drawn(run: Run, real: Real | str, compute: Compute) -> Drawn | str:
    """A few samples of the run, or why there are none."""
    if compute == "none":
        return NOTHING
    if not run.checkpoints:
        return "there is no checkpoint yet"
    try:
        return draw(run, real if isinstance(real, Real) else None)
    except UserError as error:
        log.warning("%s: samples are left out: %s", run.name, error)
        return str(error)
