"""The config's dataclasses.

Beside each field's type stand its range and its meaning: whether it may differ when a run
resumes, whether it decides the network, whether it changes the images (see meaning.py). The text
below a field is its help on the command line.
"""

import dataclasses
import functools
import math
from collections import Counter
from typing import Annotated, ClassVar, Literal

import numpy as np

from ddpm_jax.config import places
from ddpm_jax.config.checked import Checked, Range
from ddpm_jax.config.choices import DataDtype, Dtype, Metric, Mode, ScheduleName, WeightingName
from ddpm_jax.config.meaning import (
    AROUND,
    BETAS,
    FREE,
    IMAGES,
    LEARNING,
    NETWORK,
    NETWORK_AND_IMAGES,
    PLACE,
)
from ddpm_jax.config.values import Values, parse_values
from ddpm_jax.diffusion import LEARNED, Clip, Prediction, Variance
from ddpm_jax.errors import UserError, shown
from ddpm_jax.losses import LossName
from ddpm_jax.schedule import SMALLEST_BETA, betas_of, schedule_parameters

Positive = Annotated[int, Range(min=1)]
Natural = Annotated[int, Range(min=0)]
Timesteps = Annotated[int, Range(min=1, max=1_000_000)]
WIDEST = 2**18
"""Channels of a level."""
LARGEST = 2**30
"""Numbers of an image."""
# Far beyond any real use, and small enough that a network is built in a moment.
Size = Annotated[int, Range(min=1, max=65_536)]
BatchSize = Annotated[int, Range(min=1, max=2**24)]
Beta = Annotated[float, Range(min=SMALLEST_BETA, max=1)]
Seed = Annotated[int, Range(min=0, below=2**32)]


@dataclasses.dataclass(frozen=True)
class Model(Checked):
    """The U-Net."""

    base_channels: Annotated[int, Range(min=4, max=65_536), NETWORK] = 128
    """Channels of the first level."""
    channel_multipliers: Annotated[tuple[int, ...], Range(min=1, max=1024), NETWORK] = (1, 2, 2, 2)
    """Channels of each level, in units of base_channels."""
    num_res_blocks: Annotated[int, Range(min=1, max=64), NETWORK] = 2
    """Residual blocks per level on the way down; on the way up there is one more."""
    attention_resolutions: Annotated[tuple[int, ...], Range(min=1), NETWORK] = (16,)
    """Resolutions of the levels with attention: their smaller side in pixels."""
    dropout: Annotated[float, Range(min=0, below=1), LEARNING] = 0.1
    """Dropout rate inside each residual block, in training."""
    norm_groups: Annotated[Size, NETWORK_AND_IMAGES] = 32
    """Number of groups of each group normalisation."""
    num_classes: Annotated[int | Literal["auto"] | None, Range(min=1, max=65_536), NETWORK] = None
    """Classes of the images, by their labels; auto for as many as the data have, None for none."""
    no_class: Annotated[bool, NETWORK] = True
    """With num_classes: whether it knows images of no class too, which guidance needs."""
    dtype: Annotated[Dtype, IMAGES] = "float32"
    """Type that the inner layers and their sums compute in; the rest stays float32."""
    remat: Annotated[tuple[int, ...], Range(min=0), FREE] = ()
    """Levels (0 is the finest) that recompute activations in the backward pass, to save memory."""
    winograd: Annotated[bool, FREE] = True
    """Whether a CPU draws and measures with wide convolutions of fewer multiplications."""

    @property
    def class_rows(self) -> int:
        """Rows of the class embedding: one a class, and a last one for no class; 0 for none."""
        if self.num_classes == "auto":
            raise UserError(
                "model.num_classes: auto stands for the classes of the data, which are not read "
                "here; give their number"
            )
        return self.num_classes + self.no_class if self.num_classes else 0

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = len(self.channel_multipliers)
        if not levels:
            raise UserError("model.channel_multipliers: must have one number per level, got none")
        for level in self.remat:
            if level >= levels:
                raise UserError(
                    f"model.remat: there is no level {level}; choose from 0 to {levels - 1}"
                )
        if self.base_channels % 2:
            raise UserError(f"model.base_channels: must be even, got {self.base_channels}")
        for multiplier in self.channel_multipliers:
            width = self.base_channels * multiplier
            if width > WIDEST:
                raise UserError(
                    f"model.channel_multipliers: a level would have {width} channels; choose "
                    f"at most {WIDEST}"
                )
            if width % self.norm_groups:
                raise UserError(
                    f"model.norm_groups: {self.norm_groups} does not divide the {width} channels "
                    "of a level; choose a divisor"
                )


