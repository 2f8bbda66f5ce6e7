"""Draws figures as PNG with matplotlib: tables of images, and curves."""

import io
import textwrap
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from ddpm_jax.data.images import grid

DPI = 100


def image_table(
    images: np.ndarray,
    rows: list[str],
    columns: list[str],
    title: str,
    notes: list[str],
    size: int = 56,
) -> bytes:
    """A PNG of a table of uint8 images [R,C,H,W,ch], with labels for `rows` and `columns`.

    `notes` are lines of text below the table. Images are enlarged by a whole factor, to `size`
    pixels or more.
    """
    picture = grid(images.reshape(-1, *images.shape[2:]), columns=len(columns), size=size)
    height, width = picture.shape[:2]
    left = 20 + 7 * max((len(row) for row in rows), default=0)
    page = max(width, 480)
    notes = [line for note in notes for line in textwrap.wrap(note, int(page / 6.4))]
    lines = max(column.count("\n") for column in columns)
    top = 62 + 14 * lines
    bottom = 14 + 17 * len(notes)
    total = np.array([left + page + 12, top + height + bottom])
    figure = Figure(figsize=(total[0] / DPI, total[1] / DPI), dpi=DPI)
    # Placed in whole pixels, so that all pixels of an image are drawn equally large.
    axes = figure.add_axes(
        (left / total[0], bottom / total[1], width / total[0], height / total[1])
    )
    axes.imshow(
        picture.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="none", aspect="auto"
    )
    axes.set_xticks(_centres(width, len(columns)), columns, fontsize=9)
    axes.set_yticks(_centres(height, len(rows)), rows, fontsize=9)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    _write(figure, left, total, title, notes)
    return _png(figure)


def curves(panels: list[dict], title: str, notes: list[str]) -> bytes:
    """A PNG of panels side by side.

    Each panel is a dict of `x`, `lines` {label: y}, `xlabel`, `ylabel` and optionally `yscale`. A
    Line in place of y has its own x.
    """
    total = np.array([430 * len(panels), 420 + 17 * len(notes)])
    figure = Figure(figsize=(total[0] / DPI, total[1] / DPI), dpi=DPI)
    top = 1 - 50 / total[1]
    bottom = (75 + 17 * len(notes)) / total[1]
    left = max(0.06, 70 / total[0])
    room = figure.add_gridspec(
        1, len(panels), left=left, right=0.985, wspace=0.28, top=top, bottom=bottom
    )
    for column, panel in enumerate(panels):
        axes = figure.add_subplot(room[0, column])
        positive = False
        for label, line in panel["lines"].items():
            x, y = (line.x, line.y) if isinstance(line, Line) else (panel["x"], line)
            axes.plot(x, y, label=label, marker="." if len(y) < 50 else None)
            positive = positive or np.nanmax(y, initial=0) > 0
        axes.set(xlabel=panel["xlabel"], ylabel=panel["ylabel"])
        axes.set_yscale(panel.get("yscale", "linear") if positive else "linear")
        axes.grid(alpha=0.3)
        if len(panel["lines"]) > 1:
            axes.legend(fontsize=8)
    _write(figure, 20, total, title, notes)
    return _png(figure)


class Line(NamedTuple):
    """A line of a `comparison`."""

    x: np.ndarray
    y: np.ndarray
    error: np.ndarray
    """Of y."""


def comparison(panels: list[dict], styles: dict[str, dict], title: str, notes: list[str]) -> bytes:
    """A PNG of panels side by side whose lines have the same meaning, named at the right of all.

    Each panel is a dict of `lines` {label: Line}, `xlabel`, `ylabel` and optionally `level`
    (label, y, error), a horizontal line. `styles` are matplotlib's of each label, in the order of
    the names. All axes are logarithmic; points that are not positive are left out.
    """
    width = 430 * len(panels) + 250
    notes = [line for note in notes for line in textwrap.wrap(note, int(width / 6.4))]
    height = max(460, 130 + 17 * len(styles)) + 17 * len(notes)
    total = np.array([width, height])
    figure = Figure(figsize=(total[0] / DPI, total[1] / DPI), dpi=DPI)
    top = 1 - 50 / total[1]
    bottom = (75 + 17 * len(notes)) / total[1]
    right = 1 - 245 / total[0]
    room = figure.add_gridspec(
        1, len(panels), left=65 / total[0], right=right, wspace=0.25, top=top, bottom=bottom
    )
    drawn: dict[str, Any] = {}
    for column, panel in enumerate(panels):
        axes = figure.add_subplot(room[0, column])
        axes.set_xscale("log")
        axes.set_yscale("log", nonpositive="clip")
        for label, line in panel["lines"].items():
            y = np.where(line.y > 0, line.y, np.nan)
            drawn[label] = axes.errorbar(
                line.x, y, line.error, capsize=2, elinewidth=0.8, **styles[label]
            )
        if "level" in panel:
            label, y, error = panel["level"]
            drawn[label] = axes.axhline(y, **styles[label])
            axes.axhspan(y - error, y + error, color=styles[label]["color"], alpha=0.15)
        xs = np.unique([x for line in panel["lines"].values() for x in line.x])
        axes.set_xticks(xs, [f"{x:g}" for x in xs])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", which="minor", length=0)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel=panel["xlabel"], ylabel=panel["ylabel"])
        axes.grid(alpha=0.3)
    labels = [label for label in styles if label in drawn]
    figure.legend(
        [drawn[label] for label in labels],
        labels,
        fontsize=8,
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(right + 8 / total[0], top + 8 / total[1]),
    )
    _write(figure, 20, total, title, notes)
    return _png(figure)


def _centres(length: int, count: int) -> np.ndarray:
    return (np.arange(count) + 0.5) * length / count


def _write(figure, left, total, title, notes) -> None:
    lines = [(1 - 20 / total[1], title, 11.0, "black")]
    for line, note in enumerate(reversed(notes)):
        lines.append(((14 + 17 * line) / total[1], note, 8.5, "0.3"))
    for height, text, size, color in lines:
        figure.text(
            left / total[0],
            height,
            # A run's path stands in it, which may have $ or bytes that are not text.
            text.encode(errors="replace").decode(),
            parse_math=False,
            fontsize=size,
            va="center",
            color=color,
        )


def _png(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()
