"""What a run is: the table at the top of the page, and its settings."""

from collections.abc import Callable, Sequence
from typing import Any

from ddpm_jax.config import flatten, to_dict
from ddpm_jax.data.names import shown
from ddpm_jax.report import nearest
from ddpm_jax.report.content import Script, count, note, number, paragraph, section
from ddpm_jax.report.drawn import Draws
from ddpm_jax.report.markup import Html, details, join, table, tag
from ddpm_jax.report.real import Real, Reals, words_of_source
from ddpm_jax.report.run import Run
from ddpm_jax.weights.load import words_of


def summary(runs: Sequence[Run], reals: Reals, draws: Draws) -> Html:
    """The key facts of each run, and what could not be read."""
    rows: dict[str, Callable[[Run], object]] = {
        "Progress": _progress,
        "Weights": _weights,
        "Images": lambda run: _images(run, reals[run.name]),
        "Network": _network,
        "Diffusion": _diffusion,
        "Optimiser": _optimiser,
        "Time": _time,
        "Devices": _devices,
        "Versions": _versions,
        "Loss": _loss,
        "Bits per dimension (bits/dim)": _bits,
        "Samples": _quality,
        "Nearest training image": lambda run: nearest.summary(draws[run.name]),
        "Folder": lambda run: tag("code", shown(run.path)),
    }
    if not any(map(nearest.near_of, draws.values())):
        del rows["Nearest training image"]
    head = ["", *(run.name for run in runs)] if len(runs) > 1 else []

    def cell(run: Run, of_run: Callable[[Run], object]) -> object:
        # On a phone the cells stand below each other, without the head.
        return (
            join([tag("span", f"{run.name}: ", class_="of"), of_run(run)]) if head else of_run(run)
        )

    body = [[name, *(cell(run, of_run) for run in runs)] for name, of_run in rows.items()]
    faults = [fault for run in runs for fault in run.faults]
    return section(
        "summary",
        "Summary",
        table("What was trained, and how far it is", head, body, "facts"),
        _faults(faults),
    )


def settings(runs: Sequence[Run], script: Script) -> Html:
    """Which settings differ between runs, and all settings of each."""
    flat = [flatten(to_dict(run.config)) for run in runs]
    return section(
        "settings",
        "Settings",
        _differences(runs, flat) if len(runs) > 1 else "",
        *(
            details(
                f"All settings of {run.name}",
                table(
                    f"The config of {run.name}",
                    ["setting", "value"],
                    [[name, _shown(value)] for name, value in values.items()],
                ),
            )
            for run, values in zip(runs, flat, strict=True)
        ),
    )


def _differences(runs: Sequence[Run], flat: list[dict[str, Any]]) -> Html:
    names = [name for name in flat[0] if any(each[name] != flat[0][name] for each in flat)]
    if not names:
        return paragraph("All settings of these runs are the same.")
    rows = [[name, *(_shown(each[name]) for each in flat)] for name in names]
    head = ["setting", *(run.name for run in runs)]
    return table("Settings that differ", head, rows, "differences")


def _shown(value: Any) -> Html:
    if isinstance(value, list):
        value = ", ".join(map(str, value)) or "none"
    return tag("code", shown(str(value)))


def _faults(faults: list[str]) -> Html:
    if not faults:
        return Html("")
    items = (tag("li", shown(fault)) for fault in faults)
    return tag("div", paragraph("Some files could not be used:"), tag("ul", *items), class_="box")


def _progress(run: Run) -> str:
    if run.is_finished:
        return f"finished: {count(run.config.train.steps, 'step')}"
    return (
        f"step {run.step:,} of {run.config.train.steps:,}: it was still training, or had stopped, "
        "when this page was made"
    )


def _weights(run: Run) -> str:
    parameters = f"{run.parameters:,} parameters"
    if not run.checkpoints:
        return f"{parameters}; no checkpoint yet"
    return f"{parameters}; the newest checkpoint is of step {run.checkpoints[-1]:,}"


