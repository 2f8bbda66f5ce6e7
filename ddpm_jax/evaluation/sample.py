"""Samples of a model into files."""

import functools
import json
import logging
from typing import NamedTuple

import numpy as np
from etils import epath

from ddpm_jax.calls.conditions import UNGUIDED, Guide
from ddpm_jax.data.images import grid, is_png_of, png, to_uint8
from ddpm_jax.devices.processes import agreed
from ddpm_jax.devices.progress import progress_bar
from ddpm_jax.errors import UserError
from ddpm_jax.keys import seed_key
from ddpm_jax.sampler import ANCESTRAL, Sampler
from ddpm_jax.storage.files import check_writable, claim, npz, path_of, write_file
from ddpm_jax.storage.measured import digest_of_errors
from ddpm_jax.weights.load import Loaded

log = logging.getLogger(__name__)

FORMER_GRIDS = dict.fromkeys(
    ("dpm-solver++", "dpm-solver++3m", "sde-dpm-solver++", "unipc"), "trailing"
)
"""The default grids of folders that do not name theirs; all others had linspace."""


class Destination(NamedTuple):
    """Where samples go."""

    path: epath.Path
    kind: str
    """folder, .png or .npz."""


def destination(out: epath.PathLike) -> Destination:
    """What `out` means: a .png (a grid), an .npz, or a folder (NAME/, or one that is there).

    Raises UserError for anything else.
    """
    path = path_of(out)
    kind = "folder" if str(out).endswith("/") or path.is_dir() else path.suffix
    if kind not in ("folder", ".png", ".npz"):
        raise UserError(f"out: must end in .png (a grid), .npz, or / (a folder), got {out}")
    return Destination(path, kind)


def sample_to(
    out: Destination,
    model: Loaded,
    n: int,
    seed: int,
    sampler: Sampler = ANCESTRAL,
    batch_size: int | None = None,
    guide: Guide = UNGUIDED,
) -> None:
    """Draws images 0, ..., n - 1 of key(seed) into `out`, as `DDPM.sample` does.

    A folder gets 000000.png, ..., of which only the missing ones are made, an .npz `images` uint8
    [n,H,W,C], a grid a row for each of several labels. Raises UserError for a sampler or labels
    that do not fit, or files that cannot be written.
    """
    sampler = checked_sampler(sampler, model)
    guide.check(model.ddpm.config.model)
    size = batch_size or 64 * model.devices
    if out.kind == "folder":
        fill_folder(out.path, model, n, seed, sampler, size, guide)
    else:
        check_writable(out.path)
        drawn: list[np.ndarray] = []
        try:
            for _, images in _draw(model, range(n), seed, sampler, size, guide):
                drawn.append(images)
        except BaseException:
            _keep(out, drawn, n, guide)
            raise
        _write(out, out.path, drawn, guide)
    log.info("%d images: %s (%s)", n, out.path, model.words)


def _write(out: Destination, path: epath.Path, drawn: list[np.ndarray], guide: Guide) -> None:
    images = np.concatenate(drawn)
    if out.kind == ".npz":
        write_file(path, npz({"images": images} | _labels_of(guide, len(images))))
    else:
        write_file(path, png(_table(images, len(guide.labels or ()))))


def _labels_of(guide: Guide, n: int) -> dict[str, np.ndarray]:
    return {} if guide.labels is None else {"labels": guide.of(np.arange(n))["labels"]}


