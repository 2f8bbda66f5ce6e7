"""Code that all figures share: the model they show, the files they write, the names of steps.

A figure names a step as the paper does, by the number of diffusion steps applied to an image:
k = T is pure noise, k = 0 is the image. The index of q_sample is t = k - 1.
"""

import dataclasses
import logging
from collections.abc import Iterable
from typing import Annotated, ClassVar

import jax.numpy as jnp
import numpy as np
from etils import epath

from ddpm_jax.config import Checked, Metavar, Positive, Seed, Step, Weights
from ddpm_jax.config.places import METAVAR
from ddpm_jax.data.view import View
from ddpm_jax.ddpm import DDPM
from ddpm_jax.devices.mesh import make_mesh
from ddpm_jax.diffusion import q_sample
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.labels import guide_for
from ddpm_jax.keys import example_keys
from ddpm_jax.shapes import AnyKey, AnyKeys, Array, Float, Int
from ddpm_jax.storage.files import check_writable, npz, path_of, write_file
from ddpm_jax.weights.load import Loaded, home_of, load_for_command

log = logging.getLogger(__name__)

OptionalSource = Annotated[str | None, Metavar(METAVAR)]
"""Images, named as data.source."""


@dataclasses.dataclass(frozen=True)
class Figure(Checked):
    """A picture and the numbers behind it.

    Every subclass has a `draw()` that computes and writes both and returns the picture's path.
    """

    out: Annotated[str | None, Metavar("PATH")] = None
    """PNG file, its numbers beside it; None for one in the run's figures/, or here if no RUN."""

    GROUP: ClassVar[str] = ""
    name: ClassVar[str]
    """Stem of the figure's file names."""

    def path(self) -> epath.Path:
        """The picture's path. Raises UserError if it is no .png file, or cannot be written."""
        path = path_of(self.out or f"{self.name}.png")
        if path.suffix != ".png" or path.is_dir():
            raise UserError(f"out: must end in .png and not be a folder, got {self.out}")
        check_writable(path)
        return path

    def write(self, picture: bytes, numbers: dict[str, np.ndarray]) -> epath.Path:
        """Writes the picture and its numbers; returns the picture's path."""
        path = self.path()
        write_file(path.with_suffix(".npz"), npz(numbers))
        write_file(path, picture)
        log.info("figure: %s; its numbers are in %s", path, path.with_suffix(".npz").name)
        return path


@dataclasses.dataclass(frozen=True)
class RunFigure(Figure):
    """A figure of a trained model."""

    run: Annotated[str, Metavar("RUN")] = dataclasses.field(kw_only=True)
    """Run directory, .safetensors file, diffusers folder, or a model's name on huggingface.co."""
    seed: Seed = 0
    """Random seed of all noise."""
    weights: Weights | None = None
    """Averaged (ema) or last (raw) weights; None for a run's ema, or those that a file holds."""
    step: Step | None = None
    """Step of the checkpoint; best for the lowest checkpoint.best; None for the newest."""
    channels: tuple[Positive, ...] | None = None
    """The channels that are shown, counted from 1; None for all, side by side unless 1 or 3."""

    def path(self) -> epath.Path:
        """The picture's path, by default in the run's figures/.

        Raises UserError if it is no .png file or cannot be written, or if there is no run.
        """
        if self.out is None:
            return dataclasses.replace(
                self, out=f"{home_of(self.run)}/figures/{self.name}.png"
            ).path()
        return super().path()

    def load(self) -> Loaded:
        """Loads the model."""
        self.path()  # Checked first: loading takes long.
        return load_for_command(self.run, self.weights, self.step, make_mesh())

    def footnote(self, weights: str) -> str:
        """The note that names the model; `weights` describes its weights in words."""
        return f"{self.run}, {weights}, seed {self.seed}"

    def notes_of(self, model: Loaded) -> list[str]:
        """The footnote, and what black and white are where images are not of 8 bits."""
        words = View(model.ddpm.config.data, self.channels).words
        footnote = self.footnote(model.words)
        return [f"{words[:1].upper()}{words[1:]}.", footnote] if words else [footnote]


def steps_at(num_timesteps: int, fractions: Iterable[float]) -> list[int]:
    """The steps k nearest to the `fractions` of T, in their order, without repeats."""
    return list(dict.fromkeys(round(num_timesteps * fraction) for fraction in fractions))


def keys_of(rng: AnyKey, n: int) -> AnyKeys:
    """The keys fold_in(rng, 0), ..., fold_in(rng, n - 1): [n]."""
    return example_keys(rng, np.arange(n, dtype=np.uint32))


def labels_in_turn(ddpm: DDPM, n: int) -> Int[np.ndarray, " n"] | None:
    """The classes of the images 0, ..., n - 1 of a figure: all in turn; None without classes."""
    return guide_for(ddpm, None).of(np.arange(n))["labels"]


def names_of(word: str, n: int, labels: Int[np.ndarray, " n"] | None) -> list[str]:
    """The names of n images: "sample 0" or, of a model with classes, "sample 0, class 0"."""
    names = [f"{word} {i}" for i in range(n)]
    if labels is None:
        return names
    return [f"{name}, class {label}" for name, label in zip(names, labels, strict=True)]


def diffused(
    ddpm: DDPM, x_0: Float[Array, "b h w c"], noise: Float[Array, "b h w c"], k: int
) -> Float[Array, "b h w c"]:
    """x_k [B,H,W,C]: `x_0` after k diffusion steps with `noise`; x_0 itself if k = 0."""
    if k == 0:
        return x_0
    return q_sample(ddpm.schedule, x_0, jnp.full(len(x_0), k - 1, jnp.int32), noise)
