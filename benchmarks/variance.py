"""Bits/dim that the best variance saves, on other images than those it was calibrated on.

    python benchmarks/variance.py RUN [--calibrate-images 256] [--images 256] [--steps 10 25 50 100]

The first held-out images calibrate, the next ones are measured; where a run has none, or with
--split test, those of the test set. A row is a chain of ancestral sampling: its steps, its grid,
and the bound in bits/dim with the model's own variance (fixed_small where steps are left out), with
the best one, and what that saves, with the standard error over the images. T steps are always
among the rows. The grid likelihood is made for the variance of its column. A run's own calibration
is neither used nor changed. With --out, results are kept in a folder, and the same command resumes.
"""

import argparse
import tempfile

import numpy as np
from etils import epath

from ddpm_jax import configure_jax
from ddpm_jax.devices.mesh import make_mesh
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.bound import measure
from ddpm_jax.evaluation.bound_parts import PART
from ddpm_jax.evaluation.splits import Images, calibration_split, read_split
from ddpm_jax.sampler import Sampler
from ddpm_jax.storage.files import read_npz
from ddpm_jax.weights.load import Loaded, load_weights


def main(options: argparse.Namespace) -> None:
    """Measures every chain and prints a table."""
    configure_jax()
    model = load_weights(options.run, mesh=make_mesh())
    split = options.split or calibration_split(model)
    images = read_split(model, split, options.data)
    first, others = portions(images, options.calibrate_images, options.images)
    with tempfile.TemporaryDirectory() as scratch:
        folder = epath.Path(options.out or scratch)
        calibrating = {"batch_size": options.batch_size, "out": folder / "calibration"}
        calibration = measure(model, first, **calibrating, calibrating=True).calibration
        assert calibration is not None
        model = model.calibrated(calibration, {})
        print(f"{len(first.indices)} images calibrate, {len(others.indices)} are measured")
        print(f"{'steps':>6}  {'grid':10}  {'own':>8}  {'optimal':>8}  {'saved':>8}  error")
        T = model.ddpm.schedule.num_timesteps
        for steps in sorted({min(steps, T) for steps in (*options.steps, T)}):
            for grid in ["linspace", "likelihood"] if steps < T else [None]:
                own, best = (
                    totals(model, others, steps, grid, variance, options.batch_size, folder)
                    for variance in (None, "optimal")
                )
                saved = own - best
                error = saved.std(ddof=1) / np.sqrt(len(saved))
                print(
                    f"{steps:6}  {grid or 'all':10}  {own.mean():8.4f}  {best.mean():8.4f}  "
                    f"{saved.mean():8.4f}  {error:.4f}",
                    flush=True,
                )


def portions(images: Images, calibrating: int, measured: int) -> tuple[Images, Images]:
    """The first images, and others that follow them."""
    indices = images.indices
    rest = indices[calibrating : calibrating + measured]
    if len(rest) < 2:
        raise UserError(
            f"calibrate-images: {calibrating} of {len(indices)} images leave fewer than 2 to "
            "measure; lower it"
        )
    return images._replace(indices=indices[:calibrating]), images._replace(indices=rest)


def totals(
    model: Loaded,
    images: Images,
    steps: int,
    grid: str | None,
    variance: str | None,
    batch_size: int | None,
    folder: epath.Path,
) -> np.ndarray:
    """The bound of each image on that chain."""
    sampler = Sampler(steps=steps if grid else None, grid=grid, variance=variance)  # type: ignore[arg-type]
    out = folder / f"{steps}-{grid or 'all'}-{variance or 'own'}"
    measure(model, images, batch_size=batch_size, out=out, sampler=sampler)
    parts = [
        read_npz(out / "parts" / f"000-{at:08d}.npz") for at in range(0, len(images.indices), PART)
    ]
    return np.concatenate([part["total"] for part in parts]).astype(np.float64)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--calibrate-images", type=int, default=256)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 25, 50, 100])
    parser.add_argument("--split", choices=["train", "holdout", "test"])
    parser.add_argument("--data", metavar="SOURCE")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--out", metavar="FOLDER")
    main(parser.parse_args())
