"""The page: the sections in the template, with its style, its script and the data for it."""

import base64
import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from ddpm_jax import __version__
from ddpm_jax.report import about, charts, measured, nearest, seen
from ddpm_jax.report.content import Script, paragraph
from ddpm_jax.report.drawn import Draws
from ddpm_jax.report.markup import Html, data, join, tag, text
from ddpm_jax.report.real import Reals
from ddpm_jax.report.run import Run

FILES = Path(__file__).parent / "page"
MARK = re.compile(r"\{\{(\w+)\}\}")


def page(runs: Sequence[Run], reals: Reals, draws: Draws, written: str) -> str:
    """The whole file. `written` is the time, in words."""
    script = Script()
    sections = [
        about.summary(runs, reals, draws),
        charts.training(runs, script),
        seen.samples(runs, script),
        seen.chains(runs, draws, script),
        seen.real_images(runs, reals),
        nearest.neighbours(runs, draws, reals),
        measured.likelihood(runs, script),
        measured.evaluation(runs),
        seen.figures(runs),
        measured.others(runs),
        about.settings(runs, script),
    ]
    names = [run.name for run in runs]
    code = _read("uplot.min.js") + "\n" + _read("page.js")
    content = {"charts": script.charts, "sliders": script.sliders, "runs": names}
    return _filled(
        {
            "title": text(f"{'Run' if len(runs) == 1 else 'Runs'} {', '.join(names)}"),
            "contents": _contents(sections),
            "sections": join([_nothing_yet(runs), *sections]),
            "written": about.about_page(written, __version__),
            "style": f"{_read('uplot.min.css')}\n{_read('page.css')}",
            "licence": text(_read("UPLOT-LICENSE.txt").strip()),
            "data": data(content),
            "script": code,
            "hash": _hash_of(code),
        }
    )


def _filled(marks: dict[str, str]) -> str:
    """The template with each {{mark}} replaced, once: what stands in the values is left alone."""
    return MARK.sub(lambda found: marks[found[1]], _read("page.html"))


def _contents(sections: Sequence[Html]) -> Html:
    """Links to the sections, by their ids and headings."""
    found = [re.match(r'<section id="(\w+)".*?<h2>(.*?)</h2>', each, re.S) for each in sections]
    links = (tag("li", tag("a", Html(each[2]), href=f"#{each[1]}")) for each in found if each)
    return tag("ul", *links)


def _nothing_yet(runs: Sequence[Run]) -> Html:
    young = [run.name for run in runs if not run.step]
    if not young:
        return Html("")
    return paragraph(f"{', '.join(young)}: has only just begun; there is little to see yet.")


@functools.cache
def _read(name: str) -> str:
    return (FILES / name).read_text(encoding="utf-8")


def _hash_of(code: str) -> str:
    """As a page's policy names a script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}"
