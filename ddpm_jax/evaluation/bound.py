"""The likelihood of a run's whole split (Ho et al. 2020, Section 4.3 and Table 1), in files that survive a kill.

RUN/likelihood/SPLIT-STEP-WEIGHTS-seedN/
  label.json       of what: weights, images, seed, process
  parts/           one file for every few images of each draw
  likelihood.json  the result, and curves.npz its curves over t
"""

import functools
import json
import logging
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from ddpm_jax.config import to_dict
from ddpm_jax.data.images import to_float
from ddpm_jax.ddpm import seed_key
from ddpm_jax.devices.mesh import make_mesh
from ddpm_jax.devices.processes import agreed, wait_for_all
from ddpm_jax.devices.progress import progress_bar
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.splits import Split, default_split, read_split
from ddpm_jax.likelihood import BitsPerDim, rate
from ddpm_jax.storage.files import claim, npz, path_of, read_npz, write_file
from ddpm_jax.storage.run import Weights
from ddpm_jax.weights.load import home, load_weights, words_of

log = logging.getLogger(__name__)

PART = 16
"""Images a file: the same whatever batches they are made in, so that other batches can go on."""


class Likelihood(NamedTuple):
    """What was measured over a whole split; bits are bits per dimension."""

    summary: dict
    """As in likelihood.json."""
    terms: np.ndarray
    """[T] the bound's terms, bits: the mean over images and draws."""
    prior: float
    """L_T, bits."""
    mse: np.ndarray
    """[T] mean squared error of the x_0 predicted from x_t, images in [-1, 1]."""

    @property
    def rate(self) -> np.ndarray:
        """[T] bits sent after 1, ..., T reverse steps (Table 4)."""
        return rate(self.prior, self.terms)

    @property
    def rmse(self) -> np.ndarray:
        """[T] root mean squared error of what can be shown after 1, ..., T reverse steps, levels of 255 (Table 4)."""
        return 127.5 * np.sqrt(self.mse[::-1])


def measure(
    run: epath.PathLike,
    split: Split | None = None,
    draws: int = 1,
    seed: int = 0,
    weights: Weights | None = None,
    step: int | None = None,
    batch_size: int | None = None,
    data: str | None = None,
    out: epath.PathLike | None = None,
) -> Likelihood:
    """The bound over every image of `split`, `draws` times or more with other noise; goes on with what is there.

    `split` None is test where the config has a data.test, else holdout.
    Draws that were measured before, beyond `draws`, count too. Draw d of image i of the split takes its
    noise from fold_in(fold_in(key(seed), d), i). `out` is the folder, by default one in the run's likelihood/.
    Raises UserError for what cannot be used, or if the folder holds something else's parts.
    """
    if draws < 1:
        raise UserError(f"draws: must be at least 1, got {draws}")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size: must be at least 1, got {batch_size}")
    rng = seed_key(seed)
    mesh = make_mesh()
    model = load_weights(run, weights=weights, step=step, mesh=mesh)
    split = split or default_split(model.ddpm.config)
    source, indices = read_split(model, split, data)
    label = {
        **{**model.label, "split": split, "seed": seed},
        **{"data_fingerprint": source.fingerprint, "images": len(indices)},
        **{name: to_dict(model.ddpm.config)[name] for name in ("model", "diffusion")},
    }
    del label["model"]["remat"]  # It changes nothing here.
    of = f"test-{source.fingerprint[:8]}" if split == "test" else split
    folder = (
        path_of(out)
        if out
        else home(run) / "likelihood" / f"{of}-{model.step:08d}-{model.kind}-seed{seed}"
    )
    claim(folder, "label.json", label)

    size = batch_size or 64 * mesh.size
    while _have(_files(folder, draws, 0, len(indices))):
        draws += 1  # What was measured before counts.
    with progress_bar(total=draws * len(indices), desc="likelihood", unit="image") as progress:
        for draw in range(draws):
            key = jax.random.fold_in(rng, draw)
            bits_of = functools.partial(model.ddpm.bits_per_dim, model.params, key, batch_size=size)
            _make_parts(folder, draw, source, indices, size, bits_of, progress)
    wait_for_all("likelihood")
    parts = [
        [read_npz(file) for file in _files(folder, draw, 0, len(indices))] for draw in range(draws)
    ]
    result = _result(parts, label)
    write_file(folder / "curves.npz", npz(_curves(result)))
    write_file(
        folder / "likelihood.json",
        json.dumps({"run": str(run), **result.summary}, indent=1).encode(),
    )
    log.info("%s: likelihood.json, curves.npz", folder)
    return result


