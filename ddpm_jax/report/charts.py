"""The curves of the page: over training steps, over t, and rate against distortion."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ddpm_jax.report.content import Script, note, number, paragraph, section
from ddpm_jax.report.curves import MOST_POINTS, thinned
from ddpm_jax.report.markup import Html, details, join, table, tag
from ddpm_jax.report.run import Run

ROWS = 12
"""Of the table below a chart."""

SKIPPED = ("steps", "steps_per_s")
"""Numbers of the log that say nothing beside the others."""


class Line(NamedTuple):
    """A curve of a chart."""

    label: str
    run: int
    """Number of the run, which its colour shows."""
    x: list[float]
    y: list[float | None]
    dash: int = 0
    """Which of a run's curves it is."""


MAIN = {
    "loss": (
        "Loss",
        "The mean over the updates since the last line of the log. Only runs with the same loss "
        "and data compare.",
    ),
    "holdout_loss": (
        "Held-out loss",
        "That of images the network is not trained on, with the same noise each time. If it rises "
        "while the loss falls, the model learns its images by heart.",
    ),
    "grad_norm": ("Gradient norm", "Before it is clipped. Spikes are updates that went astray."),
    "images_per_s": ("Images per second", "Training images, all devices together."),
}

MORE = {
    "holdout_gap": (
        "Held-out gap",
        "The held-out loss less that of training images at the same t and noise. Above 0, the "
        "model knows its training images better than others.",
    ),
    "bits_per_dim": ("Bits per dimension", "The bound on held-out images. Lower is better."),
    "fid": ("FID", "Distance between samples and training images. Lower is better."),
    "kid": ("KID", "As FID, without its bias. Lower is better."),
    "proxy_fid": (
        "Proxy FID",
        "FID by the features of a small classifier: it compares only with runs on the same images.",
    ),
    "proxy_kid": ("Proxy KID", "KID by the same features."),
    "mfu": ("Model FLOPs utilisation", "The part of the devices' peak that the updates use."),
}


def training(runs: Sequence[Run], script: Script) -> Html:
    """The curves over training steps, laid over each other."""
    there = {name for run in runs for name in run.log.curves} - set(SKIPPED)
    names = [*MAIN, *(name for name in MORE if name in there)]
    names += sorted(there - set(names))
    figures = [_of_log(runs, name, script) for name in names]
    longest = max((len(curve) for run in runs for curve in run.log.curves.values()), default=0)
    most = _most(runs)
    thin = f"Of {longest:,} lines of the log, {most:,} are shown, evenly spread."
    bands = _bands(runs, script)
    return section(
        "curves",
        "Training curves",
        paragraph(
            "Drag over a curve to zoom into these steps, in all curves at once; a double click "
            "shows the whole run again. The values under the pointer stand below each curve."
        ),
        _controls(runs),
        note(thin) if longest > most else "",
        tag("div", *figures, bands, class_="charts"),
    )


def _most(runs: Sequence[Run]) -> int:
    """Points of a curve, where several runs share the page."""
    return MOST_POINTS // len(runs)


def _controls(runs: Sequence[Run]) -> Html:
    last = max(run.step for run in runs)

    def field(label: str, *inputs: object, name: str) -> Html:
        return tag("div", tag("label", label, for_=name), *inputs, class_="control")

    steps = {"type": "number", "min": 0, "max": last, "step": 1}
    return tag(
        "div",
        field(
            "Smoothing",
            tag("input", type="range", id="smoothing", min=0, max=0.98, step=0.02, value=0),
            tag("output", "none", id="smoothing-value", for_="smoothing"),
            name="smoothing",
        ),
        field("From step", tag("input", id="from-step", value=0, **steps), name="from-step"),
        field("to step", tag("input", id="to-step", value=last, **steps), name="to-step"),
        tag("button", "Whole run", type="button", id="whole-run"),
        tag(
            "div",
            tag("input", type="checkbox", id="logarithmic"),
            tag("label", "Logarithmic", for_="logarithmic"),
            class_="control",
        ),
        class_="controls",
        role="group",
        aria_label="How the training curves are shown",
    )


