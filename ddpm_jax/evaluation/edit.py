"""Edited images into files."""

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import PurePosixPath

import jax
import numpy as np
from etils import epath

from ddpm_jax.data.images import grid, png
from ddpm_jax.data.view import View
from ddpm_jax.devices.progress import progress_bar
from ddpm_jax.devices.segments import Progress
from ddpm_jax.evaluation.sample_files import SampleFiles
from ddpm_jax.keys import seed_key
from ddpm_jax.shapes import AnyKey
from ddpm_jax.storage.files import claim, path_of, write_file

log = logging.getLogger(__name__)

SHOWN = 16
"""Most rows of the side-by-side picture."""

Draw = Callable[[AnyKey, Progress], np.ndarray]
"""draw(rng, progress): the edited images float32 [N,H,W,C] in [-1, 1]."""


def begin(out: str, label: dict) -> epath.Path:
    """The folder `out`, marked as that of the results of `label`.

    Raises UserError if it holds anything else, or cannot be written.
    """
    folder = path_of(out)
    claim(folder, "edit.json", label)
    return folder


def edit_to(
    folder: epath.Path,
    names: list[str],
    before: list[np.ndarray],
    draw: Draw,
    n: int,
    seed: int,
    steps: int,
    files: SampleFiles,
    view: View,
) -> None:
    """Draws each of the images `names` `n` times into `folder`: NAME-0.png, NAME-1.png, ...

    Draw j is made with the key fold_in(key(seed), j). side-by-side.png has a row an image, made by
    `view`: those of `before`, [N,H,W,C] each, then the draws. A draw takes so many `steps`, of all
    batches.
    """
    columns = [view(images[:SHOWN]) for images in before]
    stems = _stems(names)
    with progress_bar(total=n * steps, desc="editing", unit="step") as progress:
        for j in range(n):
            images = draw(jax.random.fold_in(seed_key(seed), j), progress)
            for stem, image in zip(stems, images, strict=True):
                write_file(folder / f"{stem}-{j}{files.kind}", files.content(image))
            columns.append(view(images[:SHOWN]))
    rows = np.stack(columns, axis=1)
    picture = grid(rows.reshape(-1, *rows.shape[2:]), columns=len(columns))
    write_file(folder / "side-by-side.png", png(picture))
    log.info("%d images: %s; see side-by-side.png there", n * len(names), folder)
    if view.words:
        log.info("in the picture, %s", view.words)


def _stems(names: list[str]) -> list[str]:
    """Names without endings, and without folders where no two are then the same."""
    stems = [PurePosixPath(name).stem for name in names]
    if max(Counter(stems).values()) == 1:
        return stems
    return [name.replace("/", "-").replace(".", "-") for name in names]
