"""The training images nearest to the samples: is one a copy, and how near is normal."""

import math
from collections.abc import Sequence

import numpy as np

from ddpm_jax.data.images import to_float
from ddpm_jax.data.names import shown
from ddpm_jax.data.view import View
from ddpm_jax.report.content import beside, count, paragraph, section
from ddpm_jax.report.drawn import NEAREST, Drawn, Draws, Near, is_too_many
from ddpm_jax.report.markup import Html, command, join, tag
from ddpm_jax.report.pictures import fit, scale_of, tiles
from ddpm_jax.report.real import Real, Reals
from ddpm_jax.report.run import Run
from ddpm_jax.report.slider import picture

NEAR_BYTES = 150_000
"""Of all runs together."""

COPY = 1 / 3
"""A sample counts as a copy below this part of the distance between training images."""


def near_of(drawn: Drawn | str) -> Near | None:
    """The images nearest to the samples, where they were searched."""
    return drawn.near if isinstance(drawn, Drawn) else None


def summary(drawn: Drawn | str) -> Html:
    """The smallest distance, beside that of the training images."""
    near = near_of(drawn)
    link = tag("a", "what that means", href="#neighbours")
    if near is None:
        return join(["not searched; ", tag("a", "why", href="#neighbours")])
    smallest = _words_of(near.distance.min(), near)
    words = f" is the smallest distance of {count(len(near.distance), 'sample')}; "
    if not math.isnan(near.typical):
        typical = _words_of(near.typical, near)
        words += f"between training images it is {typical} in the median; "
    return join([tag("strong", smallest), words, link])


def neighbours(runs: Sequence[Run], draws: Draws, reals: Reals) -> Html:
    """The training images nearest to the samples of the chain."""

    def of_run(run: Run) -> Html:
        drawn = draws[run.name]
        real = reals[run.name]
        if isinstance(drawn, Drawn) and drawn.near is not None and isinstance(real, Real):
            return _neighbours(run, drawn, drawn.near, real, NEAR_BYTES // len(runs))
        if (run.home / "figures" / "neighbours.png").exists():
            return paragraph("The figure of an earlier computation is below.")
        return join([paragraph(_why_not(run, drawn, real)), _command(run)])

    return section(
        "neighbours",
        "Nearest training images",
        paragraph(
            "Is a sample a copy? Beside each sample stand the training images nearest to it, by "
            "the difference of their pixels."
        ),
        beside(runs, of_run),
    )


def _why_not(run: Run, drawn: Drawn | str, real: Real | str) -> str:
    if isinstance(drawn, str):
        return f"Not searched: {drawn}."
    if isinstance(real, str):
        return f"Not searched: {real}."
    assert is_too_many(run, real)
    return f"Not searched: {len(real.train):,} images take long. This command searches them:"


def _command(run: Run) -> Html:
    return command(run.command("figure neighbours"))


def _neighbours(run: Run, drawn: Drawn, near: Near, real: Real, most: int) -> Html:
    view = View(run.config.data)
    found = view(to_float(near.images))
    images = np.concatenate([drawn.x[-1][:, None], found], axis=1)
    cells = [tiles(image[None], 1) for row in images for image in row]
    fitted = fit(cells, most, 2 * scale_of(run.config.data.image_shape))
    width = images.shape[1]
    rows = []
    for i in range(len(images)):
        pictures = fitted.each[i * width : (i + 1) * width]
        own = tag("th", picture(pictures[0], f"sample {i + 1}"), scope="row")
        others = (
            tag(
                "td",
                picture(shown_picture, f"training image {index}", title=_name(real, index)),
                tag("div", _words_of(distance, near)),
                tag("div", f"no. {index}"),
            )
            for shown_picture, index, distance in zip(
                pictures[1:], near.index[i], near.distance[i], strict=True
            )
        )
        rows.append(tag("tr", own, *others))
    head = ["sample", *(f"nearest {i + 1}" for i in range(min(NEAREST, width - 1)))]
    inside = tag(
        "table",
        tag("caption", "Samples and their nearest training images"),
        tag("thead", tag("tr", *(tag("th", name, scope="col") for name in head))),
        tag("tbody", *rows),
        class_="near",
    )
    mirrored = "Mirrored images count too. " if run.config.data.flip else ""
    return join(
        [
            paragraph(verdict(near)),
            paragraph(
                f"The numbers are {near.words}. {mirrored}{_normal(near)}The samples are those of "
                "the chain above; no. is the number of an image in the data, counted from 0. "
                f"{fitted.words}"
            ),
            tag("div", inside, class_="scroll", role="region", aria_label="Nearest", tabindex="0"),
        ]
    )


def verdict(near: Near) -> Html:
    """Whether samples are copies, in words."""
    smallest = near.distance[:, 0]
    best = int(smallest.argmin())
    nearest = (
        f"The nearest of these {len(smallest)} is at {_words_of(smallest[best], near)} from "
        f"training image no. {near.index[best, 0]}"
    )
    if not near.typical > 0:
        return join([nearest, ". Without a distance between training images it says little."])
    bound = COPY * near.typical
    copies = np.flatnonzero(smallest < bound).tolist()
    if copies:
        what = "is a copy, or nearly one" if len(copies) == 1 else "are copies, or nearly so"
        which = ", ".join(
            f"sample {i + 1} of no. {near.index[i, 0]} (at {_words_of(smallest[i], near)})"
            for i in copies
        )
        words = [tag("strong", f"{len(copies)} of these {len(smallest)} {what}"), f": {which}."]
    else:
        none = tag("strong", "none is a copy pixel for pixel")
        words = [f"{nearest}, and a copy would be near 0: ", none, "."]
    rule = (
        f" Nearer than {_words_of(bound, near)}, a third of the median between training images, "
        "counts as a copy here."
    )
    return join([*words, rule])


def _normal(near: Near) -> str:
    """Which distances are to be expected."""
    if math.isnan(near.typical):
        return ""
    return (
        f"From a training image to its nearest other one it is {_words_of(near.typical, near)} in "
        "the median. About as far is normal for a sample; much farther means that it looks unlike "
        "any of them. "
    )


def _words_of(distance: float, near: Near) -> str:
    """With so many decimals that three digits of the typical distance are seen, at least one."""
    known = near.typical > 0
    return f"{distance:.{max(1, 2 - math.floor(math.log10(near.typical))) if known else 1}f}"


def _name(real: Real, index: int) -> str | None:
    """The image's name, where it has one besides its number."""
    name = real.source.names[index]
    return None if name == str(index) else shown(name)
