"""Samplers with few steps: their distance from the fine solution, and FID, over the steps."""

import dataclasses
import logging
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
from etils import epath

from ddpm_jax.config import Metavar, Range
from ddpm_jax.devices.mesh import make_mesh
from ddpm_jax.devices.progress import progress_bar
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.evaluate import LEAST, warn_of_few
from ddpm_jax.evaluation.flow import SOLVER, fine_steps
from ddpm_jax.evaluation.labels import guide_for
from ddpm_jax.evaluation.steps import (
    STARTS,
    Contestant,
    Estimate,
    FidJudge,
    contestants,
    distance,
    draw,
    draw_fine,
    fid_judge_of,
    fids,
)
from ddpm_jax.figures.base import OptionalSource, RunFigure
from ddpm_jax.figures.panel import Line, comparison, image_table
from ddpm_jax.sampler import ANCESTRAL
from ddpm_jax.samplers import SAMPLERS
from ddpm_jax.storage.files import write_file
from ddpm_jax.weights.load import Loaded

log = logging.getLogger(__name__)

SHOWN = 10
"""Images of each strip."""

NOTHING = Estimate(np.nan, np.nan)


class Row(NamedTuple):
    """What was measured of one sampler at one number of steps; NaN for what was not."""

    contestant: Contestant
    distance: Estimate
    fid: Estimate
    images: np.ndarray
    """uint8 [k,H,W,C], of the first starts."""


@dataclasses.dataclass(frozen=True)
class Steps(RunFigure):
    """Every sampler against its number of steps, and strips of the same images by each."""

    samples: Annotated[int, Range(min=LEAST)] = 256
    """Number of images that FID is computed from."""
    steps: Annotated[tuple[int, ...], Range(min=2)] = (5, 8, 10, 15, 20, 50)
    """Numbers of steps; those above T are left out."""
    data: OptionalSource = None
    """Real images; None for the config's source."""
    inception: Annotated[str | None, Metavar("PATH")] = None
    """Weights of FID's InceptionV3; None trains a small proxy on the images' labels instead."""

    name: ClassVar[str] = "steps"

    def draw(self) -> epath.Path:
        """Writes steps.png, steps-images.png (the strips) and .npz.

        The .npz holds for each of R rows sampler and steps, distance and fid with their
        distance_error and fid_error, NaN where it was not measured; and uint8 images [R,k,H,W,C].
        """
        model = self.load()
        T = model.ddpm.config.diffusion.num_timesteps
        if all(steps > T for steps in self.steps):
            raise UserError(f"steps: none is at most {T}, the steps of this model")
        judge, reason = self._judge(model)
        rows = contestants(model.ddpm, self.steps)
        if judge is None:
            rows = [row for row in rows if row.deterministic]
        else:
            warn_of_few(self.samples, judge.references)
            rows.append(Contestant("ancestral, all steps", ANCESTRAL, T))
        measured = self._measure(model, rows, judge)
        path = self.path()
        strips = path.with_name(f"{path.stem}-images.png")
        write_file(strips, self._strips(model, measured))
        return self.write(
            self._picture(model, measured[1:], judge, reason), numbers_of(measured[1:])
        )

    def _judge(self, model: Loaded) -> tuple[FidJudge | None, str]:
        """The FidJudge, or None and the reason why."""
        shared = self.path().parent / "real"
        try:
            return fid_judge_of(model, self.data, self.inception, shared, make_mesh()), ""
        except UserError as error:
            if self.data or self.inception:
                raise
            log.warning("only distances are measured: %s", error)
            return None, str(error)

    def _measure(
        self, model: Loaded, chosen: list[Contestant], judge: FidJudge | None
    ) -> list[Row]:
        """A Row for the fine solution and for each contestant."""
        ddpm = model.ddpm
        unit = ddpm.scaling.unit.size
        starts = min(self.samples, STARTS)
        n = self.samples if judge else starts
        guide = judge.guide if judge else guide_for(model.ddpm, None)
        steps_of_fine = len(fine_steps(model.ddpm.schedule.num_timesteps))
        total = starts * steps_of_fine + n * sum(each.calls for each in chosen)
        with progress_bar(total=total, desc=self.name, unit="call") as bar:
            exact = draw_fine(model, self.seed, 0, starts, bar.update, guide)
            fine = Contestant("fine solution", ANCESTRAL, steps_of_fine)
            measured = [Row(fine, NOTHING, NOTHING, ddpm.to_picture(exact[:SHOWN], self.channels))]
            for each in chosen:
                images = draw(model, each.sampler, self.seed, 0, n, bar.update, guide=guide)
                far = distance(images, exact, unit) if each.deterministic else NOTHING
                fid = fids(judge, images)[judge.split] if judge else NOTHING
                measured.append(Row(each, far, fid, ddpm.to_picture(images[:SHOWN], self.channels)))
        return measured

    def _picture(
        self, model: Loaded, rows: list[Row], judge: FidJudge | None, reason: str
    ) -> bytes:
        """The panels."""
        panels: list[dict[str, Any]] = [
            {
                "lines": lines_of(rows, "distance"),
                "ylabel": f"RMSE {model.ddpm.scaling.unit.words} from the fine solution",
            }
        ]
        starts = min(self.samples, STARTS)
        fine = len(fine_steps(model.ddpm.schedule.num_timesteps))
        notes = [
            f"Distance: of the deterministic samplers, from {fine} steps of {SOLVER.name}; "
            f"{starts} starts."
        ]
        if judge is None:
            notes.append(f"No FID: {reason}")
        else:
            *others, every = rows
            panels.append(
                {
                    "lines": lines_of(others, "fid"),
                    "ylabel": judge.score,
                    "level": (every.contestant.name, *every.fid),
                }
            )
            count = judge.references[judge.split].statistics.count
            notes[0] += (
                f" {judge.score}: {self.samples} samples against {count} images of {judge.split}."
            )
        for panel in panels:
            panel["xlabel"] = "steps (heun calls the network twice in each)"
        styles: dict[str, dict] = {}
        for row in rows:
            styles.setdefault(row.contestant.name, style_of(row.contestant))
        return comparison(
            panels,
            styles,
            title="Samplers with few steps",
            notes=[*notes, self.footnote(model.words)],
        )

    def _strips(self, model: Loaded, rows: list[Row]) -> bytes:
        """The first images by each sampler at the number of steps nearest to 10."""
        fine, *others = rows
        steps = min((row.contestant.steps for row in others), key=lambda S: abs(S - 10))
        T = model.ddpm.config.diffusion.num_timesteps
        shown = [fine, *(row for row in others if row.contestant.steps in (steps, T))]
        return image_table(
            np.stack([row.images for row in shown]),
            rows=[row.contestant.name for row in shown],
            columns=[f"start {i}" for i in range(len(fine.images))],
            title=f"The same starts by each sampler in {steps} steps",
            notes=self.notes_of(model),
        )


