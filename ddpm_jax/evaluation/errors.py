"""Sums of the squared errors of a model's predicted x_0 over images, kept while they are measured.

The file has a fixed size, however many images: the sums over images 0, ..., images - 1. It is
written before the parts of the bound that it goes with, so that no image is counted twice.
"""

import dataclasses

import numpy as np
from etils import epath
from numpy.typing import ArrayLike

from ddpm_jax.calibration import DECODER_VARIANCES, Calibration, best_decoder, cell_grid
from ddpm_jax.ddpm import DDPM
from ddpm_jax.devices.processes import agreed
from ddpm_jax.errors import UserError
from ddpm_jax.storage.files import npz, write_file
from ddpm_jax.storage.kept import Kept, read_kept

NAME = "errors.npz"

SUMS = ("mse", "mse_squares", "cells", "cells_squares", "decoder")


@dataclasses.dataclass
class Errors:
    """The sums over the first `images` images."""

    images: int
    mse: np.ndarray
    """float64 [T]: of the mean squared error of each image."""
    mse_squares: np.ndarray
    """float64 [T]: of its square."""
    cells: np.ndarray
    """float64 [T,h,w,C]: of the mean squared error of each image for each channel in each cell."""
    cells_squares: np.ndarray
    """float64 [T,h,w,C]: of its square."""
    decoder: np.ndarray
    """float64 [V]: of L_0 with each of DECODER_VARIANCES."""

    def add(self, start: int, cells: ArrayLike | None, decoder: ArrayLike) -> None:
        """Counts the images start, start + 1, ... that are not in yet.

        `cells` are [b,T,h,w,C], `decoder` [b,V].
        """
        new = slice(self.images - start, None)
        for of_image, bits in zip(np.asarray(cells)[new], np.asarray(decoder)[new], strict=True):
            of_image = np.float64(of_image)
            self.decoder += bits
            mse = of_image.mean(axis=(1, 2, 3))
            self.mse += mse
            self.mse_squares += np.square(mse)
            self.cells += of_image
            self.cells_squares += np.square(of_image)
            self.images += 1

    def calibration(self) -> Calibration:
        """The means and their standard errors; of one image alone these are 0."""
        n = self.images

        def error(total, squares):
            variance = np.maximum(squares - np.square(total) / n, 0) / max(n - 1, 1)
            return np.sqrt(variance / n)

        return Calibration(
            mse=self.mse / n,
            error=error(self.mse, self.mse_squares),
            cells=(self.cells / n).astype(np.float32),
            cells_error=error(self.cells, self.cells_squares).astype(np.float32),
            images=n,
            decoder=best_decoder(self.decoder),
        )

    def write(self, folder: epath.Path) -> None:
        """Writes the sums into `folder`."""
        arrays = {name: getattr(self, name) for name in SUMS}
        write_file(folder / NAME, npz({"images": np.array(self.images), **arrays}))


def read_errors(folder: epath.Path, ddpm: DDPM, most: int) -> Errors:
    """The sums in `folder`, of at most `most` images, and of none if there is no file.

    Raises UserError naming the file if it is damaged.
    """
    T = ddpm.schedule.num_timesteps
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(SUMS, (T,))
    for name in ("cells", "cells_squares"):
        shapes[name] = (T, *cell_grid(ddpm.image_shape))
    shapes["decoder"] = (len(DECODER_VARIANCES),)
    file = folder / NAME
    if not agreed(file.exists()):
        zeros = {name: np.zeros(shape) for name, shape in shapes.items()}
        return Errors(0, **zeros)
    kinds = {name: Kept("float64", shape) for name, shape in shapes.items()}
    arrays = read_kept(file, {"images": Kept("int64", ()), **kinds})
    images = int(arrays.pop("images"))
    squares = [array for name, array in arrays.items() if name != "decoder"]
    whole = all((array >= 0).all() for array in squares)
    whole = whole and all(np.isfinite(array).all() for array in arrays.values())
    if not whole or not 0 <= images <= most:
        raise UserError(
            f"{file}: is not of {most} images or fewer, or holds numbers that are no squares; "
            "delete it to compute it again"
        )
    return Errors(images, **arrays)
