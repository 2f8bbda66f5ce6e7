"""Pictures that a slider turns over, like pages."""

from collections.abc import Sequence
from typing import NamedTuple

from ddpm_jax.report.content import Script
from ddpm_jax.report.markup import Html, tag
from ddpm_jax.report.pictures import Picture


class Show(NamedTuple):
    """A place whose picture changes with the slider."""

    caption: object
    pictures: Sequence[Picture]
    alts: Sequence[str]
    """What each picture shows, in words."""
    frames: Sequence[int | None]
    """The number of the picture at each position; None for none."""


def picture(shown: Picture, alt: str, **attributes: object) -> Html:
    """A picture at its size."""
    return tag("img", src=shown.uri, alt=alt, width=shown.width, height=shown.height, **attributes)


def slider(
    name: str,
    label: str,
    positions: Sequence[str],
    shows: Sequence[Show],
    script: Script,
    together: int = 1,
) -> Html:
    """The places, and a slider below them that stands at its last position.

    `positions` are what the slider says at each. So many places stay `together` in a line.
    """
    last = len(positions) - 1
    frames = [_frame(f"{name}-{i}", show) for i, show in enumerate(shows)]
    lines = [
        tag("div", *frames[start : start + together], class_="together")
        for start in range(0, len(frames), together)
    ]
    script.sliders.append(
        {
            "id": name,
            "positions": list(positions),
            "shows": [_data(f"{name}-{i}", show) for i, show in enumerate(shows)],
        }
    )
    moved = tag(
        "div",
        tag("label", label, for_=f"{name}-range"),
        tag(
            "input",
            type="range",
            id=f"{name}-range",
            min=0,
            max=last,
            step=1,
            value=last,
            aria_valuetext=positions[last],
        ),
        tag("output", positions[last], id=f"{name}-position", for_=f"{name}-range"),
        tag("button", "Play", type="button", id=f"{name}-play"),
        class_="slider",
    )
    return tag("div", tag("div", *lines, class_="shows"), moved if last else "", class_="turned")


def _frame(name: str, show: Show) -> Html:
    last = show.frames[-1]
    alt = "none yet" if last is None else show.alts[last]
    shown = show.pictures[0 if last is None else last]
    return tag("figure", picture(shown, alt, id=name), tag("figcaption", show.caption))


def _data(name: str, show: Show) -> dict:
    """For the script. The picture that stands in the page already is left out."""
    here = 0 if show.frames[-1] is None else show.frames[-1]
    uris = [None if i == here else each.uri for i, each in enumerate(show.pictures)]
    return {
        "img": name,
        "here": here,
        "uris": uris,
        "alts": list(show.alts),
        "frames": list(show.frames),
    }
