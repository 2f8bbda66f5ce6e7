"""Samples of a model into files."""

import functools
import json
import logging
from typing import NamedTuple

import numpy as np
from etils import epath

from ddpm_jax.calls.conditions import UNGUIDED, Condition, Guide, conditions
from ddpm_jax.calls.samples import Run, draw
from ddpm_jax.config import Model
from ddpm_jax.data.array_files import npy
from ddpm_jax.data.images import grid, png
from ddpm_jax.data.view import View
from ddpm_jax.devices.ahead import beside
from ddpm_jax.devices.processes import agreed
from ddpm_jax.devices.progress import progress_bar
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.sample_files import SampleFiles, sample_files
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
    """folder, .png, .npz or .npy."""
    files: str | None = None
    """Of a folder: what its files end in; None for what fits the values, see `sample_files`."""
    channels: tuple[int, ...] | None = None
    """Of a grid: the channels that are shown, counted from 1; None for all."""


def destination(
    out: epath.PathLike, files: str | None = None, channels: tuple[int, ...] | None = None
) -> Destination:
    """What `out` means: a .png (a grid), .npz, .npy, or a folder (NAME/, or one that is there).

    Raises UserError for anything else, and where `files` or `channels` mean nothing.
    """
    path = path_of(out)
    kind = "folder" if str(out).endswith("/") or path.is_dir() else path.suffix
    if kind not in ("folder", ".png", ".npz", ".npy"):
        raise UserError(f"out: must end in .png (a grid), .npz, .npy or / (a folder), got {out}")
    if files is not None and kind != "folder":
        raise UserError(f"files: only applies to a folder, and out is {out}; leave it out")
    if channels is not None and kind != ".png":
        raise UserError(f"channels: only applies to a grid (.png), and out is {out}; leave it out")
    return Destination(path, kind, files and f".{files}", channels)


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

    A folder gets 000000.png, ..., of which only the missing ones are made, an .npz `images`
    [n,H,W,C], a grid a row for each of several labels. All but the grid hold the data's own values,
    in their type. Raises UserError for a sampler or labels that do not fit, or files that cannot be
    written.
    """
    sampler = checked_sampler(sampler, model)
    guide.check(model.ddpm.config.model)
    size = batch_size or 64 * model.devices
    if out.kind == "folder":
        fill_folder(out.path, model, n, seed, sampler, size, guide, out.files)
    else:
        check_writable(out.path)
        view = View(model.ddpm.config.data, out.channels)
        if out.kind == ".png" and view.words:
            log.info("in the picture, %s", view.words)
        finished = view if out.kind == ".png" else model.ddpm.to_data
        drawn: list[np.ndarray] = []
        try:
            with beside() as call:
                for _, images in _draw(model, range(n), seed, sampler, size, guide):
                    call(lambda images: drawn.append(finished(images)), images)
        except BaseException:
            _keep(out, drawn, n, guide)
            raise
        _write(out, out.path, drawn, guide)
    log.info("%d images: %s (%s)", n, out.path, model.words)


def _write(out: Destination, path: epath.Path, drawn: list[np.ndarray], guide: Guide) -> None:
    images = np.concatenate(drawn)
    if out.kind == ".npz":
        write_file(path, npz({"images": images} | _labels_of(guide, len(images))))
    elif out.kind == ".npy":
        write_file(path, npy(images))
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
    kind: str | None = None,
) -> None:
    """Draws the missing ones of images 0, ..., n - 1 of key(seed) into `folder`: 000000.png, ...

    `kind` is that of `sample_files`. A file that does not hold such an image whole is drawn again.
    Beside them samples.json records how they were drawn. Raises UserError if the folder holds
    something else.
    """
    files = sample_files(model.ddpm, kind)
    sampler = checked_sampler(sampler, model)
    label = {**model.label, "seed": seed, **sampler.recorded(model.ddpm.config.diffusion)}
    if model.ddpm.config.model.num_classes:
        label |= {"labels": None, **json.loads(json.dumps(guide.recorded))}
    errors = digest_of_errors(model.ddpm, sampler)
    if errors is not None:  # Other errors, other variances, other images.
        label["calibration"] = errors
    claim(folder, "samples.json", label, functools.partial(_label_of_today, model=model))
    is_missing = agreed(np.array([_is_missing(folder, i, files) for i in range(n)]))
    missing = np.flatnonzero(is_missing).tolist()
    log.info("%s: drawing the missing %d of %d images", folder, len(missing), n)
    left = len(missing)

    def write(indices, images):
        nonlocal left
        for i, image in zip(indices, images, strict=True):
            write_file(files.file(folder, i), files.content(image))
        left -= len(images)

    try:
        with beside() as call:
            for indices, images in _draw(model, missing, seed, sampler, batch_size, guide):
                call(write, indices, images)
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


def _is_missing(folder: epath.Path, i: int, files: SampleFiles) -> bool:
    """Whether image i has to be drawn. Names a file that is there and damaged."""
    file = files.file(folder, i)
    if not file.exists():
        return True
    if file.is_dir():
        raise UserError(f"{file}: is a folder in the place of an image; remove or rename it")
    if files.is_whole(file.read_bytes()):
        return False
    log.warning("%s: not a whole image of this model; drawn again", file)
    return True


def _draw(model, indices, seed, sampler, batch_size, guide):
    """Yields (indices of consecutive images, these in the model's units), a batch at a time."""
    ddpm = model.ddpm
    runs = list(_runs_of(indices, batch_size))
    drawn = [Run(some[0], len(some), _condition(ddpm.config.model, guide, some)) for some in runs]
    steps = len(sampler.timesteps_of(ddpm.config.diffusion))
    with progress_bar(total=len(runs) * steps, desc="sampling", unit="step") as progress:
        images = draw(ddpm, model.params, seed_key(seed), drawn, sampler, batch_size, progress)
        yield from zip(runs, images, strict=True)


def _condition(config: Model, guide: Guide, indices: list[int]) -> Condition:
    """That of images of these numbers, checked."""
    wanted = guide.of(np.array(indices))
    interval = wanted.get("guidance_interval")
    return conditions(config, wanted["labels"], len(indices), wanted.get("guidance", 1), interval)


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
