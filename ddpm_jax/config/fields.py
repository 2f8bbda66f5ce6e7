"""Configuration: frozen dataclasses that check themselves, strict to and from JSON.

Each field's range stands beside its type. A shipped or own config file exports one `CONFIG`.
"""

import dataclasses
import json
import runpy
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from ddpm_jax.config.checked import Checked, Range
from ddpm_jax.errors import UserError

Positive = Annotated[int, Range(min=1)]
Timesteps = Annotated[int, Range(min=1, max=1_000_000)]
Natural = Annotated[int, Range(min=0)]


@dataclasses.dataclass(frozen=True)
class Model(Checked):
    """The U-Net."""

    base_channels: Annotated[int, Range(min=4)] = 128
    """Width of the first level."""
    channel_multipliers: Annotated[tuple[int, ...], Range(min=1)] = (1, 2, 2, 2)
    """Width of each level, in units of base_channels."""
    num_res_blocks: Positive = 2
    """Residual blocks a level on the way down; one more on the way up."""
    attention_resolutions: Annotated[tuple[int, ...], Range(min=1)] = (16,)
    """Pixels of the smaller side of the levels with attention."""
    dropout: Annotated[float, Range(min=0, below=1)] = 0.1
    """Probability of a zero inside each residual block, in training."""
    norm_groups: Positive = 32
    """Groups of every group normalisation."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What convolutions and dense layers compute in; all else stays float32."""
    remat: Annotated[tuple[int, ...], Range(min=0)] = ()
    """Levels, 0 the finest, whose activations are computed again for the gradient instead of kept."""

    def __post_init__(self):
        super().__post_init__()
        if not self.channel_multipliers:
            raise UserError("model.channel_multipliers: one number a level is needed, got none")
        for level in self.remat:
            if level >= len(self.channel_multipliers):
                raise UserError(
                    f"model.remat: there is no level {level}, the last is {len(self.channel_multipliers) - 1}"
                )
        if self.base_channels % 2:
            raise UserError(f"model.base_channels: must be even, got {self.base_channels}")
        for multiplier in self.channel_multipliers:
            width = self.base_channels * multiplier
            if width % self.norm_groups:
                raise UserError(
                    f"model.norm_groups: {self.norm_groups} does not divide a level's width, {width}"
                )


