"""The sections of numbers that later commands measured: likelihood, evaluation and others."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ddpm_jax.data.scaling import Scaling
from ddpm_jax.report.charts import Line, chart, joined
from ddpm_jax.report.content import Script, beside, count, note, number, paragraph, section
from ddpm_jax.report.markup import Html, command, details, join, table, tag
from ddpm_jax.report.results import (
    EvaluationResult,
    LikelihoodResult,
    chain_length,
    is_number,
)
from ddpm_jax.report.run import Run
from ddpm_jax.weights.load import words_of

MOST_CURVES = 3
"""Likelihoods of a single run whose curves are drawn; of several runs it is one each."""

SHOWN_FIRST = (
    "The Summary shows the first row: the newest weights come first, of these the whole chain, "
    "then images that were not trained on, then the most images."
)
"""Why, where there are several likelihoods: their order in `Results`."""

MOST_EVALUATIONS = 5
"""Of a run that stand open in the page; the others are folded away."""


def likelihood(runs: Sequence[Run], script: Script) -> Html:
    """The bound, its parts and its curves."""
    measured = [run for run in runs if run.results.likelihoods]
    return section(
        "likelihood",
        "Likelihood",
        _meaning(runs[0]),
        beside(runs, _likelihoods),
        _curves(measured, script) if measured else "",
    )


def _meaning(run: Run) -> Html:
    levels = run.config.data.value_kind.levels
    raw = f" Stored as it is, each number takes {int(np.log2(levels))} bits." if levels else ""
    return paragraph(
        "Bits per dimension say how well the model knows images that it was not trained on: with "
        "it, an image can be stored without loss in at most so many bits on average, for each "
        "number (pixel and channel). Lower is better. Compare only models of the same images at "
        f"the same size; the number does not say how good samples look.{raw} The total is the rate "
        "(all steps but the last, the prior among them) and the distortion (the last step, which "
        "makes the exact pixels)."
    )


def _likelihoods(run: Run) -> Html:
    found = run.results.likelihoods
    if not found:
        return join([paragraph("Not measured. This command does:"), _command_of(run)])
    head = ["images", "weights", "bits/dim", "rate", "of it prior", "distortion", "RMSE", "draws"]
    rows = [_row(result) for result in found]
    unit = Scaling(run.config.data).unit.words
    return join(
        [
            table("The bound, in bits per dimension", head, rows),
            paragraph(SHOWN_FIRST) if len(found) > 1 else "",
            note(
                "± is the standard error over images. RMSE is the error of the image before the "
                f"last step, {unit}. Each of the draws repeats the measurement with fresh noise"
                f"{_ema(found)}."
            ),
        ]
    )


def _ema(found: list[LikelihoodResult]) -> str:
    is_any = any(result.summary.get("weights") == "ema" for result in found)
    return "; ema weights are the average of the weights" if is_any else ""


def _command_of(run: Run) -> Html:
    return command(run.command("likelihood"))


def _row(result: LikelihoodResult) -> list[object]:
    summary = result.summary
    error = summary.get("standard_error_over_images")
    total = f"≤ {summary['total']:.4f}"
    if is_number(error):
        total += f" ± {error:.4f}"
    return [
        f"{summary['images']:,} of {summary.get('split', 'unknown')}{_chain_of(summary)}",
        words_of(summary.get("weights", "unknown"), summary.get("step")),
        tag("strong", total),
        f"{summary['rate']:.4f}",
        number(summary["prior"], 2),
        f"{summary['distortion']:.4f}",
        f"{summary['rmse']:.3f}",
        number(summary["draws"]),
    ]


def _chain_of(summary: dict[str, Any]) -> str:
    """Of a chain of fewer steps, how many."""
    steps = chain_length(summary)
    return "" if steps is None else f", {count(steps, 'step')}"


def _curves(runs: Sequence[Run], script: Script) -> Html:
    terms = []
    rates = []
    rows_of_terms: list[list[object]] = []
    rows_of_rates: list[list[object]] = []
    unit = Scaling(runs[0].config.data).unit.words
    for run in runs:
        place = runs.index(run)
        most = MOST_CURVES if len(runs) == 1 else 1
        with_curves = [each for each in run.results.likelihoods if each.curves][:most]
        for dash, result in enumerate(with_curves):
            label = _label(run, result, len(runs) > 1)
            curves = {name: array.astype(np.float64) for name, array in result.curves.items()}
            terms.append(
                Line(label, place, *_ascending(curves["timesteps"], curves["terms"]), dash)
            )
            rates.append(Line(label, place, *_ascending(curves["rate"], curves["rmse"]), dash))
            rows_of_terms += _rows_of_terms(label, curves)
            rows_of_rates += _rows_of_rates(label, curves)
    if not terms:
        return Html("")
    return joined(
        [
            chart(
                "chart-terms",
                "Bits by step",
                "The bound's term of each t: where the bits go. t = 0 is the distortion.",
                terms,
                ("t", "bits/dim"),
                ["result", "t", "bits/dim"],
                rows_of_terms,
                script,
                logarithmic=True,
            ),
            chart(
                "chart-rates",
                "Rate and distortion",
                "The error of the image that can be shown once so many bits have arrived.",
                rates,
                ("rate, bits/dim", f"RMSE {unit}"),
                ["result", "reverse steps", "rate", f"RMSE {unit}"],
                rows_of_rates,
                script,
            ),
        ]
    )


def _label(run: Run, result: LikelihoodResult, several: bool) -> str:
    summary = result.summary
    images = count(summary["images"], f"{summary.get('split', '')} image")
    words = f"{images}, step {summary.get('step')}{_chain_of(summary)}"
    return f"{run.name}: {words}" if several else words


def _ascending(x: np.ndarray, y: np.ndarray) -> tuple[list[float], list[float | None]]:
    """The points with x as a chart takes it: each larger than the one before."""
    keep = np.append(True, np.diff(np.maximum.accumulate(x)) > 0)
    return x[keep].tolist(), y[keep].tolist()


def _rows_of_terms(label: str, curves: dict[str, np.ndarray]) -> list[list[object]]:
    places = np.unique(np.geomspace(1, len(curves["terms"]), 8).astype(int)) - 1
    return [
        [label, number(curves["timesteps"][i]), number(curves["terms"][i])] for i in places.tolist()
    ]


def _rows_of_rates(label: str, curves: dict[str, np.ndarray]) -> list[list[object]]:
    """Table 4: after a tenth of the steps, two tenths, ..."""
    S = len(curves["rate"])
    steps = dict.fromkeys(max(1, round(S * tenth / 10)) for tenth in range(1, 11))
    return [
        [label, f"{k:,}", number(curves["rate"][k - 1]), number(curves["rmse"][k - 1])]
        for k in steps
    ]


def evaluation(runs: Sequence[Run]) -> Html:
    """How good the samples are, each number with its error."""

    def of_run(run: Run) -> Html:
        found = run.results.evaluations
        if not found:
            return join(
                [paragraph("Not measured. This command does:"), command(run.evaluate_command)]
            )
        more = found[MOST_EVALUATIONS:]
        folded = details(f"{len(more)} more", *map(_evaluation, more)) if more else ""
        return join([*map(_evaluation, found[:MOST_EVALUATIONS]), folded])

    return section(
        "evaluation",
        "Evaluation of samples",
        paragraph(
            "FID and KID are distances between samples and real images, lower is better; IS, "
            "precision (samples look real) and recall (all kinds of images occur) are better when "
            "higher. Proxy numbers come from a small classifier of the same images, and compare "
            "only with proxy numbers of runs on them."
        ),
        beside(runs, of_run),
    )


def _evaluation(result: EvaluationResult) -> Html:
    found = result.table
    paper = found.get("paper")
    paper = paper if isinstance(paper, dict) else {}
    rows = []
    for name, value in found["values"].items():
        error = value.get("error")
        row: list[object] = [value["title"], number(value["value"])]
        row += [f"± {number(error)}" if is_number(error) else "", value.get("error_is", "")]
        rows.append([*row, paper.get(name, "")] if paper else row)
    head = ["number", "here", "error", "what the error is"]
    caption = (
        f"{number(found['samples']) if is_number(found.get('samples')) else '?'} samples, "
        f"{found.get('sampler') or 'ancestral'}{_steps(found)}, "
        f"{words_of(found.get('weights', 'unknown'), found.get('step'))}"
    )
    return table(caption, [*head, "the paper"] if paper else head, rows)


def _steps(found: dict[str, Any]) -> str:
    steps = found.get("steps")
    return f" of {steps} steps" if is_number(steps) else ""


def others(runs: Sequence[Run]) -> Html:
    """The calibration and the tuned samplers, and what else can be done with a run."""

    def of_run(run: Run) -> Html:
        return join(
            [
                tag("ul", tag("li", _calibration(run)), tag("li", _tuned(run))),
                paragraph("Draw samples, or take the model elsewhere:"),
                command(f"{run.command('sample')}\n{run.command('export')}"),
            ]
        )

    return section("more", "More", beside(runs, of_run))


def _calibration(run: Run) -> Html:
    found = run.results.calibration
    if found is None:
        words = "Calibration, which optimal variances and the codec need: not measured; "
        return join([words, tag("code", run.command("calibrate")), " does."])
    images = found.get("images")
    words = count(images, "image") if isinstance(images, int) else "images"
    return join([f"Calibrated by {words} of {found.get('split', 'unknown')}."])


def _tuned(run: Run) -> Html:
    found = run.results.tuned
    if not found:
        words = "Samplers of few steps: not tuned; "
        return join([words, tag("code", run.command("tune")), " does."])
    names = [
        f"{each.get('sampler') or 'ancestral'} of {len(each['timesteps'])} steps" for each in found
    ]
    return join([f"Tuned: {', '.join(names)}; --grid tuned takes them."])