def table(likelihood: Likelihood) -> str:
    """The summary as text, as in the paper: rate + distortion = bound."""
    summary, error = likelihood.summary, likelihood.summary["standard_error"]
    lines = [
        f"{summary['split']}, {summary['images']} images, {words_of(summary['weights'], summary['step'])}, "
        + draws_of(summary),
        f"{'':28}bits/dim{'  standard error over draws' if error else ''}",
    ]
    for name, words in {
        "total": "negative log-likelihood <=",
        "rate": "  rate, L_1 + ... + L_T",
        "prior": "    of it the prior, L_T",
        "distortion": "  distortion, L_0",
    }.items():
        lines.append(
            f"{words:28}{summary[name]:8.5f}  {f'{error[name]:.5f}' if error else ''}".rstrip()
        )
    lines.append(f"{'root mean squared error':28}{summary['rmse']:8.5f}  of 255")
    return "\n".join(lines if error else [*lines, "(a standard error needs --draws 2 or more)"])


def draws_of(summary: dict) -> str:
    """For example "1 draw"."""
    return f"{summary['draws']} draw{'s' if summary['draws'] > 1 else ''}"


def _files(folder, draw: int, start: int, stop: int) -> list[epath.Path]:
    """The parts of one draw that hold the images start, ..., stop - 1."""
    return [folder / "parts" / f"{draw:03d}-{at:08d}.npz" for at in range(start, stop, PART)]


def _have(files) -> bool:
    """Whether all are there, as process 0 sees it."""
    return bool(agreed(all(file.exists() for file in files)))


def _make_parts(folder, draw, source, indices, size, bits_of, progress) -> None:
    """Writes those parts of a draw that are missing, `bits_of` images measured `size` at a time."""
    # In groups of whole parts at fixed places: after a kill the same batches are made again.
    group = max(size // PART, 1) * PART
    for start in range(0, len(indices), group):
        some = indices[start : start + group]
        files = _files(folder, draw, start, start + len(some))
        if not _have(files):
            bits = bits_of(to_float(source.read(some)), start=start)
            for at, file in zip(range(0, len(some), PART), files, strict=True):
                write_file(file, npz(_part(BitsPerDim(*(field[at : at + PART] for field in bits)))))
        progress.update(len(some))


def _part(bits) -> dict[str, np.ndarray]:
    """What is kept of some images: each image's bits, and sums over the images of what is wanted over t."""
    return {
        "total": bits.total,
        "prior": bits.prior,
        "distortion": bits.terms[:, 0],
        "terms": bits.terms.sum(axis=0, dtype=np.float64),
        "mse": bits.mse.sum(axis=0, dtype=np.float64),
    }


def _result(parts: list[list[dict]], label: dict) -> Likelihood:
    """The means over the images and draws of `parts`, a list for each draw."""
    draws, images = len(parts), label["images"]

    def each_draw(name):
        return np.array(
            [
                sum(part[name].sum(dtype=np.float64) for part in of_draw) / images
                for of_draw in parts
            ]
        )

    def over_t(name):
        return sum(part[name] for of_draw in parts for part in of_draw) / (draws * images)

    each = {name: each_draw(name) for name in ("total", "prior", "distortion")}
    each["rate"] = each["total"] - each["distortion"]
    error = (
        {name: float(values.std(ddof=1) / np.sqrt(draws)) for name, values in each.items()}
        if draws > 1
        else None
    )
    means = {name: float(each[name].mean()) for name in ("total", "rate", "prior", "distortion")}
    mse = over_t("mse")
    summary = {
        **label,
        "draws": draws,
        **means,
        "rmse": float(127.5 * np.sqrt(mse[0])),
        "standard_error": error,
    }
    of_images = np.mean(
        [np.concatenate([part["total"] for part in of_draw]) for of_draw in parts], axis=0
    )
    summary["standard_error_over_images"] = float(np.std(of_images) / np.sqrt(images))
    return Likelihood(summary, over_t("terms"), means["prior"], mse)


def _curves(result: Likelihood) -> dict[str, np.ndarray]:
    return {"terms": result.terms, "mse": result.mse, "rate": result.rate, "rmse": result.rmse}