def lines_of(rows: list[Row], quantity: str) -> dict[str, Line]:
    """The Lines of `quantity`, distance or fid, by the names of the contestants."""
    points: dict[str, list[tuple[float, ...]]] = {}
    for row in rows:
        estimate = getattr(row, quantity)
        if not np.isnan(estimate.value):
            point = (row.contestant.steps, *estimate)
            points.setdefault(row.contestant.name, []).append(point)
    return {name: Line(*np.array(sorted(each)).T) for name, each in points.items()}


def style_of(contestant: Contestant) -> dict:
    """A colour for each sampler; dashed where it draws noise; a marker for what was measured."""
    if contestant.sampler == ANCESTRAL:
        return {"color": "black", "linestyle": ":"}
    color = f"C{list(SAMPLERS).index(contestant.sampler.name)}"
    marker = "o"
    if "tuned" in contestant.name:
        marker = "*"
    elif contestant.sampler.variance:
        marker = "s"
    if contestant.name == "tuned choice":
        color = "black"
    return {
        "color": color,
        "linestyle": "-" if contestant.deterministic else "--",
        "marker": marker,
        "markersize": 9 if marker == "*" else 4,
        "linewidth": 1.2,
    }


def numbers_of(rows: list[Row]) -> dict[str, np.ndarray]:
    """The arrays that the figure keeps."""
    return {
        "sampler": np.array([row.contestant.name for row in rows]),
        "steps": np.array([row.contestant.steps for row in rows]),
        "distance": np.array([row.distance.value for row in rows]),
        "distance_error": np.array([row.distance.error for row in rows]),
        "fid": np.array([row.fid.value for row in rows]),
        "fid_error": np.array([row.fid.error for row in rows]),
        "images": np.stack([row.images for row in rows]),
    }