@dataclasses.dataclass(frozen=True)
class Diffusion(Checked):
    """The diffusion process and what the network predicts."""

    schedule: Annotated[ScheduleName, BETAS] = "linear"
    """How the betas run from the first step to the last."""
    num_timesteps: Annotated[Timesteps, BETAS] = 1000
    """T, the number of steps. With `linear`, also scale beta_start and beta_end by 1000 / T."""
    beta_start: Annotated[Beta | None, BETAS] = None
    """First beta; None for the schedule's own, 1e-4."""
    beta_end: Annotated[Beta | None, BETAS] = None
    """Last beta; None for the schedule's own, 0.02."""
    prediction: Annotated[Prediction, NETWORK_AND_IMAGES] = "eps"
    """What the network predicts: the noise, the image, the posterior's mean, or v."""
    variance: Annotated[Variance, NETWORK_AND_IMAGES] = "fixed_large"
    """Variance of a reverse step: beta_t, the posterior's, learned, or learned between those."""
    clip: Annotated[Clip, IMAGES] = True
    """Clip the predicted x_0 to [-1, 1]; dynamic does so by quantile (in sampling alone). False
    where data.values have no bounds (standardise)."""
    loss: Annotated[LossName, LEARNING] = "simple"
    """Squared error (simple), the bound in bits/dim (vlb), or simple + 0.001 vlb (hybrid)."""
    weighting: Annotated[WeightingName | None, LEARNING] = None
    """Weighting of the squared error by noise level; None for none, unless min_snr_gamma is set."""
    min_snr_gamma: Annotated[float | None, Range(above=0), LEARNING] = None
    """Min-SNR weighting with this gamma, e.g. 5: the error of x_0 times min(SNR, gamma)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss == "simple" and self.learns_variance:
            raise UserError(
                "diffusion.loss: the simple loss cannot train a learned variance "
                f"({self.variance}); choose hybrid or vlb, or a fixed variance"
            )
        if self.loss == "hybrid" and not self.learns_variance:
            raise UserError(
                f"diffusion.loss: hybrid needs a learned variance, and {self.variance} is fixed; "
                "choose simple, or diffusion.variance learned_range"
            )
        self._check_weighting()
        for name in ("beta_start", "beta_end"):
            if getattr(self, name) is None or name in schedule_parameters(self.schedule):
                continue
            raise UserError(
                f"diffusion.{name}: schedule {self.schedule!r} does not use it; leave it out"
            )
        if self.prediction == "eps" and self.loss != "simple":
            self._check_end()

    def _check_end(self) -> None:
        alphas_bar = np.prod(1 - self._betas)
        if np.float32(alphas_bar) > 0:
            return
        those = " of these betas" if self.schedule_parameters else ""
        where = " in float32" if self._betas.max() < 1 else ""
        raise UserError(
            f"diffusion.prediction: with schedule {self.schedule}{those}, x_T has no trace of the "
            f"image, and the bound with eps is infinite{where}; choose x_0, mean or v, or "
            "diffusion.loss simple"
        )

    def check_bound(self) -> None:
        """Raises UserError if the bound of such a model is infinite, whatever it has learned.

        It is where eps is predicted of an x_T that has no trace of the image, and the x_0 that
        follows is not clipped.
        """
        if self.prediction == "eps" and not self.clip and self._betas.max() == 1:
            raise UserError(
                f"likelihood: with schedule {self.schedule}, x_T has no trace of the image, and "
                "the bound with eps is infinite without diffusion.clip; measure a model with "
                "diffusion.clip, or one that predicts x_0, mean or v"
            )

    def _check_weighting(self) -> None:
        for name in ("weighting", "min_snr_gamma"):
            if self.loss == "vlb" and getattr(self, name) is not None:
                raise UserError(
                    f"diffusion.{name}: loss vlb has weights of its own; leave it out or choose "
                    "another loss"
                )
        if self.min_snr_gamma is not None and self.weighting not in (None, "min_snr"):
            raise UserError(
                f"diffusion.min_snr_gamma: weighting {self.weighting!r} does not use it; leave it "
                "out"
            )

    @property
    def learns_variance(self) -> bool:
        """Whether half of the network's output channels are for the variance."""
        return self.variance in LEARNED

    @property
    def schedule_parameters(self) -> dict[str, float]:
        """The schedule's parameters that are given, for make_schedule."""
        given = {"beta_start": self.beta_start, "beta_end": self.beta_end}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def _betas(self) -> np.ndarray:
        return betas_of(self.schedule, self.num_timesteps, **self.schedule_parameters)


