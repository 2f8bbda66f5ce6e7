"""What the figures share: the run they are of, the files they go to, and how they name steps.

A step is named as in the paper, by how often an image was diffused: k = T is pure noise, k = 0 the
image; q_sample's index is t = k - 1.
"""

import dataclasses
import logging
from typing import ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from etils import epath

from ddpm_jax.config.checked import Checked
from ddpm_jax.devices.mesh import make_mesh
from ddpm_jax.diffusion import q_sample
from ddpm_jax.errors import UserError
from ddpm_jax.keys import example_keys, seed_key
from ddpm_jax.storage.files import npz, path_of, write_file
from ddpm_jax.weights.load import Loaded, home_of, load_weights

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Figure(Checked):
    """A picture and its numbers. Every subclass has `draw()`, which computes and writes both and returns the path."""

    out: str | None = None
    """The picture, a .png; the numbers go beside it. None for one in the run's figures/."""

    GROUP: ClassVar[str] = ""
    name: ClassVar[str]
    """Of its files."""

    def path(self) -> epath.Path:
        """The picture's path, in a folder that is there. Raises UserError if it cannot be a .png."""
        path = path_of(self.out or f"{self.name}.png")
        if path.suffix != ".png" or path.is_dir():
            raise UserError(f"out: {self.out} must end in .png, and be no folder")
        path.parent.mkdir(
            parents=True, exist_ok=True
        )  # What cannot be written is better known before.
        return path

    def write(self, picture: bytes, numbers: dict[str, np.ndarray]) -> epath.Path:
        """Writes both and returns the picture's path."""
        path = self.path()
        write_file(path.with_suffix(".npz"), npz(numbers))
        write_file(path, picture)
        log.info("%s, and the numbers in %s", path, path.with_suffix(".npz").name)
        return path


@dataclasses.dataclass(frozen=True)
class RunFigure(Figure):
    """A figure of a trained model."""

    run: str = dataclasses.field(kw_only=True)
    """Folder of the run, or a model from elsewhere."""
    seed: int = 0
    """The key that all noise is drawn from."""
    weights: Literal["ema", "raw"] | None = None
    """The averaged weights or those of the last update; None for a run's averaged ones, or what a file holds."""
    step: int | None = None
    """Checkpoint; None for the newest."""

    def path(self) -> epath.Path:
        """The picture's path, in the run's figures/ by default. Raises UserError if there is no run, too."""
        if self.out is None:
            return dataclasses.replace(
                self, out=f"{home_of(self.run)}/figures/{self.name}.png"
            ).path()
        return super().path()

    def load(self) -> Loaded:
        """The model, after a look at where the picture goes."""
        seed_key(self.seed)
        self.path()
        return load_weights(self.run, weights=self.weights, step=self.step, mesh=make_mesh())

    def footnote(self, weights: str) -> str:
        """Which model it is of, `weights` being its weights in words."""
        return f"{self.run}, {weights}, seed {self.seed}"


def steps_at(num_timesteps: int, fractions) -> list[int]:
    """The k nearest to each of `fractions` of T, each once, in their order."""
    return list(dict.fromkeys(round(num_timesteps * fraction) for fraction in fractions))


def keys_of(rng, n: int):
    """fold_in(rng, 0), ..., fold_in(rng, n - 1): keys [n]."""
    return example_keys(rng, np.arange(n, dtype=np.uint32))


def diffused(ddpm, x_0, noise, k: int):
    """q(x_k | x_0) [B,H,W,C] made from `noise`: `x_0` diffused k times, x_0 itself for k = 0."""
    return q_sample(ddpm.schedule, x_0, jnp.full(len(x_0), k - 1), noise) if k else x_0
