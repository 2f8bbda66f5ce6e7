"""`ddpm-jax edit`: what can be done to images with a trained model, and its options."""

import dataclasses
import hashlib
from typing import Annotated, Any

import numpy as np
import tyro

from ddpm_jax import operators
from ddpm_jax.calls.conditions import UNGUIDED, Guide
from ddpm_jax.calls.edits import lowest_steps
from ddpm_jax.cli.options import Launch, Launched, ModelOptions, OptionalPath, Path, SamplerFields
from ddpm_jax.config import Positive, Range, Seed
from ddpm_jax.data.decode import read_dtype
from ddpm_jax.data.given import given_images
from ddpm_jax.data.images import as_read, to_float
from ddpm_jax.data.scaled import as_source
from ddpm_jax.data.view import View
from ddpm_jax.editing import inpaint_walk
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.edit import Draw, begin, edit_to
from ddpm_jax.evaluation.sample_files import sample_files
from ddpm_jax.operators import Operator
from ddpm_jax.sampler import ANCESTRAL
from ddpm_jax.weights.load import Loaded

Noise = Annotated[float, Range(min=0, max=1)]
LAUNCH = Launch()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edit(ModelOptions):
    """One way to edit images."""

    image: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """An image file, or a folder or zip of them."""
    guide: Annotated[Guide, tyro.conf.arg(name="")] = UNGUIDED
    n: Annotated[int, Range(min=1, max=10_000), tyro.conf.arg(aliases=["-n"])] = 1
    """Number of draws of each image."""
    seed: Seed = 0
    """Random seed; the same seed gives the same images."""
    out: Path = "edited"
    """Folder for the results: IMAGE-0.png, ... and side-by-side.png."""
    batch_size: Positive | None = None
    """Images per batch; None for 64 per device."""
    channels: tuple[Positive, ...] | None = None
    """Channels that side-by-side.png shows, counted from 1; None for all."""
    launch: Launched = LAUNCH

    def write(self, model: Loaded) -> None:
        """Edits the images into files. Raises UserError for what does not fit."""
        names, images = self._read(model)
        self.guide.check(model.ddpm.config.model)
        before, draw = self.prepared(model, images)
        kept = [as_read(each, model.ddpm.levels).tobytes() for each in before]
        shown = hashlib.blake2b(b"".join(kept), digest_size=8)
        label = {**model.label, **self.recorded(), "images": shown.hexdigest()}
        size = self.batch_size or 64 * model.devices
        steps = self.steps_of(model) * -(-len(names) // size)
        files = sample_files(model.ddpm)
        view = View(model.ddpm.config.data, self.channels)
        folder = begin(self.out, label)
        edit_to(folder, names, before, draw, self.n, self.seed, steps, files, view)

    def _read(self, model: Loaded) -> tuple[list[str], np.ndarray]:
        """The names of the given images, and these in the model's units, float32 [N,h,w,c]."""
        shape = self.given_shape(model.ddpm.image_shape)
        data = dataclasses.replace(model.ddpm.config.data, image_shape=shape)
        names, values = given_images(self.image, shape, dtype=read_dtype(data.value_kind))
        return names, np.asarray(to_float(as_source(values, data)))

    def recorded(self) -> dict[str, Any]:
        """The options that decide the images."""
        kept = dataclasses.asdict(self)
        for name in (
            "run",
            "weights",
            "step",
            "image",
            "n",
            "out",
            "batch_size",
            "launch",
            "channels",
        ):
            del kept[name]
        kept.pop("mask", None)  # What it hides is seen in the images.
        return {"edit": type(self).__name__.lower(), **kept}

    def drawing(self, n: int) -> dict[str, Any]:
        """The arguments of the `DDPM`'s methods that all edits share."""
        return {**self.guide.of(np.arange(n)), "batch_size": self.batch_size}

    def steps_of(self, model: Loaded) -> int:
        """Network calls of one batch."""
        raise NotImplementedError

    def given_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The shape that the images are read in, for a model's."""
        return image_shape

    def prepared(self, model: Loaded, images: np.ndarray) -> tuple[list[np.ndarray], Draw]:
        """(what is shown before the draws, [N,H,W,C] each, what draws), in the model's units."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inpaint(Edit):
    """Draw a part of images anew so that it fits the rest (RePaint)."""

    mask: OptionalPath = None
    """Image that is white where pixels are drawn anew; needed."""
    steps: Positive = 250
    """Number of reverse steps, of at most T."""
    resample: Positive = 10
    """How often the chain comes down; 1 is fast, and borders do not fit."""
    jump: Positive = 10
    """Steps that it goes up again in between."""

    def steps_of(self, model: Loaded) -> int:
        """Those of RePaint's walk."""
        steps = min(self.steps, model.ddpm.schedule.num_timesteps)
        return len(inpaint_walk(steps, self.resample, self.jump))

    def prepared(self, model: Loaded, images: np.ndarray) -> tuple[list[np.ndarray], Draw]:
        """The images, the same with grey where they are drawn anew, and what draws."""
        if self.mask is None:
            raise UserError("mask: is missing; name an image that is white where to draw anew")
        shape = (*model.ddpm.image_shape[:2], 1)
        masks = given_images(self.mask, shape, "mask").images
        if len(masks) not in (1, len(images)):
            raise UserError(
                f"mask: there are {len(masks)} for {len(images)} images; give one, or one for each"
            )
        known = masks < 128
        if known.all():
            raise UserError("mask: is black all over, so nothing is drawn anew; paint it white")

        def draw(rng, progress):
            return model.ddpm.inpaint(
                model.params,
                rng,
                images,
                known,
                steps=self.steps,
                resample=self.resample,
                jump=self.jump,
                progress=progress,
                **self.drawing(len(images)),
            )

        grey = to_float(np.full((), 128, np.uint8))
        return [images, np.where(known, images, grey)], draw


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vary(Edit):
    """Draw variations of images (SDEdit)."""

    sampler: SamplerFields = ANCESTRAL
    strength: Annotated[float, Range(above=0, max=1)] = 0.5
    """How far from the image: the part of the T steps that noise is added by."""

    def steps_of(self, model: Loaded) -> int:
        """The steps below the strength."""
        ddpm = model.ddpm
        return len(lowest_steps(ddpm, ddpm.resolve(self.sampler), self.strength))

    def prepared(self, model: Loaded, images: np.ndarray) -> tuple[list[np.ndarray], Draw]:
        """The images, and what draws."""

        def draw(rng, progress):
            return model.ddpm.vary(
                model.params,
                rng,
                images,
                self.strength,
                sampler=self.sampler,
                progress=progress,
                **self.drawing(len(images)),
            )

        return [images], draw


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restoration(Edit):
    """Undoes damage by a linear operator."""

    sampler: SamplerFields = ANCESTRAL
    noise: Noise = 0.0
    """Standard deviation of the noise on IMAGE, where white is 1 and black 0; of values without
    bounds, in units of their own deviation."""

    def operator(self, model: Loaded) -> Operator:
        """What did the damage."""
        raise NotImplementedError

    def steps_of(self, model: Loaded) -> int:
        """The sampler's."""
        return len(model.ddpm.resolve(self.sampler).timesteps_of(model.ddpm.config.diffusion))

    def prepared(self, model: Loaded, images: np.ndarray) -> tuple[list[np.ndarray], Draw]:
        """The damaged images, and what draws."""
        operator = self.operator(model)
        # From black to white it is 2 where values have bounds, and else a deviation is 1.
        unit = 2 if model.ddpm.config.data.value_kind.bounded else 1

        def draw(rng, progress):
            return model.ddpm.restore(
                model.params,
                rng,
                images,
                operator,
                noise=unit * self.noise,
                sampler=self.sampler,
                progress=progress,
                **self.drawing(len(images)),
            )

        return [self.enlarged(images, model.ddpm.image_shape)], draw

    def enlarged(self, images: np.ndarray, image_shape: tuple[int, int, int]) -> np.ndarray:
        """The damaged images in the size and channels of the model's."""
        factor = image_shape[0] // images.shape[1]
        whole = images.repeat(factor, axis=1).repeat(factor, axis=2)
        return np.broadcast_to(whole, (len(images), *image_shape))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upscale(Restoration):
    """Draw small images large: of IMAGE's pixels each is the mean of a block of the result."""

    factor: Annotated[int, Range(min=1)] = 4
    """Width and height of a block."""

    def given_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """That of the small images. Raises UserError where blocks do not fit."""
        height, width, channels = image_shape
        if height % self.factor or width % self.factor:
            raise UserError(
                f"factor: must divide the model's {height}x{width} pixels, got {self.factor}"
            )
        return height // self.factor, width // self.factor, channels

    def operator(self, model: Loaded) -> Operator:
        """Means over blocks."""
        return operators.downscale(self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Colourise(Restoration):
    """Give grey images colours; needs a model of colour images."""

    def given_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """One channel. Raises UserError for a model that draws in grey."""
        if image_shape[2] != 3:
            raise UserError("edit colourise: this model draws no colours; choose another model")
        return *image_shape[:2], 1

    def operator(self, model: Loaded) -> Operator:
        """Grey of Rec. 601."""
        return operators.grey()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deblur(Restoration):
    """Sharpen images that a Gaussian has blurred."""

    noise: Noise = 1 / 255
    """Standard deviation of the noise on IMAGE, where white is 1 and black 0; of values without
    bounds, in units of their own deviation."""
    sigma: Annotated[float, Range(above=0)] = 1.0
    """The Gaussian's standard deviation, in pixels of the model's images."""

    def operator(self, model: Loaded) -> Operator:
        """A Gaussian, cut off at three deviations or the image's size."""
        smaller = min(model.ddpm.image_shape[:2])
        reach = min(int(np.ceil(3 * self.sigma)), (smaller - 1) // 2)
        places = np.arange(-reach, reach + 1)
        line = np.exp(-0.5 * (places / self.sigma) ** 2)
        kernel = np.outer(line, line)
        return operators.blur(kernel / kernel.sum())
