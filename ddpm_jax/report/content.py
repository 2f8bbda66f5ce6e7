"""What the sections of a page share: the data of its script, runs beside each other, numbers."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ddpm_jax.report.markup import Html, join, tag
from ddpm_jax.report.run import Run


@dataclasses.dataclass
class Script:
    """The data that the page's script gets."""

    charts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    sliders: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def section(name: str, title: str, *children: object) -> Html:
    """A section that the page's list of contents names."""
    return tag("section", tag("h2", title), *children, id=name, aria_label=title)


def beside(runs: Sequence[Run], of_run: Callable[[Run], object]) -> Html:
    """What `of_run` says of each run, side by side under their names where there are several."""
    if len(runs) == 1:
        return join([of_run(runs[0])])
    parts = (tag("article", tag("h3", run.name), of_run(run)) for run in runs)
    return tag("div", *parts, class_="beside")


def paragraph(*children: object) -> Html:
    """A paragraph."""
    return tag("p", *children)


def note(*children: object) -> Html:
    """A paragraph in small letters."""
    return tag("p", *children, class_="note")


def number(value: float, digits: int = 4) -> str:
    """With so many digits that count: 0.08123, 1,234,567."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.{digits}g}"


def count(n: int, word: str) -> str:
    """For example "1 image", "1,797 images"."""
    return f"{n:,} {word}{'' if n == 1 else 's'}"
