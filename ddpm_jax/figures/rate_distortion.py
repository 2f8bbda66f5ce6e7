"""Figure 5 and Table 4: rate and distortion as the image is sent step by step."""

import dataclasses
import json
from typing import ClassVar

import numpy as np
from etils import epath

from ddpm_jax.config import Positive, Split
from ddpm_jax.evaluation.bound import Likelihood, draws_of, measure
from ddpm_jax.evaluation.splits import read_split
from ddpm_jax.figures.base import OptionalSource, RunFigure
from ddpm_jax.figures.panel import curves
from ddpm_jax.storage.files import write_file
from ddpm_jax.storage.run import is_run
from ddpm_jax.weights.load import words_of


@dataclasses.dataclass(frozen=True)
class RateDistortion(RunFigure):
    """Rate and distortion over the reverse steps, over a whole split.

    Reuses the results of `ddpm-jax likelihood`.
    """

    split: Split | None = None
    """Training, held-out or test images; None for test if data.test is set, else holdout."""
    draws: Positive = 1
    """Minimum number of draws, each with fresh noise; earlier draws count too."""
    batch_size: Positive | None = None
    """Images per batch; None for 64 per device."""
    data: OptionalSource = None
    """The split's images; None for the config's source."""

    name: ClassVar[str] = "rate-distortion"

    def draw(self) -> epath.Path:
        """Writes rate-distortion.png, .npz and .json, and prints Table 4.

        The .npz holds rate and rmse [T] after 1, ..., T steps, the .json the summary and Table 4.
        """
        path = self.path()
        model = self.load()
        images = read_split(model, self.split, self.data)
        parts = None if is_run(self.run) else path.with_suffix("")
        result = measure(model, images, self.draws, self.seed, self.batch_size, out=parts)
        summary = result.summary
        table = table_4(result)
        k = np.arange(1, len(result.terms) + 1)
        steps = "reverse process steps (T - t + 1)"
        unit = result.unit.words
        rmse = f"distortion (RMSE {unit})"
        rate = "rate (bits/dim)"
        picture = curves(
            [
                {"x": k, "lines": {"": result.rmse}, "xlabel": steps, "ylabel": rmse},
                {"x": k, "lines": {"": result.rate}, "xlabel": steps, "ylabel": rate},
                {"x": result.rate, "lines": {"": result.rmse}, "xlabel": rate, "ylabel": rmse},
            ],
            title="Progressive lossy compression: distortion and rate (Fig. 5)",
            notes=[
                "Rate: bits/dim sent so far, including the prior. "
                "Distortion: the error of the image predicted from them.",
                f"{summary['split']}, {summary['images']} images, {draws_of(summary)}. "
                f"The full rate is {summary['rate']:.3f}; the exact image takes "
                f"{summary['distortion']:.3f} more, {summary['total']:.3f} bits/dim in total.",
                self.footnote(words_of(summary["weights"], summary["step"])),
            ],
        )
        print(f"{'reverse steps':>13} {'rate, bits/dim':>15} {f'RMSE {unit}':>12}")
        for row in table:
            print(f"{row['reverse_steps']:13d} {row['rate']:15.5f} {row['rmse']:12.5f}")
        content = json.dumps({**summary, "table_4": table}, indent=1)
        write_file(path.with_suffix(".json"), content.encode())
        return self.write(picture, {"reverse_steps": k, "rate": result.rate, "rmse": result.rmse})


def table_4(result: Likelihood) -> list[dict]:
    """The rows of Table 4: after T, 0.9 T, ..., 0.1 T reverse steps."""
    T = len(result.terms)
    steps = dict.fromkeys(max(1, round(T * tenth / 10)) for tenth in range(10, 0, -1))
    return [
        {"reverse_steps": k, "rate": float(result.rate[k - 1]), "rmse": float(result.rmse[k - 1])}
        for k in steps
    ]