def _images(run: Run, real: Real | str) -> Html:
    height, width, channels = run.config.data.image_shape
    size = f"{height}x{width}, {count(channels, 'channel')}, {run.config.data.values}"
    known = run.record.get("images")
    total = count(known, "image") if isinstance(known, int) else "images"
    held_out = real.held_out if isinstance(real, Real) else 0
    held = f", {held_out:,} of them held out" if held_out else ""
    classes = run.config.model.num_classes
    named = f"; {classes} classes" if classes else ""
    return join(
        [total, " from ", tag("code", words_of_source(run.config)), f" ({size}{named}){held}"]
    )


def _network(run: Run) -> str:
    model = run.config.model
    levels = ", ".join(str(model.base_channels * each) for each in model.channel_multipliers)
    attention = " and ".join(map(str, model.attention_resolutions))
    return (
        f"U-Net with {levels} channels, {count(model.num_res_blocks, 'residual block')} a level, "
        f"{f'attention at {attention} pixels' if attention else 'no attention'}, "
        f"dropout {model.dropout:g}, {model.dtype}"
    )


def _diffusion(run: Run) -> str:
    diffusion = run.config.diffusion
    return (
        f"{diffusion.num_timesteps:,} steps, schedule {diffusion.schedule}, predicts "
        f"{diffusion.prediction}, loss {diffusion.loss}, variance {diffusion.variance}"
    )


def _optimiser(run: Run) -> str:
    optim = run.config.optim
    return (
        f"learning rate {optim.learning_rate:g}, {optim.warmup_steps:,} steps of warmup, batches "
        f"of {run.config.train.batch_size:,}, average of the weights {optim.ema_decay:g}"
    )


def _time(run: Run) -> str:
    seen = run.step * run.config.train.batch_size
    words = f"{count(seen, 'image')} seen"
    if not run.log.hours:
        return words
    hours = run.log.hours
    time = f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
    return f"{time} of updates, without checkpoints and samples; {words}"


def _devices(run: Run) -> str:
    if not run.starts:
        return "not known"
    last = run.starts[-1]
    starts = f", started {len(run.starts)} times" if len(run.starts) > 1 else ""
    return f"{last.get('devices', 'not known')}, host with {last.get('cores', '?')} cores{starts}"


def _versions(run: Run) -> str:
    last = run.starts[-1] if run.starts else {}
    versions = last.get("versions")
    if not isinstance(versions, dict):
        return "not known"
    named = [f"{name} {version}" for name, version in versions.items() if version]
    return ", ".join([f"Python {last.get('python', '?')}", *named])


def _loss(run: Run) -> str:
    words = []
    for name, title in (("loss", "training"), ("holdout_loss", "held out")):
        curve = run.log.curves.get(name)
        if curve:
            step, value = list(curve.items())[-1]
            words.append(f"{title} {number(value)} at step {step:,}")
    return ", ".join(words) or "no line in the log yet"


def _bits(run: Run) -> Html:
    found = run.results.likelihoods
    if not found:
        return _not_measured(run.command("likelihood"))
    summary = found[0].summary
    of = words_of(summary.get("weights", "unknown"), summary.get("step"))
    images = f"{summary['images']:,} {summary.get('split', '')} images"
    return join(
        [
            tag("strong", f"at most {summary['total']:.3f}"),
            f" for {images} ({of}); ",
            tag("a", "what that means", href="#likelihood"),
        ]
    )


def _quality(run: Run) -> Html:
    if not run.results.evaluations:
        return _not_measured(run.evaluate_command)
    table = run.results.evaluations[0].table
    values = [value for name, value in table["values"].items() if "fid" in name]
    shown_values = ", ".join(f"{each['title']} {number(each['value'])}" for each in values[:2])
    words = f"{shown_values or 'measured'} by {table.get('samples', '?')} samples; "
    return join([words, tag("a", "all numbers", href="#evaluation")])


def _not_measured(command: str) -> Html:
    return join(["not measured; ", tag("code", command), " does"])


def about_page(written: str, version: str) -> Html:
    """When the page was made, and by what."""
    return note(f"Made on {written} by ddpm-jax {version}.")
