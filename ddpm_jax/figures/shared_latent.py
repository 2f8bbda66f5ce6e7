"""Figure 7: samples that share a latent x_k; the smaller k, the more they have in common."""

import dataclasses
import functools
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ddpm_jax.calls import programs
from ddpm_jax.config import Range
from ddpm_jax.ddpm import DDPM, Labels
from ddpm_jax.devices.progress import progress_bar
from ddpm_jax.devices.segments import Progress
from ddpm_jax.figures.base import RunFigure, keys_of, labels_in_turn, names_of, steps_at
from ddpm_jax.figures.panel import image_table
from ddpm_jax.figures.progressive import chain, steps_of
from ddpm_jax.keys import SHARED, seed_key
from ddpm_jax.shapes import AnyKey, Array, Float, PyTree

SHARES = 3


@dataclasses.dataclass(frozen=True)
class SharedLatent(RunFigure):
    """Three samples from each of several x_k of a reverse chain, beside the x_k that they share."""

    n: Annotated[int, Range(min=1)] = 4
    """Number of chains, one per row."""

    name: ClassVar[str] = "shared-latent"

    def draw(self) -> epath.Path:
        """Writes shared-latent.png and .npz.

        The .npz holds k and spread [K], x_k [K,n,H,W,C] float32 and uint8 samples [K,n,3,H,W,C].
        """
        model = self.load()
        ddpm = model.ddpm
        params = model.params
        T = ddpm.schedule.num_timesteps
        rng = seed_key(self.seed)
        ks = steps_at(T, (1, 0.75, 0.5, 0.25, 0))
        total = steps_of(ks) + sum(ks)
        labels = labels_in_turn(ddpm, self.n)
        with progress_bar(total=total, desc=self.name, unit="step") as bar:
            latents, _ = chain(ddpm, params, keys_of(rng, self.n), ks, bar, labels)
            shares = [
                np.asarray(share(ddpm, params, rng, x, k, bar, labels))
                for x, k in zip(latents, ks, strict=True)
            ]
        samples = np.stack(shares)
        # [K]: standard deviation among the samples that share x_k, averaged over pixels.
        unit = ddpm.scaling.unit
        pictures = ddpm.to_picture(samples, self.channels)
        spread = unit.size * samples.std(axis=2, ddof=1).mean(axis=(1, 2, 3, 4))
        cells = [
            [_cell(samples[j, i], latents[j, i]) for j in range(len(ks))] for i in range(self.n)
        ]
        picture = image_table(
            ddpm.to_picture(np.array(cells), self.channels),
            rows=names_of("chain", self.n, labels),
            columns=[f"k={k}\nspread {s:.1f}" for k, s in zip(ks, spread, strict=True)],
            title="Samples that share a latent (Fig. 7)",
            notes=[
                "Each cell has the shared x_k at the bottom right and three samples drawn from it. "
                f"k: diffusion steps in x_k; k={T} is pure noise, k=0 is the image. "
                f"Spread: standard deviation among the three, {unit.words}.",
                *self.notes_of(model),
            ],
            size=120,
        )
        return self.write(
            picture,
            {"k": np.array(ks), "x_k": latents, "samples": pictures, "spread": spread},
        )


def share(
    ddpm: DDPM,
    params: PyTree,
    rng: AnyKey,
    x_k: Float[Array, "n h w c"],
    k: int,
    progress: Progress = False,
    labels: Labels = None,
) -> Float[jax.Array, "n 3 h w c"]:
    """Three samples x_0 from each x_k [n,H,W,C]: [n,3,H,W,C]. For k = 0, three times the image.

    `labels` [n] are their classes, None for no class.
    """
    reverse = ddpm.reverse
    if labels is not None:
        reverse = functools.partial(reverse, labels=np.repeat(np.asarray(labels), SHARES))
    x = jnp.repeat(x_k, SHARES, axis=0)
    if k:
        # Other keys than those of the chains, which have small indices, and others for every k.
        keys = keys_of(jax.random.fold_in(jax.random.fold_in(rng, SHARED), k), len(x))
        x, _ = reverse(params, keys, x, k, progress=progress)
    x = jnp.asarray(x).reshape(len(x_k), SHARES, *x.shape[1:])
    return programs.within_bounds(ddpm, x)


def _cell(samples, latent) -> np.ndarray:
    """A 2 x 2 grid of the images, with thin white lines between and around them."""
    padded = [
        np.pad(image, ((1, 0), (1, 0), (0, 0)), constant_values=1) for image in (*samples, latent)
    ]
    rows = [np.concatenate(padded[i : i + 2], axis=1) for i in (0, 2)]
    return np.pad(np.concatenate(rows, axis=0), ((0, 1), (0, 1), (0, 0)), constant_values=1)