@dataclasses.dataclass(frozen=True)
class Diffusion(Checked):
    """The process and what the network predicts."""

    schedule: Literal[
        "linear", "cosine", "quad", "const", "jsd", "warmup10", "warmup50", "raised_cosine"
    ] = "linear"
    """How the betas run from the first step to the last."""
    num_timesteps: Timesteps = 1000
    """T. The betas of `linear` do not change with it: scale beta_start and beta_end by 1000 / T."""
    beta_start: Annotated[float, Range(above=0, max=1)] | None = None
    """First beta; None for the schedule's own, 1e-4."""
    beta_end: Annotated[float, Range(above=0, max=1)] | None = None
    """Last beta; None for the schedule's own, 0.02."""
    prediction: Literal["eps", "x_0", "mean", "v"] = "eps"
    """What the network's output stands for."""
    variance: Literal["fixed_large", "fixed_small", "learned", "learned_range"] = "fixed_large"
    """Variance of a reverse step: beta_t, the posterior's, the network's own logarithm, or its mix of the first two."""
    clip: bool = True
    """Clip the predicted x_0 to [-1, 1] in sampling and when the bound is measured."""
    loss: Literal["simple", "vlb", "hybrid"] = "simple"
    """Mean squared error, the bound in bits/dim, or the first for the mean and 0.001 of the second for the variance."""
    min_snr_gamma: Annotated[float, Range(above=0)] | None = None
    """Weigh the squared error of x_0 by min(SNR, this), for one 5; None for the unweighted error."""

    def __post_init__(self):
        super().__post_init__()
        if self.loss == "simple" and self.learns_variance:
            raise UserError(
                f"diffusion.loss: simple teaches the variance {self.variance!r} nothing; "
                "choose hybrid or vlb, or a fixed variance"
            )
        if self.loss == "hybrid" and not self.learns_variance:
            raise UserError(
                f"diffusion.loss: the second part of hybrid is for a learned variance, and {self.variance!r} "
                "is fixed; choose simple, or diffusion.variance learned_range"
            )
        if self.schedule == "jsd" and self.prediction == "eps" and self.loss != "simple":
            raise UserError(
                "diffusion.prediction: x_T of jsd holds nothing of the image, and the bound of what eps makes of it "
                "is infinite; choose x_0, mean or v, or diffusion.loss simple"
            )
        if self.loss == "vlb" and self.min_snr_gamma is not None:
            raise UserError(
                "diffusion.min_snr_gamma: the bound has weights of its own; leave it out or choose simple"
            )
        takes = {"cosine": (), "jsd": (), "const": ("beta_end",)}.get(
            self.schedule, ("beta_start", "beta_end")
        )
        for name in ("beta_start", "beta_end"):
            if getattr(self, name) is not None and name not in takes:
                raise UserError(
                    f"diffusion.{name}: schedule {self.schedule!r} does not use it; leave it out"
                )

    @property
    def learns_variance(self) -> bool:
        """Whether half of the network's output channels are for the variance."""
        return self.variance in ("learned", "learned_range")

    @property
    def schedule_parameters(self) -> dict[str, float]:
        """The parameters that were given, for make_schedule."""
        given = {"beta_start": self.beta_start, "beta_end": self.beta_end}
        return {name: value for name, value in given.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Data(Checked):
    """Where the images come from."""

    source: str = "digits"
    """digits, folder:PATH (a folder or a zip), npz:PATH (uint8 `images`), tfds:NAME[/CONFIG], array (from Python)."""
    test: str | None = None
    """folder:, npz: or tfds: of the test split, which only `likelihood` and `figure` read; None if there is none."""
    dir: str | None = None
    """Where tfds keeps its data sets; None for TFDS_DATA_DIR or else ~/tensorflow_datasets."""
    manual_dir: str | None = None
    """Folder of the original archives to prepare a tfds set from, where tfds shall not or cannot download them."""
    image_shape: Annotated[tuple[int, int, int], Range(min=1)] = (32, 32, 3)
    """Height, width, channels. Image files are resized to cover it and cropped in the centre."""
    flip: bool = True
    """Mirror half of the training images, chosen at random."""
    holdout: Annotated[float, Range(min=0, max=0.9)] = 0.1
    """Part of the images, chosen by a hash of index or name, that is never trained on."""
    workers: Natural = 4
    """Processes that read and decode ahead what is too large for cache_mb; 0 for a thread of the program itself."""
    cache_mb: Natural = 4096
    """A folder or tfds set is kept decoded in memory up to this many MiB, and read batch by batch above it."""
    on_device: bool = False
    """Keep the images, at most cache_mb of them, in each device's memory, where the update picks its batch."""

    def __post_init__(self):
        super().__post_init__()
        if self.source not in ("digits", "array") and not _is_file_source(self.source):
            raise UserError(
                f"data.source: {self.source!r} is not digits, folder:PATH, npz:PATH or tfds:NAME"
            )
        if self.test is not None and not _is_file_source(self.test):
            raise UserError(f"data.test: {self.test!r} is not folder:PATH, npz:PATH or tfds:NAME")


@dataclasses.dataclass(frozen=True)
class Optim(Checked):
    """Adam(0.9, 0.999, 1e-8) with warm-up, clipping and an average of the weights."""

    learning_rate: Annotated[float, Range(above=0)] = 2e-4
    """Learning rate after the warm-up; it does not decay."""
    warmup_steps: Natural = 5000
    """Steps over which the learning rate rises linearly from 0."""
    clip_norm: Annotated[float, Range(above=0)] = 1.0
    """Gradients of a larger norm over all parameters are scaled down to it."""
    clip: Literal["global", "device"] = "global"
    """Clip the mean gradient, or each device's before the mean, as the paper's code did; the latter with pmap alone."""
    ema_decay: Annotated[float, Range(min=0, below=1)] = 0.9999
    """Weight of the past in the exponential moving average of the parameters, a step."""


@dataclasses.dataclass(frozen=True)
class Train(Checked):
    """The loop."""

    steps: Positive = 800_000
    """Updates in all."""
    batch_size: Positive = 128
    """Images an update, over all devices."""
    accumulate: Positive = 1
    """Parts that a batch is divided into, one after the other, to save memory."""
    log_every: Positive = 100
    """Steps between lines of metrics.jsonl."""
    eval_every: Natural = 5000
    """Steps between held-out losses; 0 for never."""
    eval_images: Positive = 2048
    """Held-out images that the loss is taken over, at most."""
    sample_every: Natural = 20_000
    """Steps between sample grids; 0 for one at the end alone."""
    num_samples: Positive = 64
    """Images in a sample grid."""


@dataclasses.dataclass(frozen=True)
class Checkpoint(Checked):
    """What is saved when."""

    every: Positive = 5000
    """Steps between checkpoints; there is one at the end in any case."""
    keep: Positive = 3
    """How many of the newest are kept."""


@dataclasses.dataclass(frozen=True)
class Parallel(Checked):
    """What it runs on."""

    devices: Positive | None = None
    """How many of this machine's devices to use; None for all."""
    mode: Literal["jit", "pmap"] = "jit"
    """One program for all devices (jit with shardings), or one for each with an explicit mean (pmap)."""
    fsdp: Positive = 1
    """Devices that share one copy of parameters, average and optimiser state, each keeping a part."""

    def __post_init__(self):
        super().__post_init__()
        if self.mode == "pmap" and self.fsdp > 1:
            raise UserError(
                f"parallel.fsdp: pmap keeps a copy on each device; leave {self.fsdp} out or choose mode jit"
            )


@dataclasses.dataclass(frozen=True)
class Config(Checked):
    """Everything that defines a run."""

    GROUP: ClassVar[str] = ""

    model: Model = Model()
    diffusion: Diffusion = Diffusion()
    data: Data = Data()
    optim: Optim = Optim()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    parallel: Parallel = Parallel()
    seed: Annotated[int, Range(min=0, below=2**32)] = 0
    """The key from which all of the run's randomness is derived."""

    def __post_init__(self):
        super().__post_init__()
        height, width, _ = self.data.image_shape
        factor = 2 ** (len(self.model.channel_multipliers) - 1)
        if height % factor or width % factor:
            raise UserError(
                f"data.image_shape: {height}x{width} is not divisible by {factor}, "
                f"as the {len(self.model.channel_multipliers)} levels of model.channel_multipliers need"
            )
        if self.optim.clip == "device" and self.parallel.mode != "pmap":
            raise UserError(
                "optim.clip: device is for parallel.mode pmap, which has a gradient for each device"
            )
        if self.train.batch_size % self.train.accumulate:
            raise UserError(
                f"train.accumulate: {self.train.accumulate} does not divide train.batch_size {self.train.batch_size}"
            )


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested dicts that JSON can hold."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: dict[str, Any]) -> Config:
    """The config that `to_dict` gave. Raises UserError naming any unknown field, wrong type or bad value."""
    return _from_dict(Config, values, "")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim.learning_rate": ..., ...} of nested dicts."""
    flat = {}
    for name, value in values.items():
        flat.update(
            flatten(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {prefix + name: value}
        )
    return flat


def shipped_configs() -> dict[str, Path]:
    """The configs that come with the package, by name."""
    package = Path(__file__).parent.parent
    # In the wheel they lie inside the package, in a checkout beside it.
    folder = next(
        path for path in (package / "configs", package.parent / "configs") if path.is_dir()
    )
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def load_config(name: str) -> Config:
    """The CONFIG of a shipped config's name (`digits`) or of a file (`configs/digits.py`), which is executed.

    Raises UserError if there is no such file or it exports no Config named CONFIG.
    """
    shipped = shipped_configs()
    path = shipped.get(name, Path(name))
    if not path.is_file():
        raise UserError(f"config: no file {name!r}, and the shipped ones are {', '.join(shipped)}")
    try:
        config = runpy.run_path(str(path)).get("CONFIG")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"config: {path} does not run: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise UserError(f"config: {path} must define CONFIG = Config(...)")
    return config


def _is_file_source(source: str) -> bool:
    kind, _, path = source.partition(":")
    return kind in ("folder", "npz", "tfds") and bool(path)


def _from_dict(cls, values, prefix):
    if not isinstance(values, dict):
        raise UserError(
            f"{prefix.rstrip('.') or 'config'}: a table of fields is needed, got {values!r}"
        )
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise UserError(f"{prefix}{name}: unknown field; known are {', '.join(fields)}")
    converted = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(fields[name].type):
            value = _from_dict(fields[name].type, value, f"{prefix}{name}.")
        converted[name] = tuple(value) if isinstance(value, list) else value
    return cls(**converted)
