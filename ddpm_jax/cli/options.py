"""The options of each command: a dataclass each, whose fields tyro turns into options."""

import dataclasses
from typing import Annotated, ClassVar, Literal

import tyro

from ddpm_jax.calibration import FixedVariance
from ddpm_jax.calls.conditions import UNGUIDED, Guide
from ddpm_jax.config import (
    Checked,
    Config,
    Format,
    Natural,
    Positive,
    Range,
    SamplerName,
    Seed,
    Split,
    Step,
    Weights,
)
from ddpm_jax.config.places import METAVAR
from ddpm_jax.errors import UserError
from ddpm_jax.report.choice import Compute
from ddpm_jax.sampler import ANCESTRAL, Sampler
from ddpm_jax.samplers import BH, Grid

ConfigFields = Annotated[Config, tyro.conf.arg(name="")]
SamplerFields = Annotated[Sampler, tyro.conf.arg(name="")]
Run = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Path = Annotated[str, tyro.conf.arg(metavar="PATH")]
OptionalPath = Annotated[str | None, tyro.conf.arg(metavar="PATH")]
OptionalSource = Annotated[str | None, tyro.conf.arg(metavar=METAVAR)]


@dataclasses.dataclass(frozen=True)
class Launch:
    """How the program starts."""

    compile_cache: bool = True
    """Store compiled programs in the user's cache folder, so that later starts are faster."""
    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """Address of process 0 of several; found automatically on TPU pods, SLURM and Kubernetes."""
    num_processes: int | None = None
    """With --coordinator: number of processes."""
    process_id: int | None = None
    """With --coordinator: number of this process, from 0."""


