"""The likelihood of a whole split (Ho et al. 2020, Section 4.3 and Table 1), kept in files.

A measurement that was killed resumes with the parts that are there.

RUN/likelihood/SPLIT-STEP-WEIGHTS-seedN/
  label.json       what is measured: weights, images, seed, process
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

from ddpm_jax.config import Config, names_where, to_dict
from ddpm_jax.data.images import to_float
from ddpm_jax.devices.processes import agreed, wait_for_all
from ddpm_jax.devices.progress import progress_bar
from ddpm_jax.devices.rows import full_batches
from ddpm_jax.evaluation.splits import Images
from ddpm_jax.keys import seed_key
from ddpm_jax.likelihood import BitsPerDim, rate
from ddpm_jax.storage.files import claim, npz, path_of, write_file
from ddpm_jax.storage.kept import Kept, read_kept
from ddpm_jax.weights.load import Loaded, words_of

log = logging.getLogger(__name__)

PART = 16
"""Images a file: always the same, so that batches of another size can resume."""


class Likelihood(NamedTuple):
    """The measurement of a whole split; bits are bits per dimension."""

    summary: dict
    """The content of likelihood.json, except for its `run`."""
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
        """[T] root mean squared error of the image shown after 1, ..., T reverse steps, of 255.

        Table 4's distortion.
        """
        return 127.5 * np.sqrt(self.mse[::-1])


def measure(
    model: Loaded,
    images: Images,
    draws: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    out: epath.PathLike | None = None,
) -> Likelihood:
    """The bound over all of `images`, `draws` times with fresh noise; resumes from existing parts.

    Earlier draws beyond `draws` count too. Draw d of image i of the split takes its noise from
    fold_in(fold_in(key(seed), d), i). `out` is the folder, by default one in the run's likelihood/.
    Raises UserError if an argument cannot be used, the bound is infinite, or the folder holds parts
    of something else.
    """
    model.ddpm.config.diffusion.check_bound()
    label = _label(model, images, seed)
    folder = path_of(out) if out else _home(model, images, seed)
    claim(folder, "label.json", label)

    count = len(images.indices)
    while _have(_files(folder, draws, 0, count)):
        draws += 1  # Measured before.
    rng = seed_key(seed)
    size = batch_size or 64 * model.devices
    total = draws * sum(_steps(model, stop - start, size) for start, stop in _groups(count, size))
    with progress_bar(total=total, desc="likelihood", unit="step") as progress:
        for draw in range(draws):
            key = jax.random.fold_in(rng, draw)
            _make_parts(folder, draw, model, images, key, size, progress)
    wait_for_all("likelihood")
    parts = [_read_parts(folder, draw, model, count) for draw in range(draws)]
    result = _result(parts, label)
    write_file(folder / "curves.npz", npz(_curves(result)))
    summary = {"run": str(model.path), **result.summary}
    write_file(folder / "likelihood.json", json.dumps(summary, indent=1).encode())
    log.info("results: %s (likelihood.json, curves.npz)", folder)
    return result


def table(likelihood: Likelihood) -> str:
    """The summary as text, as in the paper: rate + distortion = bound."""
    summary = likelihood.summary
    error = summary["standard_error"]
    weights = words_of(summary["weights"], summary["step"])
    rows = {
        "total": "negative log-likelihood <=",
        "rate": "  rate, L_1 + ... + L_T",
        "prior": "    of it the prior, L_T",
        "distortion": "  distortion, L_0",
    }
    lines = [
        f"{summary['split']}, {summary['images']} images, {weights}, {draws_of(summary)}",
        f"{'':28}bits/dim{'  standard error over draws' if error else ''}",
    ]
    for name, words in rows.items():
        of_draws = f"{error[name]:.5f}" if error else ""
        lines.append(f"{words:28}{summary[name]:8.5f}  {of_draws}".rstrip())
    lines.append(f"{'root mean squared error':28}{summary['rmse']:8.5f}  of 255")
    if not error:
        lines.append("(a standard error needs --draws 2 or more)")
    return "\n".join(lines)


def draws_of(summary: dict) -> str:
    """For example "1 draw"."""
    return f"{summary['draws']} draw{'s' if summary['draws'] > 1 else ''}"


def _label(model: Loaded, images: Images, seed: int) -> dict:
    """The description of the parts; only parts with the same label are combined."""
    label = {
        **model.label,
        "split": images.split,
        "seed": seed,
        "data_fingerprint": images.source.fingerprint,
        "images": len(images.indices),
        "model": {},
        "diffusion": {},
    }
    config = to_dict(model.ddpm.config)
    for name in names_where(Config, lambda field: field.network or field.images):
        group, _, field = name.partition(".")
        if group in label:
            label[group][field] = config[group][field]
    return label


def _home(model: Loaded, images: Images, seed: int) -> epath.Path:
    split: str = images.split
    if split == "test":
        split = f"test-{images.source.fingerprint[:8]}"
    return model.home / "likelihood" / f"{split}-{model.step:08d}-{model.kind}-seed{seed}"


def _files(folder, draw: int, start: int, stop: int) -> list[epath.Path]:
    """The parts of one draw that hold the images start, ..., stop - 1."""
    return [folder / "parts" / f"{draw:03d}-{at:08d}.npz" for at in range(start, stop, PART)]


def _read_parts(folder, draw: int, model: Loaded, count: int) -> list[dict[str, np.ndarray]]:
    """The parts of one draw of `count` images."""
    curve = Kept("float64", (model.ddpm.schedule.num_timesteps,))
    parts = []
    for at, file in zip(range(0, count, PART), _files(folder, draw, 0, count), strict=True):
        each = Kept("float32", (min(PART, count - at),))
        of_images = dict.fromkeys(("total", "prior", "distortion"), each)
        parts.append(read_kept(file, {**of_images, "terms": curve, "mse": curve}))
    return parts


def _have(files) -> bool:
    """Whether all files exist, as process 0 sees it."""
    return bool(agreed(all(file.exists() for file in files)))


def _groups(count: int, size: int) -> list[tuple[int, int]]:
    """The images (start, stop) that are measured and written together, in batches of `size`.

    Groups of whole parts at fixed places, so that a resumed run makes the same batches.
    """
    group = max(size // PART, 1) * PART
    return [(start, min(start + group, count)) for start in range(0, count, group)]


def _steps(model: Loaded, n: int, size: int) -> int:
    """How many steps it takes to measure n images."""
    batches = full_batches(n, size, shrink=True, multiple=model.devices)
    return model.ddpm.schedule.num_timesteps * sum(1 for _ in batches)


def _make_parts(folder, draw, model: Loaded, images: Images, key, size: int, progress) -> None:
    """Writes the missing parts of a draw."""
    bits_of = functools.partial(
        model.ddpm.bits_per_dim, model.params, key, batch_size=size, progress=progress
    )
    for start, stop in _groups(len(images.indices), size):
        some = images.indices[start:stop]
        files = _files(folder, draw, start, stop)
        if _have(files):
            progress.update(_steps(model, len(some), size))
        else:
            bits = bits_of(to_float(images.source.read(some)), start=start)
            for at, file in zip(range(0, len(some), PART), files, strict=True):
                part = BitsPerDim(*(field[at : at + PART] for field in bits if field is not None))
                write_file(file, npz(_part(part)))


def _part(bits) -> dict[str, np.ndarray]:
    """The numbers kept for a few images: the bits of each, and sums over them of curves over t."""
    return {
        "total": bits.total,
        "prior": bits.prior,
        "distortion": bits.terms[:, 0],
        "terms": bits.terms.sum(axis=0, dtype=np.float64),
        "mse": bits.mse.sum(axis=0, dtype=np.float64),
    }


def _result(parts: list[list[dict]], label: dict) -> Likelihood:
    """The means over the images and draws of `parts`, a list for each draw."""
    draws = len(parts)
    images = label["images"]

    def each_draw(name):
        sums = [sum(part[name].sum(dtype=np.float64) for part in draw) for draw in parts]
        return np.array(sums) / images

    def over_t(name):
        return sum(part[name] for draw in parts for part in draw) / (draws * images)

    each = {name: each_draw(name) for name in ("total", "prior", "distortion")}
    each["rate"] = each["total"] - each["distortion"]
    means = {name: float(each[name].mean()) for name in ("total", "rate", "prior", "distortion")}
    error = None
    if draws > 1:
        error = {name: float(of.std(ddof=1) / np.sqrt(draws)) for name, of in each.items()}
    mse = over_t("mse")
    totals = [np.concatenate([part["total"] for part in draw]) for draw in parts]
    summary = {
        **label,
        "draws": draws,
        **means,
        "rmse": float(127.5 * np.sqrt(mse[0])),
        "standard_error": error,
        "standard_error_over_images": float(np.std(np.mean(totals, axis=0)) / np.sqrt(images)),
    }
    return Likelihood(summary, over_t("terms"), means["prior"], mse)


def _curves(result: Likelihood) -> dict[str, np.ndarray]:
    return {
        "terms": result.terms,
        "mse": result.mse,
        "rate": result.rate,
        "rmse": result.rmse,
    }
