"""The best checkpoint of a run, by a metric of its log.

Nothing is kept beside the log and the checkpoints themselves: the best is the checkpoint there is
whose step has the lowest value in metrics.jsonl, the earliest of equals. So a run that is killed,
resumes or loses a checkpoint always agrees with its files.
"""

import math
from typing import NamedTuple

from etils import epath

from ddpm_jax.errors import UserError
from ddpm_jax.storage.files import parse_json, path_of
from ddpm_jax.storage.restore import steps_of
from ddpm_jax.storage.run import read_config

METRICS = "metrics.jsonl"
"""The file of the log in a run directory."""


class Best(NamedTuple):
    """The step of a run at which a metric was lowest, of those that have a checkpoint."""

    step: int
    value: float


def values_of(run: epath.PathLike, metric: str) -> dict[int, float]:
    """{step: value} of `metric` in the log of `run`; lines that are damaged are left out."""
    file = path_of(run) / METRICS
    if not file.exists():
        return {}
    found = {}
    for content in file.read_bytes().splitlines():
        try:
            line = parse_json(content)
        except ValueError:
            continue
        if not isinstance(line, dict):
            continue
        step = line.get("step")
        value = line.get(metric)
        if type(step) is int and isinstance(value, float) and math.isfinite(value):
            found[step] = value
    return found


def best_of(run: epath.PathLike, metric: str) -> Best | None:
    """The best checkpoint of `run` by `metric`, or None without such a checkpoint."""
    values = values_of(run, metric)
    there = [Best(step, values[step]) for step in steps_of(run) if step in values]
    return min(there, key=lambda best: (best.value, best.step), default=None)


def best_step(run: epath.PathLike) -> int:
    """The step of the best checkpoint of `run`, by the metric that checkpoint.best names there.

    Raises UserError if it names none, or none of the checkpoints has a value of it.
    """
    metric = read_config(run).checkpoint.best
    if metric is None:
        raise UserError(
            f"step: {run} keeps no best checkpoint; train it further with --checkpoint.best "
            "holdout_loss or another metric, or name a step"
        )
    best = best_of(run, metric)
    if best is None:
        raise UserError(
            f"step: {run} has no checkpoint yet at which {metric} (checkpoint.best) was measured; "
            "train it further, or name a step"
        )
    return best.step
