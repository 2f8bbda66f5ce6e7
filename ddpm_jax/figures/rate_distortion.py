"""Figure 5 and Table 4: how the image arrives, bit by bit."""

import dataclasses
import json
from typing import Annotated, ClassVar, Literal

import numpy as np

from ddpm_jax.config.checked import Range
from ddpm_jax.evaluation.bound import draws_of, measure
from ddpm_jax.evaluation.splits import read_split
from ddpm_jax.figures.base import RunFigure
from ddpm_jax.figures.panel import curves
from ddpm_jax.storage.files import write_file
from ddpm_jax.storage.run import is_run
from ddpm_jax.weights.load import words_of


@dataclasses.dataclass(frozen=True)
class RateDistortion(RunFigure):
    """Rate and distortion over the reverse steps, over a whole split; uses what `likelihood` has measured."""

    split: Literal["train", "holdout", "test"] | None = None
    """Which images; None for test where the run's config has one, else holdout."""
    draws: Annotated[int, Range(min=1)] = 1
    """At least how often, with other noise."""
    batch_size: Annotated[int, Range(min=1)] | None = None
    """Images at a time; None for 64 a device."""
    data: str | None = None
    """folder:PATH, npz:PATH or tfds:NAME to read the split from; None for where the config says."""

    name: ClassVar[str] = "rate-distortion"

    def draw(self):
        """Writes rate-distortion.png, .npz (rate, rmse [T] after 1, ..., T steps) and .json (Table 4); prints that."""
        model = self.load()
        images = read_split(model, self.split, self.data)
        parts = None if is_run(self.run) else self.path().with_suffix("")
        result = measure(model, images, self.draws, self.seed, self.batch_size, out=parts)
        T, summary = len(result.terms), result.summary
        table = table_4(result)
        k = np.arange(1, T + 1)
        steps, rmse, rate = (
            "reverse process steps (T - t + 1)",
            "distortion (RMSE of 255)",
            "rate (bits/dim)",
        )
        picture = curves(
            [
                {"x": k, "lines": {"": result.rmse}, "xlabel": steps, "ylabel": rmse},
                {"x": k, "lines": {"": result.rate}, "xlabel": steps, "ylabel": rate},
                {"x": result.rate, "lines": {"": result.rmse}, "xlabel": rate, "ylabel": rmse},
            ],
            title="Progressive lossy compression: distortion and rate (Fig. 5)",
            notes=[
                "Rate: bits/dim sent so far, with the prior. Distortion: of the image that can be predicted by then.",
                "{split}, {images} images, {of_draws}. All sent: a rate of {rate:.3f}; to the exact image "
                "{distortion:.3f} more: {total:.3f} bits/dim.".format(
                    **summary, of_draws=draws_of(summary)
                ),
                self.footnote(words_of(summary["weights"], summary["step"])),
            ],
        )
        print(f"{'reverse steps':>13} {'rate, bits/dim':>15} {'RMSE of 255':>12}")
        for row in table:
            print("{reverse_steps:13d} {rate:15.5f} {rmse:12.5f}".format(**row))
        write_file(
            self.path().with_suffix(".json"),
            json.dumps({**summary, "table_4": table}, indent=1).encode(),
        )
        return self.write(picture, {"reverse_steps": k, "rate": result.rate, "rmse": result.rmse})


def table_4(result) -> list[dict]:
    """Table 4's rows: after T, 0.9 T, ..., 0.1 T reverse steps."""
    T = len(result.terms)
    steps = dict.fromkeys(max(1, round(T * tenth / 10)) for tenth in range(10, 0, -1))
    return [
        {"reverse_steps": k, "rate": float(result.rate[k - 1]), "rmse": float(result.rmse[k - 1])}
        for k in steps
    ]
