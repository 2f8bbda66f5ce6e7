"""`ddpm-jax calibrate`: measures the errors of a model's predicted x_0, kept beside its weights."""

import logging

import numpy as np
from etils import epath

from ddpm_jax.calibration import FixedVariance, chain_bits, likelihood_steps
from ddpm_jax.ddpm import DDPM
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.bound import about_images, keep_calibration, measure
from ddpm_jax.evaluation.splits import Images
from ddpm_jax.sampler import Sampler
from ddpm_jax.samplers import time_grid
from ddpm_jax.storage.files import check_writable, path_of
from ddpm_jax.storage.measured import CALIBRATION
from ddpm_jax.weights.export import export, new_path
from ddpm_jax.weights.load import Loaded

log = logging.getLogger(__name__)

STEPS = (10, 25, 50, 100)
"""The lengths of chains in the table, beside all steps."""

ROWS = 10
"""The steps whose errors are in the table."""


def calibrate(
    model: Loaded,
    images: Images,
    first: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    out: epath.PathLike | None = None,
) -> Loaded:
    """The model with its calibration, measured on `images`, in files; resumes from existing parts.

    Written into calibration.npz of the run, or to `out`: a .npz, or a new .safetensors file that
    holds the model, too. `first` says that `images` are only so many of the split. Raises UserError
    for another `out`, or for a model that is no run without one.
    """
    file, parts = places(model, out)
    if images.split == "train":
        log.warning("calibrating on images that were trained on: the errors are smaller there")
    measured = measure(model, images, 1, seed, batch_size, parts, first=first, calibrating=True)
    calibration = measured.calibration
    assert calibration is not None  # That is what `calibrating` asks for.
    calibrated = model.calibrated(calibration, about_images(model, images, seed))
    if file.suffix == ".safetensors":
        export(file, calibrated, "safetensors")
    else:
        keep_calibration(file, model, images, seed, calibration)
        if file.absolute() != path_of(model.path).absolute() / CALIBRATION:
            log.info("commands use it once it is %s in the model's folder", CALIBRATION)
    return calibrated


def places(model: Loaded, out: epath.PathLike | None) -> tuple[epath.Path, epath.Path | None]:
    """(the file, the folder for the parts, None for the run's own).

    Raises UserError as `calibrate` does.
    """
    if out is None:
        return model.home / CALIBRATION, None
    file = path_of(out)
    if file.suffix == ".safetensors":
        file = new_path(out, "safetensors")
    elif file.suffix != ".npz":
        raise UserError(
            f"out: must end in .npz, or .safetensors for a new file with the model, got {out}"
        )
    check_writable(file)
    return file, file.parent / f"{file.stem}-parts"


def table(model: Loaded) -> str:
    """The errors at some steps, and the bits that the best variance and the best steps save."""
    ddpm = model.ddpm
    calibration = ddpm.calibration
    assert calibration is not None
    T = ddpm.schedule.num_timesteps
    unit = ddpm.scaling.unit
    width = len(f"RMSE {unit.words}")
    lines = [
        f"{model.measured.of_calibration['split']}, {calibration.images} images, {model.words}",
        f"{'step':>6}  RMSE {unit.words}  standard error",
    ]
    for t in time_grid(T, min(ROWS, T)):
        rmse = unit.size * np.sqrt(calibration.mse[t])
        # By the delta method: the error of a root.
        error = unit.size * calibration.error[t] / (2 * np.sqrt(calibration.mse[t]) or 1)
        lines.append(f"{t:6}  {rmse:{width}.4f}  {error:14.4f}")
    lines += [
        "bits/dim that are saved, as these errors predict",
        f"{'steps':>6}  {'in place of':12}  optimal variance  and the likelihood grid",
    ]
    for steps in sorted({min(steps, T) for steps in (*STEPS, T)}):
        lines.append(_row(ddpm, steps))
    return "\n".join(lines)


def _row(ddpm: DDPM, steps: int) -> str:
    """The line of chains of so many steps."""
    calibration = ddpm.calibration
    assert calibration is not None
    schedule = ddpm.schedule
    mse = calibration.mse
    own = Sampler(steps=steps).variance_of(ddpm.config.diffusion)
    if own != "fixed_small" and own != "fixed_large":
        return f"{steps:6}  {own:12}  not known for a learned variance"
    even = time_grid(schedule.num_timesteps, steps)
    levels = ddpm.levels
    before = chain_bits(schedule, mse, even, own, levels)
    best: FixedVariance = "optimal"
    saved = before - chain_bits(schedule, mse, even, best, levels)
    line = f"{steps:6}  {own:12}  {saved:16.4f}"
    if steps < 2:
        return line
    chosen = likelihood_steps(schedule, mse, steps, best, levels)
    return f"{line}  {before - chain_bits(schedule, mse, chosen, best, levels):23.4f}"
