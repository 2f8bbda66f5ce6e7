"""The likelihood of a whole split (Ho et al. 2020, Section 4.3 and Table 1), kept in files.

A measurement that was killed resumes with the parts that are there.

RUN/likelihood/SPLIT-STEP-WEIGHTS-seedN/
  label.json       what is measured: weights, images, seed, process, chain
  parts/           one file for every few images of each draw
  errors.npz       sums of the squared errors for the calibration, see errors.py
  likelihood.json  the result, and curves.npz its curves over t

The folder's name also says which chain it was, how many of the images, and that no class was given,
where these are not the model's own, all, and the images' labels.
"""

import functools
import json
import logging
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from ddpm_jax.calibration import Calibration
from ddpm_jax.data.scaling import Scaling, Unit
from ddpm_jax.ddpm import DDPM
from ddpm_jax.devices.processes import wait_for_all
from ddpm_jax.devices.progress import progress_bar
from ddpm_jax.evaluation.bound_parts import Parts, files_of, have_all, read_parts
from ddpm_jax.evaluation.bound_place import chain_of, folder_of, label_of, label_of_today
from ddpm_jax.evaluation.density import (
    at_resolution,
    check_resolution,
    shift_of,
    words_of_density,
)
from ddpm_jax.evaluation.errors import read_errors
from ddpm_jax.evaluation.labels import labels_of
from ddpm_jax.evaluation.splits import Images
from ddpm_jax.keys import seed_key
from ddpm_jax.likelihood import rate
from ddpm_jax.sampler import ANCESTRAL, Sampler
from ddpm_jax.storage.files import claim, npz, path_of, write_file
from ddpm_jax.storage.measured import CALIBRATION, write_calibration
from ddpm_jax.weights.load import Loaded, words_of

log = logging.getLogger(__name__)


class Likelihood(NamedTuple):
    """The measurement of a whole split; bits are bits per dimension."""

    summary: dict
    """The content of likelihood.json, except for its `run`."""
    terms: np.ndarray
    """[S] the bound's terms, bits: the mean over images and draws."""
    prior: float
    """L_T, bits."""
    mse: np.ndarray
    """[S] mean squared error of the x_0 predicted from x_t, images in [-1, 1]."""
    timesteps: np.ndarray | None = None
    """[S] the steps of the chain, ascending; None for all."""
    calibration: Calibration | None = None
    """Of the first draw, where its errors were kept for every image."""
    unit: Unit = Unit(127.5, "of 255")
    """That of rmse."""

    @property
    def rate(self) -> np.ndarray:
        """[S] bits sent after 1, ..., S reverse steps (Table 4)."""
        return rate(self.prior, self.terms)

    @property
    def rmse(self) -> np.ndarray:
        """[S] root mean squared error of the image shown after 1, ..., S reverse steps.

        Table 4's distortion, in `unit`.
        """
        return self.unit.size * np.sqrt(self.mse[::-1])


def measure(
    model: Loaded,
    images: Images,
    draws: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    out: epath.PathLike | None = None,
    *,
    sampler: Sampler = ANCESTRAL,
    first: int | None = None,
    calibrating: bool = False,
    conditional: bool | None = None,
    resolution: float | None = None,
) -> Likelihood:
    """The bound over all of `images`, `draws` times with fresh noise; resumes from existing parts.

    Earlier draws beyond `draws` count too. Draw d of image i of the split takes its noise from
    fold_in(fold_in(key(seed), d), i). `out` is the folder, by default one in the run's likelihood/.
    `sampler` is the chain that the bound is of. `first` says that `images` are only so many of the
    split. `conditional` is that of `labels_of`: the bound is of p(image | label), or of p(image).
    The result has a calibration if `calibrating`, which measures again where parts lack what
    that needs. Otherwise a run gets its calibration.npz where the whole chain is measured on
    images that were not trained on, more of them than before, with their labels if they have any.
    `resolution` is for continuous values, see `density.at_resolution`. Raises UserError if an
    argument cannot be used, the bound is infinite, or the folder holds parts of something else.
    """
    check_resolution(model.ddpm, resolution)
    model.ddpm.config.diffusion.check_bound()
    sampler = model.ddpm.resolve_bound(sampler)
    labels = labels_of(model.ddpm, images, conditional)
    label = label_of(model, images, seed, sampler, labels is not None)
    folder = (
        path_of(out) if out else folder_of(model, images, seed, sampler, first, labels is not None)
    )
    claim(folder, "label.json", label, functools.partial(label_of_today, model=model))

    steps = sampler.timesteps_of(model.ddpm.config.diffusion)
    count = len(images.indices)
    while have_all(files_of(folder, draws, 0, count)):
        draws += 1  # Measured before.
    usual = conditional is None or (labels is None) == (labels_of(model.ddpm, images) is None)
    feeding = out is None and not calibrating and usual and _is_calibrating(model, images, sampler)
    errors = read_errors(folder, model.ddpm, count) if calibrating or feeding else None
    parts = Parts(
        folder, model, images, labels, sampler, len(steps), batch_size, errors, calibrating
    )
    rng = seed_key(seed)
    with progress_bar(total=draws * parts.steps, desc="likelihood", unit="step") as progress:
        for draw in range(draws):
            parts.make(draw, jax.random.fold_in(rng, draw), progress)
    wait_for_all("likelihood")
    read = [read_parts(folder, draw, model, count, len(steps)) for draw in range(draws)]
    result = _result(read, label, steps, model.ddpm.scaling)
    if errors is not None and errors.images == count:
        result = result._replace(calibration=errors.calibration())
    if model.ddpm.levels is None:
        result = _at_resolution(result, model.ddpm, resolution)
    write_file(folder / "curves.npz", npz(_curves(result)))
    summary = {"run": str(model.path), **result.summary}
    write_file(folder / "likelihood.json", json.dumps(summary, indent=1).encode())
    log.info("results: %s (likelihood.json, curves.npz)", folder)
    if feeding and result.calibration is not None:
        keep_calibration(model.home / CALIBRATION, model, images, seed, result.calibration)
    return result