Launched = Annotated[Launch, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Train a model, or resume the run in --workdir."""

    config: ConfigFields
    workdir: Path
    """Run directory; created if it does not exist."""
    init_from: Annotated[str | None, tyro.conf.arg(metavar="RUN")] = None
    """Start a new run from the weights of this RUN, anything that `ddpm-jax sample` takes."""
    dry_run: bool = False
    """Make three updates, say what memory and time a run takes, and write nothing."""
    launch: Launched = Launch()


@dataclasses.dataclass(frozen=True)
class Machine(Checked):
    """The machine that a run is planned for."""

    GROUP: ClassVar[str] = ""

    devices: Positive = 1
    """Number of devices that share the batch."""
    fsdp: Positive | None = None
    """Number of devices that share one copy of the training state; None for parallel.fsdp."""
    flops_per_s: Annotated[float | None, Range(above=0)] = None
    """Peak FLOP/s of one device; None for an A100's, in TF32 or bfloat16 as model.dtype says."""
    utilisation: Annotated[float, Range(above=0, max=1)] = 0.3
    """Fraction of the peak that the run is assumed to reach."""
    memory_gib: Annotated[float | None, Range(above=0)] = None
    """Memory of one device in GiB, to check whether the run fits; None to skip the check."""
    compile: Annotated[str | None, tyro.conf.arg(metavar="TOPOLOGY")] = None
    """Also compile the training step for these TPUs, e.g. v5e:2x2; needs libtpu but no TPU."""


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Estimate the memory, FLOPs, communication and hours of a run from array shapes alone."""

    config: ConfigFields
    machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine()


@dataclasses.dataclass(frozen=True)
class ModelOptions(Checked):
    """Which model."""

    GROUP: ClassVar[str] = ""

    run: Run
    """Run directory, .safetensors file, diffusers folder, or a model's name on huggingface.co."""
    weights: Weights | None = None
    """Averaged (ema) or last (raw) weights; None for a run's ema, or those that a file holds."""
    step: Step | None = None
    """Step of the checkpoint; best for the lowest checkpoint.best; None for the newest."""


@dataclasses.dataclass(frozen=True)
class SampleOptions(ModelOptions):
    """Draw images from a trained model. Image i of a seed is the same in every call."""

    sampler: SamplerFields = ANCESTRAL
    guide: Annotated[Guide, tyro.conf.arg(name="")] = UNGUIDED
    n: Annotated[int, Range(min=1, max=2**32), tyro.conf.arg(aliases=["-n"])] = 64
    """Number of images."""
    seed: Seed = 0
    """Random seed; the same seed gives the same images."""
    out: Path = "samples.png"
    """A grid (.png), an array (.npz, .npy), or a folder/ of files (only missing ones are drawn)."""
    files: Literal["png", "tif", "npy"] | None = None
    """Files of a folder; None for png where values and channels allow it, else npy."""
    channels: tuple[Positive, ...] | None = None
    """Channels that a grid shows, counted from 1; None for all, side by side unless 1 or 3."""
    batch_size: Positive | None = None
    """Images per batch; None for 64 per device."""
    launch: Launched = Launch()


@dataclasses.dataclass(frozen=True)
class Chain(Checked):
    """The ancestral chain that a bound is of."""

    GROUP: ClassVar[str] = ""
    LONGEST: ClassVar[int] = Sampler.LONGEST

    steps: Positive | None = None
    """Number of reverse steps; None for all T."""
    grid: Grid | Literal["likelihood"] | None = None
    """With --steps: how they lie among the T; likelihood needs a calibration."""
    timesteps: tuple[Natural, ...] | None = None
    """The steps among 0, ..., T - 1, ascending, in place of --steps and --grid."""
    variance: FixedVariance | None = None
    """Variance of a step; optimal needs a calibration; None for the model's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.sampler.name == "ancestral"  # It checks what fits together.

    @property
    def sampler(self) -> Sampler:
        """The chain as a Sampler."""
        return Sampler("ancestral", **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class LikelihoodOptions(ModelOptions):
    """Measure the bound on the negative log-likelihood of a split; resumes if interrupted."""

    chain: Annotated[Chain, tyro.conf.arg(name="")] = Chain()
    conditional: bool | None = None
    """The bound given the images' labels (True) or no class (False); None for labels if any."""
    images: Positive | None = None
    """The first so many images of the split; None for all."""
    resolution: Annotated[float | None, Range(above=0)] = None
    """Of continuous values: width of the bins that bits/dim count, in the data's units; None for
    2/255 of the model's unit."""
    split: Split | None = None
    """Training, held-out or test images; None for test if data.test is set, else holdout."""
    draws: Positive = 1
    """Number of draws, each with fresh noise; the standard error is over the draws."""
    seed: Seed = 0
    """Random seed of the noise."""
    batch_size: Positive | None = None
    """Images per batch; None for 64 per device."""
    data: OptionalSource = None
    """The split's images; None for the config's."""
    out: OptionalPath = None
    """Folder for the results; None for one in the run's likelihood/."""
    launch: Launched = Launch()


@dataclasses.dataclass(frozen=True)
class CalibrateOptions(ModelOptions):
    """Measure the errors of the predicted images at every step; resumes if interrupted.

    The best variance (--variance optimal) and the best steps (--grid likelihood) follow from them.
    """

    images: Annotated[int, Range(min=2)] = 256
    """The first so many images of the split; of one alone there is no standard error."""
    split: Split | None = None
    """Images to measure on; None for those held out, or data.test where there are none."""
    seed: Seed = 0
    """Random seed of the noise."""
    batch_size: Positive | None = None
    """Images per batch; None for 64 per device."""
    data: OptionalSource = None
    """The split's images; None for the config's."""
    out: OptionalPath = None
    """For models that are no run: a .npz, or a new .safetensors that holds the model, too."""
    launch: Launched = Launch()


@dataclasses.dataclass(frozen=True)
class TuneOptions(ModelOptions):
    """Find the best sampler of few steps for a model; trains nothing. --grid tuned then uses it."""

    steps: Positive = 10
    """Number of reverse steps."""
    sampler: SamplerName | None = None
    """The deterministic sampler whose steps are sought; None to compare several, and others."""
    order: Annotated[int | None, Range(min=2, max=4)] = None
    """With --sampler unipc (2 or 3) and deis (2 to 4); None for 3."""
    b_h: BH | None = None
    """With --sampler unipc: b1 or b2; None for b2."""
    images: Annotated[int, Range(min=8, max=2**29)] = 256  # Three times as many starts are taken.
    """Number of starts, half of them for the search; and of samples, where samplers compete."""
    seed: Seed = 0
    """Random seed of the starts; the same seed gives the same result."""
    batch_size: Positive | None = None
    """Images per batch; None for 64 per device."""
    data: OptionalSource = None
    """Without --sampler: real images; None for the run's."""
    out: OptionalPath = None
    """For models that are no run: their folder, or a new .safetensors that holds the model, too."""
    launch: Launched = Launch()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler is None and (self.order or self.b_h):
            name = "order" if self.order else "b_h"
            raise UserError(f"{name}: belongs to a --sampler; name that, too")
        if self.sampler is not None and self.data is not None:
            raise UserError(
                "data: a named --sampler is tuned without images; leave out --data, or --sampler"
            )

    @property
    def method(self) -> Sampler | None:
        """The sampler without its steps; None where none is named."""
        if self.sampler is None:
            return None
        return Sampler(self.sampler, order=self.order, b_h=self.b_h)


@dataclasses.dataclass(frozen=True)
class EvaluateOptions(ModelOptions):
    """Compare samples with real images: IS, FID, KID, precision, recall; resumes if interrupted.

    Without --labels, samples of a model with classes have labels in the images' proportions.
    """

    sampler: SamplerFields = ANCESTRAL
    guide: Annotated[Guide, tyro.conf.arg(name="")] = UNGUIDED
    data: OptionalSource = None
    """Real images (digits, too); None for the config's."""
    n: Annotated[int, Range(min=20, max=2**32), tyro.conf.arg(aliases=["-n"])] = 50_000
    """Number of samples; the paper uses 50,000."""
    seed: Seed = 0
    """Random seed; the same seed gives the same images."""
    inception: OptionalPath = None
    """Weights of FID's InceptionV3 (.safetensors or .npz); None trains a small proxy instead."""
    batch_size: Positive | None = None
    """Images per batch; None for 64 per device."""
    samples: OptionalPath = None
    """Folder/ of `ddpm-jax sample` to use and fill up; None for one in the results' folder."""
    likelihood: bool = True
    """Also measure the likelihood of the test or held-out images."""
    out: OptionalPath = None
    """Folder for the results; None for one in the run's evaluation/."""
    launch: Launched = Launch()


@dataclasses.dataclass(frozen=True)
class ExportOptions(ModelOptions):
    """Write a trained model for other programs. The sampler options only apply to stablehlo."""

    sampler: SamplerFields = ANCESTRAL
    format: Format = "safetensors"
    """Weights in one file, a folder for diffusers, or programs that need only jax to sample."""
    out: Path = "model.safetensors"
    """New file NAME.safetensors, or a new folder for the other formats."""


@dataclasses.dataclass(frozen=True)
class ReportOptions(Checked):
    """Write one HTML file that shows runs, also while they train. Nothing is written into them."""

    GROUP: ClassVar[str] = ""
    LONGEST: ClassVar[int] = 8

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run directories; several are compared."""
    out: Path = "report.html"
    """File to write."""
    compute: Compute = "quick"
    """Draw a few samples and find the images nearest to them (quick), or compute nothing (none)."""
    data: OptionalSource = None
    """Real images of all runs; None for each config's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runs:
            raise UserError("RUN is missing; name one or more run directories")