def _of_log(runs: Sequence[Run], name: str, script: Script) -> Html:
    title, words = (MAIN | MORE).get(name, (name, ""))
    lines = []
    for number_of_run, run in enumerate(runs):
        curve = thinned(run.log.curves.get(name, {}), _most(runs))
        if curve:
            lines.append(Line(run.name, number_of_run, list(curve), list(curve.values())))
    if not lines:
        return _absent(runs, name, title)
    rows = _rows_by_step([thinned(run.log.curves.get(name, {}), ROWS) for run in runs])
    head = ["step", *(run.name for run in runs)]
    return chart(
        f"chart-{name}",
        title,
        words,
        lines,
        ("step", title.lower()),
        head,
        rows,
        script,
        group="training",
        positive=name != "holdout_gap",
    )


def _absent(runs: Sequence[Run], name: str, title: str) -> Html:
    """Why there is no curve."""
    config = runs[0].config
    words = "No line of the log has it yet."
    if name == "holdout_loss" and not config.data.holdout:
        words = "No images were held out. A run with --data.holdout 0.05 keeps one in twenty."
    elif name == "holdout_loss" and not config.train.eval_every:
        words = "It was not measured. A run with --train.eval_every 1000 measures it."
    return tag("figure", tag("figcaption", tag("strong", title)), note(words), class_="chart")


def _rows_by_step(curves: Sequence[dict[int, float]]) -> list[list[object]]:
    """A row for each step of any curve, with the value of each curve."""
    steps = sorted({step for curve in curves for step in curve})
    return [
        [f"{step:,}", *(number(curve[step]) if step in curve else "" for curve in curves)]
        for step in steps
    ]


def _bands(runs: Sequence[Run], script: Script) -> Html:
    """The newest held-out loss by noise level."""
    lines = []
    rows: dict[int, list[object]] = {}
    for place, run in enumerate(runs):
        bands = run.log.bands
        T = run.config.diffusion.num_timesteps
        if not any(band is not None for band in bands):
            continue
        middles = [(i + 0.5) * T / len(bands) for i in range(len(bands))]
        label = f"{run.name}, step {run.log.bands_step:,}"
        lines.append(Line(label, place, middles, bands))
        for middle, band in zip(middles, bands, strict=True):
            row = rows.setdefault(round(middle), [""] * len(runs))
            row[place] = "" if band is None else number(band)
    if not lines:
        return Html("")
    words = "Small t is little noise: details. Large t is much noise: the outline."
    head = ["t", *(run.name for run in runs)]
    body = [[f"{t:,}", *values] for t, values in sorted(rows.items())]
    title = "Held-out loss by noise level"
    return chart("chart-bands", title, words, lines, ("t", "loss"), head, body, script)


def chart(
    name: str,
    title: str,
    words: str,
    lines: Sequence[Line],
    axes: tuple[str, str],
    head: Sequence[str],
    rows: Iterable[Sequence[object]],
    script: Script,
    *,
    group: str = "",
    positive: bool = True,
    logarithmic: bool = False,
) -> Html:
    """A chart that the script draws, and its values as a table.

    Charts of one `group` share the zoom and the controls. Only `positive` ones can be
    `logarithmic`.
    """
    drawn: list[dict[str, Any]] = [
        {"label": each.label, "run": each.run, "dash": each.dash, "x": each.x, "y": _finite(each.y)}
        for each in lines
    ]
    script.charts.append(
        {
            "id": name,
            "xlabel": axes[0],
            "ylabel": axes[1],
            "group": group,
            "positive": positive,
            "logarithmic": logarithmic,
            "lines": drawn,
        }
    )
    label = f"{title} over {axes[0]}. {_spoken(lines, axes[0])} The table below has values."
    return tag(
        "figure",
        tag("figcaption", tag("strong", title), " ", words),
        tag("div", class_="plot", id=name, role="img", aria_label=label),
        details("Values as a table", table(title, head, rows)),
        class_="chart",
    )


def _spoken(lines: Sequence[Line], axis: str) -> str:
    """Where each line ends, for those who do not see it."""
    ends = []
    for line in lines:
        known = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None]
        if known:
            ends.append(f"{line.label}: {number(known[-1][1])} at {axis} {number(known[-1][0])}.")
    return " ".join(ends)


def _finite(values: Sequence[float | None]) -> list[float | None]:
    return [
        None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
        for value in values
    ]


def joined(parts: Iterable[Html]) -> Html:
    """Charts one beside the other."""
    return tag("div", join(parts), class_="charts")
