"""What the commands take: a dataclass each, whose fields tyro turns into options."""

import dataclasses
from typing import Annotated, ClassVar, Literal

import tyro

from ddpm_jax.config import Config, Positive
from ddpm_jax.config.checked import Checked, Range


@dataclasses.dataclass(frozen=True)
class Launch:
    """How the programme starts."""

    compile_cache: bool = True
    """Keep compiled programs in the user's cache folder for the next start (JAX_ENABLE_COMPILATION_CACHE=0: no)."""
    coordinator: str | None = None
    """HOST:PORT of process 0 where several hosts work together; TPU pods, SLURM and Kubernetes need none of this."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which one this is, from 0."""


Launched = Annotated[Launch, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Train a model, or go on with the one in the workdir."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    workdir: str
    """Folder of the run, made if it is missing."""
    init_from: str | None = None
    """Start from these weights: a run, .safetensors, a diffusers folder, its name on the hub."""
    launch: Launched = Launch()


@dataclasses.dataclass(frozen=True)
class Machine(Checked):
    """What a run is planned for."""

    GROUP: ClassVar[str] = ""

    devices: Positive = 1
    """How many devices share the batch."""
    fsdp: Positive | None = None
    """Over how many of them parameters, average and optimiser state are divided; None for parallel.fsdp."""
    flops_per_s: Annotated[float, Range(above=0)] | None = None
    """Peak FLOP/s of a device; None for an A100's, in TF32 or, for such a model, in bfloat16."""
    utilisation: Annotated[float, Range(above=0, max=1)] = 0.3
    """Part of the peak that the run is taken to reach."""
    memory_gib: Annotated[float, Range(above=0)] | None = None
    """Memory of a device in GiB, to tell whether the run fits; None to tell only what it takes."""
    compile: str | None = None
    """Also compile the step for TPUs that need not be here, for one v5e:2x2, and tell its memory; needs libtpu."""


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """What a run takes, from shapes alone: memory, FLOPs, traffic, hours."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine()


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Which weights."""

    run: tyro.conf.Positional[str]
    """Folder of the run, or a model from elsewhere: .safetensors, a diffusers folder, its name on the hub."""
    weights: Literal["ema", "raw"] | None = None
    """The averaged weights or those of the last update; None for a run's averaged ones, or what a file holds."""
    step: int | None = None
    """Checkpoint; None for the newest."""


@dataclasses.dataclass(frozen=True)
class SamplerOptions(ModelOptions):
    """And how they draw."""

    sampler: Literal["ancestral", "ddim", "dpm-solver++"] = "ancestral"
    """The paper's Algorithm 2, or one that needs few steps."""
    steps: int | None = None
    """Steps taken of the T; None for all."""
    eta: float | None = None
    """Noise of a ddim step, from 0 to 1; None for 0."""
    grid: Literal["linspace", "leading", "trailing", "quad"] | None = None
    """How the steps lie among the T; None for linspace (dpm-solver++: trailing)."""


@dataclasses.dataclass(frozen=True)
class SampleOptions(SamplerOptions):
    """Draw images from a trained model. Image i of a seed is the same whatever else is asked for."""

    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 64
    """How many images."""
    seed: int = 0
    """The key they are drawn from."""
    out: str = "samples.png"
    """A grid (.png), uint8 arrays (.npz), or a folder/ of numbered PNGs, of which only the missing are made."""
    batch_size: int | None = None
    """Images at a time; None for 64 a device."""
    launch: Launched = Launch()


@dataclasses.dataclass(frozen=True)
class LikelihoodOptions(ModelOptions):
    """The bound on the negative log-likelihood of all images of a split; goes on where it was stopped."""

    split: Literal["train", "holdout", "test"] | None = None
    """The two parts of the run's own images, or its data.test; None for test where there is one, else holdout."""
    draws: int = 1
    """At least how often, with other noise; the standard error is over these."""
    seed: int = 0
    """The key the noise is drawn from."""
    batch_size: int | None = None
    """Images at a time; None for 64 a device."""
    data: str | None = None
    """folder:PATH, npz:PATH or tfds:NAME to read the split from; None for where the config says."""
    out: str | None = None
    """Folder of the results; None for one in the run's likelihood/."""
    launch: Launched = Launch()


@dataclasses.dataclass(frozen=True)
class EvaluateOptions(SamplerOptions):
    """Compare samples with real images: the paper's row, and more; goes on where it was stopped."""

    data: str | None = None
    """digits, folder:PATH, npz:PATH or tfds:NAME of real images; None for the run's own, trained on and held out."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 50_000
    """How many samples; the paper's number is the default."""
    seed: int = 0
    """The key they are drawn from."""
    inception: str | None = None
    """File of FID's InceptionV3 (.safetensors or .npz); None for a classifier of the real images, called proxy."""
    batch_size: int | None = None
    """Images at a time; None for 64 a device."""
    samples: str | None = None
    """A folder/ of `ddpm-jax sample` to take the samples from, and to fill up; None for one in the results."""
    likelihood: bool = True
    """Measure the bound on the images that were not trained on, too."""
    out: str | None = None
    """Folder of the results; None for one in the run's evaluation/."""
    launch: Launched = Launch()


@dataclasses.dataclass(frozen=True)
class ExportOptions(SamplerOptions):
    """Write a trained model as a file or folder for other programs; sampler and so on are for stablehlo alone."""

    format: Literal["safetensors", "diffusers", "stablehlo"] = "safetensors"
    """Weights in one file, a folder for diffusers' DDPMPipeline, or programs that sample with jax alone."""
    out: str = "model.safetensors"
    """A new file NAME.safetensors, or for the other formats a new folder."""
