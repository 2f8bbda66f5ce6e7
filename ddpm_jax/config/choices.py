"""The choices that users have, each list of names once.

Names that stand for mathematics are derived from it: a new schedule or weighting appears here by
itself. A type checker, which runs nothing, sees plain strings for those.
"""

from typing import TYPE_CHECKING, Literal

from ddpm_jax.losses import WEIGHTINGS
from ddpm_jax.samplers import SAMPLERS
from ddpm_jax.schedule import SCHEDULES

if TYPE_CHECKING:
    ScheduleName = str
    WeightingName = str
    SamplerName = str
else:
    ScheduleName = Literal[*SCHEDULES]
    WeightingName = Literal[*WEIGHTINGS]
    SamplerName = Literal[*SAMPLERS]

Dtype = Literal["float32", "bfloat16"]
"""The type that the network's inner convolutions and dense layers compute in."""

DataDtype = Literal["bool", "uint8", "int8", "uint16", "int16", "float16", "float32", "float64"]
"""The types of numbers that data may have; float64 is read as float32."""

Mode = Literal["jit", "pmap"]
"""One program for all devices, or one for each."""

Weights = Literal["ema", "raw"]
"""The averaged weights of a run, or those of its last update."""

Split = Literal["train", "holdout", "test"]
"""The images that a model was trained on, those it was not, and those of a test set."""

Format = Literal["safetensors", "diffusers", "stablehlo"]
"""What a model is exported as."""

Step = int | Literal["best"]
"""Which checkpoint of a run: the one of a step, or the best by the metric of checkpoint.best."""

Metric = Literal["holdout_loss", "bits_per_dim", "fid", "kid", "proxy_fid", "proxy_kid"]
"""What a run can measure as it trains, and keep its best checkpoint by; lower is better for all."""