def _at_resolution(result: Likelihood, ddpm: DDPM, resolution: float | None) -> Likelihood:
    """The result with bits/dim at `resolution`; all of the difference is the decoder's."""
    terms = result.terms.copy()
    terms[0] += shift_of(ddpm, resolution)
    summary = at_resolution(result.summary, ddpm, resolution)
    return result._replace(summary=summary, terms=terms)


def keep_calibration(
    file: epath.PathLike, model: Loaded, images: Images, seed: int, calibration: Calibration
) -> None:
    """Writes what was measured of `model` on `images` into `file`, and says so."""
    write_calibration(file, model, calibration, about_images(model, images, seed))
    log.info("%s: calibration by %d images", file, calibration.images)


def about_images(model: Loaded, images: Images, seed: int) -> dict[str, Any]:
    """How a calibration was measured, for its file."""
    fingerprint = images.source.fingerprint
    with_labels = labels_of(model.ddpm, images) is not None
    split = f"{images.split}, with labels" if with_labels else images.split
    return {"seed": seed, "split": split, "data_fingerprint": fingerprint}


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
        _words_ofchain_of(summary["chain"], summary["diffusion"]["num_timesteps"])
        + _words_of_labels(summary),
        f"{'':28}bits/dim{'  standard error over draws' if error else ''}",
    ]
    for name, words in rows.items():
        of_draws = f"{error[name]:.5f}" if error else ""
        lines.append(f"{words:28}{summary[name]:8.5f}  {of_draws}".rstrip())
    unit = likelihood.unit.words
    lines.append(f"{'root mean squared error':28}{summary['rmse']:8.5f}  {unit}")
    if "log_density" in summary:
        lines += words_of_density(summary)
    if not error:
        lines.append("(a standard error needs --draws 2 or more)")
    return "\n".join(lines)


def draws_of(summary: dict) -> str:
    """For example "1 draw"."""
    return f"{summary['draws']} draw{'s' if summary['draws'] > 1 else ''}"


def _words_ofchain_of(chain: dict, T: int) -> str:
    """For example "10 of 1000 steps, variance optimal"."""
    steps = chain["timesteps"]
    return f"{f'all {T}' if steps is None else f'{len(steps)} of {T}'} steps, variance " + (
        "optimal, by the calibration" if chain["calibration"] else chain["variance"]
    )


def _words_of_labels(summary: dict) -> str:
    """Of a model with classes, whether the bound is that of images with theirs."""
    if "conditional" not in summary:
        return ""
    return f", {'given the labels' if summary['conditional'] else 'no class'}"


def _is_calibrating(model: Loaded, images: Images, sampler: Sampler) -> bool:
    """Whether the errors measured on the way make a calibration of more images than before."""
    whole = chain_of(model, sampler) == chain_of(model, ANCESTRAL)
    calibration = model.ddpm.calibration
    better = calibration is None or calibration.images < len(images.indices)
    return whole and images.split != "train" and better


def _result(
    parts: list[list[dict]], label: dict, timesteps: np.ndarray, scaling: Scaling
) -> Likelihood:
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
        "rmse": float(scaling.unit.size * np.sqrt(mse[0])),
        "standard_error": error,
        "standard_error_over_images": float(np.std(np.mean(totals, axis=0)) / np.sqrt(images)),
    }
    terms = over_t("terms")
    return Likelihood(summary, terms, means["prior"], mse, timesteps, unit=scaling.unit)


def _curves(result: Likelihood) -> dict[str, np.ndarray]:
    assert result.timesteps is not None  # `_result` knows them.
    return {
        "timesteps": result.timesteps,
        "terms": result.terms,
        "mse": result.mse,
        "rate": result.rate,
        "rmse": result.rmse,
    }
