"""The sections of pictures: samples by training step, a chain, real images, figures."""

import logging
import math
from collections.abc import Sequence

from ddpm_jax.data.names import shown
from ddpm_jax.data.view import View
from ddpm_jax.errors import UserError
from ddpm_jax.report.content import Script, beside, count, note, paragraph, section
from ddpm_jax.report.drawn import Drawn, Draws
from ddpm_jax.report.markup import Html, command, join, tag
from ddpm_jax.report.pictures import Picture, fit, read, scale_of, tiles
from ddpm_jax.report.real import Real, Reals, sheet
from ddpm_jax.report.run import Run
from ddpm_jax.report.slider import Show, picture, slider

log = logging.getLogger(__name__)

# Bytes of all runs together. With the text around them the page stays below 5 MB.
GRID_BYTES = 1_200_000
CHAIN_BYTES = 1_000_000
SHEET_BYTES = 250_000
FIGURE_BYTES = 600_000

MOST_GRIDS = 24
"""Of a run."""

MOST_FIGURES = 12
"""Of a run."""

FIGURES = {
    "progressive": ("The image predicted along the chain (Fig. 6)", "figure progressive"),
    "shared-latent": ("Samples that share their first steps (Fig. 7)", "figure shared-latent"),
    "interpolate": ("Interpolation between images (Fig. 8)", "figure interpolate"),
    "rate-distortion": ("Rate and distortion (Fig. 5)", "figure rate-distortion"),
    "neighbours": ("Samples and their nearest images (Fig. 12)", "figure neighbours"),
    "steps": ("Samplers of few steps", "figure steps"),
    "codec": ("Compressed images", "figure codec"),
}
"""What each figure shows, and the command that draws it."""