@dataclasses.dataclass(frozen=True)
class Data(Checked):
    """Where the images come from."""

    LONGEST: ClassVar[int] = 65_536
    """Class names: as many as model.num_classes may be."""

    source: Annotated[str, PLACE] = "digits"
    """digits, folder:PATH (or a zip), npz:PATH, npy:PATH, hf:PATH (a saved data set or a folder of
    parquet files) or tfds:NAME[/CONFIG]; array only in Python."""
    test: Annotated[str | None, PLACE] = None
    """Test images for likelihood, evaluate and figure, named as those of source; None for none."""
    dir: Annotated[str | None, PLACE] = None
    """Folder of the tfds data sets; None for $TFDS_DATA_DIR or else ~/tensorflow_datasets."""
    manual_dir: Annotated[str | None, PLACE] = None
    """Folder with the original files of a tfds data set, to prepare it without a download."""
    image_shape: Annotated[tuple[int, int, int], Range(min=1, max=65_536), NETWORK_AND_IMAGES] = (
        32,
        32,
        3,
    )
    """Height, width, channels. Image files are resized to cover it and cropped in the centre."""
    values: Annotated[str, IMAGES] = "uint8"
    """Which numbers the data hold: uint8, uint16, range LOW HIGH (any numbers between these),
    quantiles LOW HIGH (cut off there, for example 0.001 0.999), or standardise (no bounds)."""
    per_channel: Annotated[bool, LEARNING] = False
    """With quantiles and standardise: measure each channel for itself instead of all together."""
    nonfinite: Annotated[Literal["refuse", "zero", "centre"], LEARNING] = "refuse"
    """Put in the place of NaNs and infinities: 0, or the middle of the range (the mean with
    standardise); refuse stops with their number."""
    # A run keeps here what it found in its training images.
    offset: Annotated[tuple[float, ...], IMAGES] = ()
    """The value that is 0 to the model, one for all channels or one each; none given: measured."""
    scale: Annotated[tuple[float, ...], IMAGES] = ()
    """How far from it the value lies that is 1 to the model; none given: measured."""
    dtype: Annotated[DataDtype | None, IMAGES] = None
    """Type of the data's numbers, in which samples are written; None for that of the source."""
    # It may differ on resuming, since the fingerprint covers which images there are.
    skip_unfit: Annotated[bool, AROUND] = False
    """Leave out images of a folder that are smaller than image_shape or too large to decode."""
    # It may differ likewise: where it changes labels, it changes the fingerprint. A run whose model
    # has classes keeps here the names that it found.
    class_names: Annotated[tuple[str, ...], AROUND] = ()
    """Names of the labels 0, 1, ...; none given: folders of classes, in alphabetical order."""
    flip: Annotated[bool, LEARNING] = True
    """Mirror half of the training images, chosen at random."""
    holdout: Annotated[float, Range(min=0, max=0.9), LEARNING] = 0.1
    """Fraction of images held out from training, chosen by a hash of their index or name."""
    workers: Annotated[int, Range(min=0, max=1024), AROUND] = 4
    """Processes that read ahead if the images do not fit in cache_mb; 0 for a thread instead."""
    cache_mb: Annotated[Natural, AROUND] = 4096
    """Keep images decoded in memory up to this many MiB; read larger data sets batch by batch."""
    disk_cache_mb: Annotated[Natural, AROUND] = 4096
    """Keep what was decoded of folders in the user's cache folder for the next start, up to this
    many MiB for all folders together; 0 keeps and uses nothing."""
    on_device: Annotated[bool, AROUND] = False
    """Keep all images (at most cache_mb) in each device's memory."""

    @functools.cached_property
    def value_kind(self) -> Values:
        """What `values` says."""
        return parse_values(self.values)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_values()
        if math.prod(self.image_shape) > LARGEST:
            raise UserError(
                f"data.image_shape: an image would have {math.prod(self.image_shape)} numbers; "
                f"choose at most {LARGEST}"
            )
        twice = [name for name, count in Counter(self.class_names).items() if count > 1]
        if twice:
            raise UserError(
                f"data.class_names: {shown(twice[0])} stands there more than once; name each class "
                "once"
            )
        if self.source not in ("digits", "array") and not places.is_file_source(self.source):
            raise UserError(f"data.source: must be digits, {places.CHOICES}, got {self.source!r}")
        if self.test is not None and not places.is_file_source(self.test):
            raise UserError(f"data.test: must be {places.CHOICES}, got {self.test!r}")

    def _check_values(self) -> None:
        kind = self.value_kind
        given = [name for name in ("offset", "scale") if getattr(self, name)]
        if given and not kind.measured:
            raise UserError(
                f"data.{given[0]}: values {kind.kind} already says it; leave it out, or choose "
                "standardise"
            )
        if len(given) == 1:
            raise UserError("data.offset and data.scale: give both or neither")
        channels = self.image_shape[2]
        for name in given:
            count = len(getattr(self, name))
            if count not in (1, channels):
                raise UserError(
                    f"data.{name}: must be one number, or one for each of the {channels} channels, "
                    f"got {count}"
                )
        if self.scale and min(self.scale) <= 0:
            raise UserError(f"data.scale: must be above 0, got {min(self.scale):g}")
        if self.per_channel and not kind.measured:
            raise UserError(
                f"data.per_channel: values {kind.kind} measures nothing; leave it out, or choose "
                "quantiles or standardise"
            )
        if self.nonfinite != "refuse" and kind.levels:
            raise UserError(
                f"data.nonfinite: values {kind.kind} are always finite; leave it out, or choose "
                "other data.values"
            )
        if (
            self.nonfinite == "zero"
            and kind.kind == "range"
            and not (kind.low or 0) <= 0 <= (kind.high or 0)
        ):
            raise UserError(
                f"data.nonfinite: 0 is not in the range of data.values ({self.values}); choose "
                "centre"
            )


