"""Samples of a run into files."""

import json
import logging

import numpy as np
from etils import epath

from ddpm_jax.ddpm import Sampler, SamplerName, seed_key
from ddpm_jax.errors import UserError
from ddpm_jax.files import npz, path_of, write_file
from ddpm_jax.images import grid as picture_of
from ddpm_jax.images import png, to_uint8
from ddpm_jax.parallel import make_mesh
from ddpm_jax.processes import agreed
from ddpm_jax.progress import progress_bar
from ddpm_jax.runs import Weights, digest, load_checkpoint, read_json
from ddpm_jax.samplers import Grid

log = logging.getLogger(__name__)


def sample_to(
    run: epath.PathLike,
    n: int,
    seed: int,
    out: epath.PathLike,
    weights: Weights = "ema",
    step: int | None = None,
    batch_size: int | None = None,
    sampler: SamplerName = "ancestral",
    steps: int | None = None,
    eta: float | None = None,
    grid: Grid | None = None,
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
    step, ddpm, params = load_checkpoint(run, weights=weights, step=step, mesh=mesh)
    drawn_by = {"sampler": sampler, "steps": steps, "eta": eta, "grid": grid}
    Sampler(*drawn_by.values()).check(ddpm.config)
    chunk = batch_size or 64 * mesh.size

    def draw(indices):
        """Yields (indices of consecutive images, their uint8 pixels), a batch at a time."""
        with progress_bar(total=len(indices), desc="sampling", unit="image") as progress:
            for some in _runs_of(indices, chunk):
                x = ddpm.sample(params, rng, len(some), start=some[0], batch_size=chunk, **drawn_by)
                yield some, to_uint8(x)
                progress.update(len(some))

    if kind == "folder":
        provenance = {"parameters": digest(params), "weights": weights, "step": step, "seed": seed, **drawn_by}
        _fill_folder(path, n, ddpm.image_shape, provenance, draw)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)  # What cannot be written is better known before.
        images = np.concatenate([images for _, images in draw(range(n))])
        write_file(path, png(picture_of(images)) if kind == ".png" else npz({"images": images}))
    log.info("%d images: %s (%s weights of step %d)", n, path, weights, step)


def _fill_folder(folder, n, image_shape, provenance, draw) -> None:
    if image_shape[-1] not in (1, 3):
        raise UserError(f"out: a PNG holds 1 or 3 channels, not {image_shape[-1]}; write an .npz")
    label = folder / "samples.json"
    if label.exists():
        there = read_json(label)
        if there != provenance:
            raise UserError(f"out: {folder} holds images of {there}, not {provenance}; choose another folder")
    elif folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"out: {folder} is not empty and not from this command; choose another folder")
    write_file(label, json.dumps(provenance).encode())
    is_missing = agreed(np.array([not (folder / f"{i:06d}.png").exists() for i in range(n)]))
    for indices, images in draw(np.flatnonzero(is_missing).tolist()):
        for i, image in zip(indices, images, strict=True):
            write_file(folder / f"{i:06d}.png", png(image))


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
