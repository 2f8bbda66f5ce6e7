"""The options of each command: a dataclass each, whose fields tyro turns into options."""

import dataclasses
from typing import Annotated, ClassVar

import tyro

from ddpm_jax.config import Checked, Config, Format, Positive, Range, Seed, Split, Weights
from ddpm_jax.sampler import ANCESTRAL, Sampler

ConfigFields = Annotated[Config, tyro.conf.arg(name="")]
SamplerFields = Annotated[Sampler, tyro.conf.arg(name="")]
Run = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Path = Annotated[str, tyro.conf.arg(metavar="PATH")]
OptionalPath = Annotated[str | None, tyro.conf.arg(metavar="PATH")]
OptionalSource = Annotated[str | None, tyro.conf.arg(metavar="SOURCE")]


@dataclasses.dataclass(frozen=True)
class Launch:
    """How the program starts."""

    compile_cache: bool = True
    """Keep compiled programs in the user's cache folder, for a faster next start."""
    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """Address of process 0 of several hosts; TPU pods, SLURM and Kubernetes need no option."""
    num_processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Number of this process, from 0."""


Launched = Annotated[Launch, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Train a model, or resume the run in the workdir."""

    config: ConfigFields
    workdir: Path
    """Folder of the run, made if it is missing."""
    init_from: Annotated[str | None, tyro.conf.arg(metavar="RUN")] = None
    """Start from these weights: a run, .safetensors, a diffusers folder, its name on the hub."""
    launch: Launched = Launch()


@dataclasses.dataclass(frozen=True)
class Machine(Checked):
    """The machine that a run is planned for."""

    GROUP: ClassVar[str] = ""

    devices: Positive = 1
    """Number of devices that share the batch."""
    fsdp: Positive | None = None
    """Number of devices that share one copy of the state; None for parallel.fsdp."""
    flops_per_s: Annotated[float | None, Range(above=0)] = None
    """Peak FLOP/s of a device; None for an A100's, in TF32 or bfloat16 as the model computes."""
    utilisation: Annotated[float, Range(above=0, max=1)] = 0.3
    """Part of the peak that the run is assumed to reach."""
    memory_gib: Annotated[float | None, Range(above=0)] = None
    """Memory of a device in GiB, to say whether the run fits; None to skip that."""
    compile: Annotated[str | None, tyro.conf.arg(metavar="TOPOLOGY")] = None
    """Also compile the step for TPUs (none are needed here), e.g. v5e:2x2; needs libtpu."""


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """What a run takes, from shapes alone: memory, FLOPs, traffic, hours."""

    config: ConfigFields
    machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine()


@dataclasses.dataclass(frozen=True)
class ModelOptions(Checked):
    """Which model."""

    GROUP: ClassVar[str] = ""

    run: Run
    """A run's folder, a .safetensors file, a diffusers folder or its name on huggingface.co."""
    weights: Weights | None = None
    """Averaged weights, or the last update's; None for averaged, or a file's only ones."""
    step: int | None = None
    """Step of the checkpoint; None for the newest."""


@dataclasses.dataclass(frozen=True)
class SampleOptions(ModelOptions):
    """Draw images from a trained model. Image i of a seed is the same in every call."""

    sampler: SamplerFields = ANCESTRAL
    n: Annotated[int, Range(min=1, max=2**32), tyro.conf.arg(aliases=["-n"])] = 64
    """Number of images."""
    seed: Seed = 0
    """Seed of the key that they are drawn from."""
    out: Path = "samples.png"
    """A grid (.png), uint8 arrays (.npz), or a folder/ of PNGs (only missing ones are made)."""
    batch_size: Positive | None = None
    """Images at a time; None for 64 a device."""
    launch: Launched = Launch()


@dataclasses.dataclass(frozen=True)
class LikelihoodOptions(ModelOptions):
    """The bound on the negative log-likelihood of a split's images; resumes where it stopped."""

    split: Split | None = None
    """Images trained on, held out, or of data.test; None for test if there is one, else holdout."""
    draws: Positive = 1
    """Number of draws, each with fresh noise; the standard error is over these."""
    seed: Seed = 0
    """Seed of the key that the noise is drawn from."""
    batch_size: Positive | None = None
    """Images at a time; None for 64 a device."""
    data: OptionalSource = None
    """folder:PATH, npz:PATH or tfds:NAME to read the split from; None for the config's own."""
    out: OptionalPath = None
    """Folder of the results; None for one in the run's likelihood/."""
    launch: Launched = Launch()


@dataclasses.dataclass(frozen=True)
class EvaluateOptions(ModelOptions):
    """Compare samples with real images: the paper's row, and more; resumes where it stopped."""

    sampler: SamplerFields = ANCESTRAL
    data: OptionalSource = None
    """Real images (digits, folder:PATH, npz:PATH, tfds:NAME); None for the run's own."""
    n: Annotated[int, Range(min=20, max=2**32), tyro.conf.arg(aliases=["-n"])] = 50_000
    """Number of samples; the default is the paper's."""
    seed: Seed = 0
    """Seed of the key that they are drawn from."""
    inception: OptionalPath = None
    """File of FID's InceptionV3 (.safetensors or .npz); None for a small classifier, the proxy."""
    batch_size: Positive | None = None
    """Images at a time; None for 64 a device."""
    samples: OptionalPath = None
    """A folder/ of `ddpm-jax sample` to use and fill up; None for one in the results."""
    likelihood: bool = True
    """Also measure the bound on the images that were not trained on."""
    out: OptionalPath = None
    """Folder of the results; None for one in the run's evaluation/."""
    launch: Launched = Launch()


@dataclasses.dataclass(frozen=True)
class ExportOptions(ModelOptions):
    """Write a trained model for other programs. The sampler's options apply to stablehlo alone."""

    sampler: SamplerFields = ANCESTRAL
    format: Format = "safetensors"
    """Weights in one file, a folder for diffusers, or programs that sample with jax alone."""
    out: Path = "model.safetensors"
    """A new file NAME.safetensors, or for the other formats a new folder."""