@dataclasses.dataclass(frozen=True)
class Optim(Checked):
    """Adam(0.9, 0.999, 1e-8) with warm-up, clipping and an average of the weights."""

    learning_rate: Annotated[float, Range(above=0), LEARNING] = 2e-4
    """Learning rate after the warm-up; it does not decay."""
    warmup_steps: Annotated[Natural, LEARNING] = 5000
    """Steps over which the learning rate rises linearly from 0."""
    clip_norm: Annotated[float, Range(above=0), LEARNING] = 1.0
    """Gradients with a larger norm over all parameters are scaled down to it."""
    clip: Annotated[Literal["global", "device"], LEARNING] = "global"
    """Clip the mean gradient, or each device's before the mean, as the paper's code did (pmap)."""
    ema_decay: Annotated[float, Range(min=0, below=1), LEARNING] = 0.9999
    """Decay per step of the exponential moving average of the parameters."""
    ema_warmup: Annotated[bool, LEARNING] = False
    """Decay at most (1 + n) / (10 + n) at step n: the average forgets the first parameters soon."""


@dataclasses.dataclass(frozen=True)
class Train(Checked):
    """The training loop."""

    steps: Annotated[Positive, AROUND] = 800_000
    """Total number of training steps."""
    batch_size: Annotated[BatchSize, LEARNING] = 128
    """Images per step, over all devices."""
    accumulate: Annotated[Positive, FREE] = 1
    """Split each batch into this many parts, computed one after another to save memory."""
    label_dropout: Annotated[float, Range(min=0, max=1), LEARNING] = 0.1
    """With model.num_classes: the part of the images that are learned as of no class."""
    log_every: Annotated[Positive, AROUND] = 100
    """Steps between lines of metrics.jsonl."""
    eval_every: Annotated[Natural, AROUND] = 5000
    """Steps between held-out losses; 0 for never."""
    eval_images: Annotated[Positive, AROUND] = 2048
    """Maximum number of images for the held-out loss."""
    sample_every: Annotated[Natural, AROUND] = 20_000
    """Steps between sample grids; 0 for only one at the end."""
    num_samples: Annotated[int, Range(min=0, max=2**24), AROUND] = 64
    """Images in a sample grid; 0 for no grids."""
    evaluate_every: Annotated[Natural, AROUND] = 0
    """Steps between measurements of FID, KID and bits/dim of the averaged weights; 0 for never."""
    evaluate_images: Annotated[int, Range(min=20, max=2**24), AROUND] = 1000
    """Samples for FID and KID, by 50 steps of ddim, since all T would cost more than the training.
    bits/dim is of as many held-out images as cost the same: a twentieth of them if T is 1000."""
    inception: Annotated[str | None, PLACE] = None
    """Weights of FID's InceptionV3 (.safetensors or .npz); None for a small proxy, called so."""


