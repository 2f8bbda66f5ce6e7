"""Figures 6 and 10: the image that the reverse process predicts at each step."""

import dataclasses
import functools
import io
from typing import Annotated, ClassVar

import numpy as np
from etils import epath
from PIL import Image

from ddpm_jax.config import Range
from ddpm_jax.data.images import grid
from ddpm_jax.ddpm import DDPM, Labels
from ddpm_jax.devices.progress import progress_bar
from ddpm_jax.devices.segments import Progress
from ddpm_jax.figures.base import RunFigure, keys_of, labels_in_turn, names_of, steps_at
from ddpm_jax.figures.panel import image_table
from ddpm_jax.keys import START, gaussian_noise, seed_key
from ddpm_jax.shapes import AnyKeys, PyTree
from ddpm_jax.storage.files import write_file


@dataclasses.dataclass(frozen=True)
class Progressive(RunFigure):
    """The x_0 predicted from x_k, from pure noise to the image, and an animation of both."""

    n: Annotated[int, Range(min=1)] = 8
    """Number of samples, one per row."""
    frames: Annotated[int, Range(min=2)] = 50
    """Number of frames of the animation, evenly spaced along the chain."""

    name: ClassVar[str] = "progressive"

    def draw(self) -> epath.Path:
        """Writes progressive.png, .webp (the animation) and .npz.

        The .npz holds k [F] and uint8 x_0 and x, each [F,n,H,W,C].
        """
        model = self.load()
        ddpm = model.ddpm
        params = model.params
        T = ddpm.schedule.num_timesteps
        shown = steps_at(T, np.linspace(1, 0, 11))
        ks = sorted({*shown, *steps_at(T, np.linspace(1, 0, self.frames))}, reverse=True)
        keys = keys_of(seed_key(self.seed), self.n)
        labels = labels_in_turn(ddpm, self.n)
        with progress_bar(total=steps_of(ks), desc=self.name, unit="step") as bar:
            x, x_0 = chain(ddpm, params, keys, ks, bar, labels)
        x = ddpm.to_picture(x, self.channels)
        x_0 = ddpm.to_picture(x_0, self.channels)
        picture = image_table(
            x_0[[ks.index(k) for k in shown]].swapaxes(0, 1),
            rows=names_of("sample", self.n, labels),
            columns=[f"k={k}" for k in shown],
            title="The image predicted from x_k along the reverse process (Fig. 6)",
            notes=[
                f"k: diffusion steps in x_k; k={T} is pure noise, k=0 is the finished sample.",
                *self.notes_of(model),
            ],
        )
        frames = [_side_by_side(x[i], x_0[i]) for i in range(len(ks))]
        write_file(self.path().with_suffix(".webp"), animate(frames))
        return self.write(picture, {"k": np.array(ks), "x": x, "x_0": x_0})


def steps_of(ks: list[int]) -> int:
    """How many reverse steps `chain` takes."""
    return ks[0] - ks[-1] + sum(k > 0 for k in ks)


def chain(
    ddpm: DDPM,
    params: PyTree,
    keys: AnyKeys,
    ks: list[int],
    progress: Progress = False,
    labels: Labels = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(x_k, the x_0 predicted from it) at each of the descending `ks`: NumPy arrays [F,n,H,W,C].

    At k = 0 both are the image. The chain is Algorithm 2 from ks[0] = T, the same that `sample`
    draws from `keys` [n]. `progress` and `labels` as in `DDPM.sample`.
    """
    reverse = ddpm.reverse if labels is None else functools.partial(ddpm.reverse, labels=labels)
    x = gaussian_noise(keys, START, ddpm.image_shape)
    current = ks[0]
    xs = []
    x_0s = []
    for k in ks:
        if k < current:
            x, _ = reverse(params, keys, x, current, k, progress=progress)
            current = k
        # One more step from x_k also returns the x_0 that it predicts.
        x_0 = reverse(params, keys, x, k, k - 1, progress=progress)[1] if k else x
        xs.append(np.asarray(x))
        x_0s.append(np.asarray(x_0))
    return np.stack(xs), np.stack(x_0s)


def animate(frames: list[np.ndarray], milliseconds: int = 80) -> bytes:
    """An endless WebP animation of uint8 images [H,W,1 or 3]; the last is shown for 2 seconds."""
    pages = [
        Image.fromarray(frame.repeat(3, axis=-1) if frame.shape[-1] == 1 else frame)
        for frame in frames
    ]
    durations = [milliseconds] * (len(pages) - 1) + [2000]
    file = io.BytesIO()
    pages[0].save(
        file,
        "WEBP",
        save_all=True,
        append_images=pages[1:],
        duration=durations,
        loop=0,
        lossless=True,
    )
    return file.getvalue()


def _side_by_side(x, x_0) -> np.ndarray:
    pictures = [grid(x), grid(x_0)]
    gap = np.full((pictures[0].shape[0], 24, pictures[0].shape[2]), 255, np.uint8)
    return np.concatenate([pictures[0], gap, pictures[1]], axis=1)