def _table(images: np.ndarray, labels: int) -> np.ndarray:
    """A grid of the images; of several labels, a row for each."""
    if labels < 2:
        return grid(images)
    columns = -(-len(images) // labels)
    cells = np.full((labels * columns, *images.shape[1:]), 255, np.uint8)
    i = np.arange(len(images))
    cells[i % labels * columns + i // labels] = images
    return grid(cells, columns)


def _keep(out: Destination, drawn: list[np.ndarray], n: int, guide: Guide) -> None:
    """Writes the batches that were finished when something stopped the drawing."""
    if not drawn:
        return
    count = sum(len(images) for images in drawn)
    path = out.path.parent / f"{out.path.stem}-first-{count}{out.kind}"
    try:
        _write(out, path, drawn, guide)
    except UserError as error:  # What stopped the drawing matters more.
        log.warning("%s", error)
        return
    log.warning("stopped: the first %d of %d images are in %s", count, n, path)


def fill_folder(
    folder: epath.Path,
    model: Loaded,
    n: int,
    seed: int,
    sampler: Sampler,
    batch_size: int,
    guide: Guide = UNGUIDED,
) -> None:
    """Draws the missing ones of images 0, ..., n - 1 of key(seed) into `folder`: 000000.png, ...

    A file that does not hold such an image whole is drawn again. Beside them samples.json records
    how they were drawn. Raises UserError if the folder holds something else.
    """
    channels = model.ddpm.image_shape[-1]
    if channels not in (1, 3):
        raise UserError(f"out: a PNG has 1 or 3 channels, not {channels}; choose an .npz")
    sampler = checked_sampler(sampler, model)
    label = {**model.label, "seed": seed, **sampler.recorded(model.ddpm.config.diffusion)}
    if model.ddpm.config.model.num_classes:
        label |= {"labels": None, **json.loads(json.dumps(guide.recorded))}
    errors = digest_of_errors(model.ddpm, sampler)
    if errors is not None:  # Other errors, other variances, other images.
        label["calibration"] = errors
    claim(folder, "samples.json", label, functools.partial(_label_of_today, model=model))
    is_missing = agreed(np.array([_is_missing(folder, i, model) for i in range(n)]))
    missing = np.flatnonzero(is_missing).tolist()
    log.info("%s: drawing the missing %d of %d images", folder, len(missing), n)
    left = len(missing)
    try:
        for indices, images in _draw(model, missing, seed, sampler, batch_size, guide):
            for i, image in zip(indices, images, strict=True):
                write_file(image_file(folder, i), png(image))
            left -= len(images)
    finally:
        if left:
            done = n - left
            log.warning(
                "stopped: %s holds %d of %d images; run it again to resume", folder, done, n
            )


def checked_sampler(sampler: Sampler, model: Loaded) -> Sampler:
    """The sampler in its simplest form, so that its files do not depend on how it was written.

    Raises UserError if the model cannot be sampled so.
    """
    return model.ddpm.resolve(sampler)


def _label_of_today(label: dict, model: Loaded) -> dict:
    """The label of a folder that was begun with its sampler in another form."""
    given = {name: label[name] for name in Sampler().options if name in label}
    if given.get("steps") and given.get("grid") is None:  # Of a version that left defaults out.
        given["grid"] = FORMER_GRIDS.get(str(given.get("sampler")), "linspace")
    sampler = checked_sampler(Sampler.from_options(given), model)
    return {**label, **sampler.recorded(model.ddpm.config.diffusion)}


def _is_missing(folder: epath.Path, i: int, model: Loaded) -> bool:
    """Whether image i has to be drawn. Names a file that is there and damaged."""
    file = image_file(folder, i)
    if not file.exists():
        return True
    if file.is_dir():
        raise UserError(f"{file}: is a folder in the place of an image; remove or rename it")
    if is_png_of(file.read_bytes(), model.ddpm.image_shape):
        return False
    log.warning("%s: not a whole image of this model; drawn again", file)
    return True


def image_file(folder: epath.Path, i: int) -> epath.Path:
    """The file of image i in a folder of samples."""
    return folder / f"{i:06d}.png"


def _draw(model, indices, seed, sampler, batch_size, guide):
    """Yields (indices of consecutive images, their uint8 pixels), a batch at a time."""
    rng = seed_key(seed)
    runs = list(_runs_of(indices, batch_size))
    steps = len(sampler.timesteps_of(model.ddpm.config.diffusion))
    with progress_bar(total=len(runs) * steps, desc="sampling", unit="step") as progress:
        for some in runs:
            x = model.ddpm.sample(
                model.params,
                rng,
                len(some),
                start=some[0],
                batch_size=batch_size,
                sampler=sampler,
                progress=progress,
                **guide.of(np.array(some)),
            )
            yield some, to_uint8(x)


def _runs_of(indices, most: int):
    """`indices`, ascending, in lists of at most `most` consecutive ones."""
    some: list[int] = []
    for i in indices:
        if some and (i != some[-1] + 1 or len(some) == most):
            yield some
            some = []
        some.append(i)
    if some:
        yield some