def samples(runs: Sequence[Run], script: Script) -> Html:
    """The grids that were drawn during training, with a slider over the steps."""
    with_grids = [run for run in runs if run.grids]
    if not with_grids:
        return section(
            "samples",
            "Samples during training",
            paragraph(
                "There are none yet. A run draws them every train.sample_every steps and at its "
                "end, unless train.num_samples is 0. From a checkpoint this command does:"
            ),
            *(command(run.command("sample")) for run in runs),
        )
    shows = []
    words = []
    chosen = {run.name: _spread(list(run.grids), MOST_GRIDS) for run in with_grids}
    positions = sorted({step for steps in chosen.values() for step in steps})
    for run in with_grids:
        steps = chosen[run.name]
        found, said = _grids(run, steps, GRID_BYTES // len(with_grids))
        if not found:
            continue
        words += said
        shows.append(_show_of_grids(run, found, positions))
    body = slider("grids", "Training step", [f"step {n:,}" for n in positions], shows, script)
    return section(
        "samples",
        "Samples during training",
        paragraph("Drawn from the same noise each time, so that a picture shows what was learned."),
        body if shows else "",
        *map(note, dict.fromkeys(words)),
    )


def _spread(steps: list[int], most: int) -> list[int]:
    """At most so many of the steps, evenly spread, the last among them."""
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _grids(run: Run, steps: list[int], most: int) -> tuple[dict[int, Picture], list[str]]:
    """({step: its grid}, what is to be said of them)."""
    images = {}
    words = []
    for step in steps:
        try:
            images[step] = read(run.grids[step])
        except UserError as error:
            log.warning("%s", error)
            words.append(str(error))
    fitted = fit(list(images.values()), most)
    if len(steps) < len(run.grids):
        words.append(f"{run.name}: {len(steps)} of its {len(run.grids)} grids, evenly spread.")
    if fitted.words:
        words.append(f"{run.name}: {fitted.words}")
    return dict(zip(images, fitted.each, strict=True)), words


def _show_of_grids(run: Run, found: dict[int, Picture], positions: list[int]) -> Show:
    """At each position the newest grid that the run had by then."""
    steps = list(found)
    frames = []
    for position in positions:
        before = [i for i, step in enumerate(steps) if step <= position]
        frames.append(before[-1] if before else None)
    n = run.config.train.num_samples
    alts = [f"{count(n, 'sample')} of {run.name} after {step:,} training steps" for step in steps]
    return Show(f"{run.name}, {count(n, 'sample')}", list(found.values()), alts, frames)


def chains(runs: Sequence[Run], draws: Draws, script: Script) -> Html:
    """The chain of a few samples, with a slider over t; runs of the same steps share one."""
    together: dict[tuple, list[Run]] = {}
    for run in runs:
        drawn = draws[run.name]
        if isinstance(drawn, Drawn):
            key = (run.config.diffusion.num_timesteps, *drawn.t.tolist())
            together.setdefault(key, []).append(run)
    several = len(runs) > 1
    return section(
        "chain",
        "From noise to images",
        paragraph(
            "The reverse process: it starts from pure noise x",
            tag("sub", "T"),
            " and takes a little of it away at each step. Beside each noisy image x",
            tag("sub", "t"),
            " stands the finished image that the network sees in it.",
        ),
        *(
            _chains(f"chain-{place}", group, draws, script, several)
            for place, group in enumerate(together.values())
        ),
        *(
            _no_chain(run, words, several)
            for run in runs
            if isinstance(words := draws[run.name], str)
        ),
    )


def _chains(name: str, runs: list[Run], draws: Draws, script: Script, several: bool) -> Html:
    shows = []
    notes = []
    positions: list[str] = []
    for run in runs:
        drawn = draws[run.name]
        assert isinstance(drawn, Drawn)
        positions = _positions(run, drawn)
        of = f"{run.name}: " if several else ""
        shown_images, words = _shows_of_chain(drawn, positions, of, CHAIN_BYTES // len(draws))
        shows += shown_images
        notes.append(note(f"{of}{words}"))
    moved = slider(name, "Steps of noise left, t", positions, shows, script, together=2)
    return join([moved, *notes])


def _positions(run: Run, drawn: Drawn) -> list[str]:
    T = run.config.diffusion.num_timesteps
    positions = [f"t = {t:,} of {T:,}" for t in drawn.t]
    positions[0] += ", pure noise"
    positions[-1] = "t = 0, the image"
    return positions


def _shows_of_chain(
    drawn: Drawn, positions: list[str], of: str, most: int
) -> tuple[list[Show], str]:
    """(x_t and the predicted images, how they were drawn)."""
    frames, n = drawn.x.shape[:2]
    columns = math.ceil(n / 2)
    pages = [tiles(images, columns) for images in (*drawn.x, *drawn.x_0)]
    fitted = fit(pages, most, scale_of(drawn.shape))
    x = [f"x_t of {count(n, 'sample')} at {position}" for position in positions]
    x_0 = [f"the images predicted at {position}" for position in positions]
    order = list(range(frames))
    shows = [
        Show(join([of, "x", tag("sub", "t")]), fitted.each[:frames], x, order),
        Show(f"{of}predicted image", fitted.each[frames:], x_0, order),
    ]
    classes = "" if drawn.labels is None else f" Classes {', '.join(map(str, drawn.labels))}."
    words = f"{drawn.weights}, {frames - 1} steps of DDIM, seed 0.{classes} {fitted.words}"
    return shows, words[:1].upper() + words[1:]


def _no_chain(run: Run, words: str, several: bool) -> Html:
    of = f"{run.name}: not drawn" if several else "Not drawn"
    if (run.home / "figures" / "progressive.png").exists():
        return paragraph(f"{of}: {words}. The figure of an earlier computation is below.")
    return join([paragraph(f"{of}: {words}."), command(run.command("figure progressive"))])


def real_images(runs: Sequence[Run], reals: Reals) -> Html:
    """Sheets of the images that were trained on; runs on the same images share one."""
    shared: dict[tuple, list[Run]] = {}
    for run in runs:
        real = reals[run.name]
        key = (real if isinstance(real, str) else real.source.fingerprint, run.config.data)
        shared.setdefault(key, []).append(run)
    parts = []
    for group in shared.values():
        names = f"Of {', '.join(run.name for run in group)}: " if len(shared) > 1 else ""
        parts.append(_sheet(group[0], reals[group[0].name], names, SHEET_BYTES // len(shared)))
    return section("images", "Real images", *parts)


def _sheet(run: Run, real: Real | str, names: str, most: int) -> Html:
    if isinstance(real, str):
        return paragraph(f"{names}The images cannot be shown now: {real}.")
    scale = scale_of(run.config.data.image_shape)
    black = View(run.config.data).words
    fitted = fit([sheet(run.config, real)], most, scale)
    n = min(64, len(real.train))
    words = f"{count(n, 'training image')}, evenly spread over all {len(real.train):,}."
    black = f"{black[:1].upper()}{black[1:]}." if black else ""
    other = (
        ""
        if real.is_same
        else "They are not known to be those of the training: the source has changed since, or "
        "another one was named."
    )
    return tag(
        "figure",
        picture(fitted.each[0], f"{n} real images"),
        tag("figcaption", names, " ".join([words, black, fitted.words, other])),
    )


def figures(runs: Sequence[Run]) -> Html:
    """The figures that were drawn of each run, and the commands of the others."""

    def of_run(run: Run) -> Html:
        drawn = run.results.figures[:MOST_FIGURES]
        more = len(run.results.figures) - len(drawn)
        images = {}
        faults = []
        for file in drawn:
            try:
                images[file.stem] = read(file)
            except UserError as error:
                faults.append(str(error))
        fitted = fit(list(images.values()), FIGURE_BYTES // len(runs))
        parts = [
            tag(
                "figure",
                picture(each, _title(stem)),
                tag("figcaption", f"{_title(stem)}; figures/{shown(stem)}.png"),
            )
            for stem, each in zip(images, fitted.each, strict=True)
        ]
        missing = [words for stem, (_, words) in FIGURES.items() if stem not in images]
        others = "These commands draw the others:" if parts else "None is drawn. These commands do:"
        return join(
            [
                *parts,
                note(fitted.words) if fitted.words else "",
                note(f"The folder figures/ has {more} more.") if more else "",
                *map(paragraph, faults),
                paragraph(others) if missing else "",
                command("\n".join(run.command(words) for words in missing)) if missing else "",
            ]
        )

    others = paragraph(
        "Each figure was drawn by a command of its own, with samples of its own: they are not "
        "those above."
    )
    is_any = any(run.results.figures for run in runs)
    return section("figures", "Figures", others if is_any else "", beside(runs, of_run))


def _title(stem: str) -> str:
    return FIGURES.get(stem, (shown(stem), ""))[0]