@dataclasses.dataclass(frozen=True)
class Checkpoint(Checked):
    """When checkpoints are saved and how many are kept."""

    every: Annotated[Positive, AROUND] = 5000
    """Steps between checkpoints; the last step is always saved."""
    keep: Annotated[Positive, AROUND] = 3
    """Number of newest checkpoints to keep."""
    best: Annotated[Metric | None, AROUND] = None
    """Also keep the checkpoint where this metric was lowest, for --step best; None for none."""


@dataclasses.dataclass(frozen=True)
class Parallel(Checked):
    """The devices that a run uses, and how."""

    devices: Annotated[Positive | None, AROUND] = None
    """Number of this machine's devices to use; None for all."""
    mode: Annotated[Mode, FREE] = "jit"
    """One program for all devices (jit with shardings), or one for each (pmap)."""
    fsdp: Annotated[Positive, FREE] = 1
    """Number of devices that share one copy of parameters, their average and optimiser state."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "pmap" and self.fsdp > 1:
            raise UserError(
                "parallel.fsdp: parallel.mode pmap keeps a whole copy on each device; "
                f"leave out fsdp {self.fsdp} or choose mode jit"
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
    seed: Annotated[Seed, LEARNING] = 0
    """Random seed of the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data.value_kind.bounded:
            self._stop_clipping()
        height, width, _ = self.data.image_shape
        levels = len(self.model.channel_multipliers)
        factor = 2 ** (levels - 1)
        if height % factor or width % factor:
            raise UserError(
                f"data.image_shape: {height}x{width} is not divisible by {factor}, "
                f"which the {levels} levels of model.channel_multipliers need; choose another size"
            )
        if self.optim.clip == "device" and self.parallel.mode != "pmap":
            raise UserError(
                "optim.clip: device needs one gradient per device; choose parallel.mode pmap, "
                "or optim.clip global"
            )
        if self.train.batch_size % self.train.accumulate:
            raise UserError(
                f"train.accumulate: {self.train.accumulate} does not divide train.batch_size "
                f"{self.train.batch_size}; choose a divisor"
            )

    def _stop_clipping(self) -> None:
        """Sets diffusion.clip to False: values without bounds are nowhere clipped."""
        if self.diffusion.clip == "dynamic":
            raise UserError(
                f"diffusion.clip: dynamic clips to bounds, which values {self.data.values} do not "
                "have; leave it out"
            )
        unclipped = dataclasses.replace(self.diffusion, clip=False)
        object.__setattr__(self, "diffusion", unclipped)  # As a frozen dataclass sets its fields.
