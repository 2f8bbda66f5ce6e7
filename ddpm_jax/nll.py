"""The likelihood of a run's whole split (Ho et al. 2020, Section 4.3 and Table 1), in files that survive a kill.

RUN/likelihood/SPLIT-STEP-WEIGHTS-seedN/
  label.json       what was measured: weights, images, seed
  parts/           one file a draw and batch
  likelihood.json  the result, and curves.npz its curves over t
"""

import json
import logging
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from ddpm_jax.ddpm import seed_key
from ddpm_jax.errors import UserError
from ddpm_jax.files import npz, read_npz, write_file
from ddpm_jax.images import to_float
from ddpm_jax.likelihood import rate
from ddpm_jax.parallel import make_mesh, replicated
from ddpm_jax.runs import Split, Weights, default_split, digest, load_checkpoint, read_json, read_split

log = logging.getLogger(__name__)


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
    weights: Weights = "ema",
    step: int | None = None,
    batch_size: int | None = None,
    data: str | None = None,
    out: epath.PathLike | None = None,
) -> Likelihood:
    """The bound over every image of `split`, `draws` times with other noise; goes on with what `out` holds.

    `split` None is test where the config has a data.test, else holdout.
    Draw d of image i of the split takes its noise from fold_in(fold_in(key(seed), d), i).
    Raises UserError for what cannot be used, or if `out` holds something else's parts.
    """
    if draws < 1:
        raise UserError(f"draws: must be at least 1, got {draws}")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed: must be at least 0 and below 2**32, got {seed}")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size: must be at least 1, got {batch_size}")
    step, ddpm, params = load_checkpoint(run, weights=weights, step=step)
    split = split or default_split(ddpm.config)
    source, indices = read_split(run, ddpm.config, split, data)
    mesh = make_mesh()
    params = jax.device_put(params, replicated(mesh))
    size = batch_size or 64 * mesh.size
    label = {
        **{"parameters": digest(params), "weights": weights, "step": step, "split": split, "seed": seed},
        **{"data_fingerprint": source.fingerprint, "images": len(indices), "batch_size": size},
    }
    name = f"{split}-{step:08d}-{weights}-seed{seed}"
    folder = epath.Path(out).expanduser() if out else epath.Path(run).expanduser() / "likelihood" / name
    _claim(folder, label)

    parts = []
    with tqdm(total=draws * len(indices), desc="likelihood", unit="image", disable=None, leave=False) as progress:
        for draw in range(draws):
            rng = jax.random.fold_in(seed_key(seed), draw)
            for start in range(0, len(indices), size):
                some = indices[start : start + size]
                file = folder / "parts" / f"{draw:03d}-{start:08d}.npz"
                if not file.exists():
                    bits = ddpm.bits_per_dim(params, rng, to_float(source.read(some)), start=start, batch_size=size)
                    write_file(file, npz(_part(bits)))
                parts.append((draw, read_npz(file)))
                progress.update(len(some))
    result = _result(parts, label, draws)
    write_file(folder / "curves.npz", npz(_curves(result)))
    write_file(folder / "likelihood.json", json.dumps({"run": str(run), **result.summary}, indent=1).encode())
    log.info("%s: likelihood.json, curves.npz", folder)
    return result


def table(likelihood: Likelihood) -> str:
    """The summary as text, as in the paper: rate + distortion = bound."""
    summary, error = likelihood.summary, likelihood.summary["standard_error"]
    lines = [
        "{split}, {images} images, {draws} draws, {weights} weights of step {step}".format(**summary),
        f"{'':28}bits/dim  standard error over draws",
    ]
    for name, words in {
        "total": "negative log-likelihood <=",
        "rate": "  rate, L_1 + ... + L_T",
        "prior": "    of it the prior, L_T",
        "distortion": "  distortion, L_0",
    }.items():
        of_draws = f"{error[name]:.5f}" if error else "needs --draws 2 or more"
        lines.append(f"{words:28}{summary[name]:8.5f}  {of_draws if name != 'prior' else 'exact'}")
    return "\n".join([*lines, f"{'root mean squared error':28}{summary['rmse']:8.5f}  of 255"])


def _claim(folder, label) -> None:
    file = folder / "label.json"
    if file.exists():
        there = read_json(file)
        if there != label:
            differing = [key for key in label if there.get(key) != label[key]]
            differs = ", ".join(f"{key} {there.get(key)!r}, not {label[key]!r}" for key in differing)
            raise UserError(f"out: {folder} is of {differs}; choose another with --out")
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"out: {folder} is not empty and not from this command; choose another")
    write_file(file, json.dumps(label, indent=1).encode())


def _part(bits) -> dict[str, np.ndarray]:
    """What is kept of a batch: each image's bits, and sums over the images of what is wanted over t."""
    return {
        "total": bits.total,
        "prior": bits.prior,
        "distortion": bits.terms[:, 0],
        "terms": bits.terms.sum(axis=0, dtype=np.float64),
        "mse": bits.mse.sum(axis=0, dtype=np.float64),
    }


def _result(parts, label, draws) -> Likelihood:
    images = label["images"]

    def of_draw(draw, name):
        return sum(part[name].sum(dtype=np.float64) for d, part in parts if d == draw) / images

    each = {name: np.array([of_draw(draw, name) for draw in range(draws)]) for name in ("total", "prior", "distortion")}
    each["rate"] = each["total"] - each["distortion"]
    terms, mse = (sum(part[name] for _, part in parts) / (draws * images) for name in ("terms", "mse"))
    error = {name: float(values.std(ddof=1) / np.sqrt(draws)) for name, values in each.items()} if draws > 1 else None
    means = {name: float(each[name].mean()) for name in ("total", "rate", "prior", "distortion")}
    summary = {**label, "draws": draws, **means, "rmse": float(127.5 * np.sqrt(mse[0])), "standard_error": error}
    return Likelihood(summary, terms, means["prior"], mse)


def _curves(result: Likelihood) -> dict[str, np.ndarray]:
    return {"terms": result.terms, "mse": result.mse, "rate": result.rate, "rmse": result.rmse}
