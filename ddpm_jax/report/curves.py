"""What a run wrote into metrics.jsonl, as curves over the training steps."""

import math
from typing import Any, NamedTuple

from etils import epath

from ddpm_jax.storage.best import METRICS
from ddpm_jax.storage.files import parse_json

MOST_POINTS = 4000
"""Of the curves of all runs in a chart."""

Curve = dict[int, float]
"""{step: value}, ascending."""


class Log(NamedTuple):
    """The lines of metrics.jsonl, by the names of their numbers."""

    curves: dict[str, Curve]
    bands: list[float | None]
    """The newest holdout_bands; empty where there are none."""
    bands_step: int
    """Their step."""
    damaged: int
    """Lines that could not be read; one that is being written does not count."""

    @property
    def step(self) -> int:
        """The last step of any line; 0 without lines."""
        return max((max(curve) for curve in self.curves.values() if curve), default=0)

    @property
    def hours(self) -> float:
        """The time that the updates took, without checkpoints, samples and evaluations."""
        rates = self.curves.get("steps_per_s", {})
        counts = self.curves.get("steps", {})
        taken = (counts.get(step, 0.0) / rate for step, rate in rates.items() if rate > 0)
        return sum(taken) / 3600


def read_log(home: epath.Path) -> Log:
    """The log of the run directory `home`, also while it is being written."""
    file = home / METRICS
    content = file.read_bytes() if file.exists() else b""
    whole, _, rest = content.rpartition(b"\n")
    lines = [_line(line) for line in whole.splitlines() if line.strip()]
    # A line without its end is being written, or was when the run was killed.
    last = _line(rest)
    good = sorted(
        (line for line in [*lines, last] if line is not None), key=lambda line: line["step"]
    )
    curves: dict[str, Curve] = {}
    bands: list[float | None] = []
    bands_step = 0
    for line in good:
        step = line["step"]
        for name, value in line.items():
            if name == "step":
                continue
            if _is_number(value):
                curves.setdefault(name, {})[step] = float(value)
        if isinstance(line.get("holdout_bands"), list):
            bands = [float(each) if _is_number(each) else None for each in line["holdout_bands"]]
            bands_step = step
    return Log(curves, bands, bands_step, sum(line is None for line in lines))


def thinned(curve: Curve, most: int) -> Curve:
    """At most `most` of the points, evenly spread, the first and the last among them."""
    if len(curve) <= most:
        return curve
    points = list(curve.items())
    places = (round(i * (len(points) - 1) / (most - 1)) for i in range(most))
    return dict(points[place] for place in places)


def _line(content: bytes) -> dict[str, Any] | None:
    try:
        line = parse_json(content)
    except ValueError:
        return None
    return line if isinstance(line, dict) and type(line.get("step")) is int else None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
