"""Samples of a run into files."""

import logging

import numpy as np
from etils import epath

from ddpm_jax.data.images import grid as picture_of
from ddpm_jax.data.images import png, to_uint8
from ddpm_jax.ddpm import ANCESTRAL, Sampler, seed_key
from ddpm_jax.devices.mesh import make_mesh
from ddpm_jax.devices.processes import agreed
from ddpm_jax.devices.progress import progress_bar
from ddpm_jax.errors import UserError
from ddpm_jax.storage.files import claim, npz, path_of, write_file
from ddpm_jax.storage.run import Weights
from ddpm_jax.weights.load import Loaded, load_weights

log = logging.getLogger(__name__)


def sample_to(
    run: epath.PathLike,
    n: int,
    seed: int,
    out: epath.PathLike,
    weights: Weights | None = None,
    step: int | None = None,
    batch_size: int | None = None,
    sampler: Sampler = ANCESTRAL,
) -> None:
    """Draws images 0, ..., n - 1 of key(seed) from the run directory `run` into `out`, as `DDPM.sample` does.

    `out` ends in .png (a grid), .npz (`images` uint8 [n,H,W,C]) or / (a folder of 000000.png, ..., of
    which only the missing ones are made). Raises UserError for what cannot be used.
    """
    if not 1 <= n <= 2**32:
        raise UserError(f"n: must be at least 1, and at most 2**32, got {n}")
    rng = seed_key(seed)
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size: must be at least 1, got {batch_size}")
    path = path_of(out)
    kind = "folder" if str(out).endswith("/") or path.is_dir() else path.suffix
    if kind not in ("folder", ".png", ".npz"):
        raise UserError(f"out: {out} must end in .png (a grid), .npz, or / (a folder)")
    mesh = make_mesh()
    model = load_weights(run, weights=weights, step=step, mesh=mesh)
    sampler.check(model.ddpm.config)
    size = batch_size or 64 * mesh.size
    if kind == "folder":
        fill_folder(path, model, n, seed, sampler, size)
    else:
        path.parent.mkdir(
            parents=True, exist_ok=True
        )  # What cannot be written is better known before.
        images = np.concatenate(
            [images for _, images in _draw(model, range(n), rng, sampler, size)]
        )
        write_file(path, png(picture_of(images)) if kind == ".png" else npz({"images": images}))
    log.info("%d images: %s (%s)", n, path, model.words)


def fill_folder(
    folder: epath.Path, model: Loaded, n: int, seed: int, sampler: Sampler, batch_size: int
) -> None:
    """Draws those of images 0, ..., n - 1 of key(seed) that are missing in `folder`, as 000000.png, 000001.png, ...

    Beside them samples.json says what they are of. Raises UserError if the folder holds something else.
    """
    channels = model.ddpm.image_shape[-1]
    if channels not in (1, 3):
        raise UserError(f"out: a PNG holds 1 or 3 channels, not {channels}; write an .npz")
    claim(folder, "samples.json", {**model.label, "seed": seed, **sampler.options})
    is_missing = agreed(np.array([not image_file(folder, i).exists() for i in range(n)]))
    missing = np.flatnonzero(is_missing).tolist()
    log.info("%s: drawing the %d of %d images that are missing", folder, len(missing), n)
    for indices, images in _draw(model, missing, seed_key(seed), sampler, batch_size):
        for i, image in zip(indices, images, strict=True):
            write_file(image_file(folder, i), png(image))


def image_file(folder: epath.Path, i: int) -> epath.Path:
    """Where image i lies in a folder of samples."""
    return folder / f"{i:06d}.png"


def _draw(model, indices, rng, sampler, batch_size):
    """Yields (indices of consecutive images, their uint8 pixels), a batch at a time."""
    with progress_bar(total=len(indices), desc="sampling", unit="image") as progress:
        for some in _runs_of(indices, batch_size):
            x = model.ddpm.sample(
                model.params,
                rng,
                len(some),
                start=some[0],
                batch_size=batch_size,
                **sampler.options,
            )
            yield some, to_uint8(x)
            progress.update(len(some))


def _runs_of(indices, most: int):
    """`indices`, ascending, in lists of at most `most` consecutive ones."""
    some = []
    for i in indices:
        if some and (i != some[-1] + 1 or len(some) == most):
            yield some
            some = []
        some.append(i)
    if some:
        yield some
