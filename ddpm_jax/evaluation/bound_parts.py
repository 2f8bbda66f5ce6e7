"""The parts of a measurement of the bound: one file for every few images of each draw."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from ddpm_jax.calibration import DECODER_VARIANCES
from ddpm_jax.calls.bounds import Measured, bits_of_each
from ddpm_jax.data.images import to_float
from ddpm_jax.devices.processes import agreed
from ddpm_jax.devices.rows import full_batches
from ddpm_jax.evaluation.errors import Errors
from ddpm_jax.evaluation.splits import Images
from ddpm_jax.likelihood import BitsPerDim
from ddpm_jax.sampler import Sampler
from ddpm_jax.storage.files import npz, write_file
from ddpm_jax.storage.kept import Kept, read_kept
from ddpm_jax.weights.load import Loaded

PART = 16
"""Images a file: always the same, so that batches of another size can resume."""


def files_of(folder: epath.Path, draw: int, start: int, stop: int) -> list[epath.Path]:
    """The parts of one draw that hold the images start, ..., stop - 1."""
    return [folder / "parts" / f"{draw:03d}-{at:08d}.npz" for at in range(start, stop, PART)]


def read_parts(
    folder: epath.Path, draw: int, model: Loaded, count: int, steps: int | None = None
) -> list[dict[str, np.ndarray]]:
    """The parts of one draw of `count` images, of a chain of so many steps; None for all."""
    curve = Kept("float64", (steps or model.ddpm.schedule.num_timesteps,))
    parts = []
    for at, file in zip(range(0, count, PART), files_of(folder, draw, 0, count), strict=True):
        each = Kept("float32", (min(PART, count - at),))
        of_images = dict.fromkeys(("total", "prior", "distortion"), each)
        parts.append(read_kept(file, {**of_images, "terms": curve, "mse": curve}))
    return parts


def have_all(files: list[epath.Path]) -> bool:
    """Whether all files exist, as process 0 sees it."""
    return bool(agreed(all(file.exists() for file in files)))


def _groups(count: int, size: int) -> list[tuple[int, int]]:
    """The images (start, stop) that are measured and written together, in batches of `size`.

    Groups of whole parts at fixed places, so that a resumed run makes the same batches.
    """
    group = max(size // PART, 1) * PART
    return [(start, min(start + group, count)) for start in range(0, count, group)]


class Parts(NamedTuple):
    """The parts of a measurement, which are made where they are missing."""

    folder: epath.Path
    model: Loaded
    images: Images
    labels: np.ndarray | None
    """Those of the images, or None for no class."""
    sampler: Sampler
    chain: int
    """S, the steps of the chain."""
    batch_size: int | None
    errors: Errors | None
    """To be filled in the first draw, if any."""
    calibrating: bool
    """Whether they must be filled, so that parts are made again that they lack."""

    @property
    def size(self) -> int:
        """Images in a batch."""
        return self.batch_size or 64 * self.model.devices

    @property
    def groups(self) -> list[tuple[int, int]]:
        """The images (start, stop) that are measured and written together."""
        return _groups(len(self.images.indices), self.size)

    @property
    def steps(self) -> int:
        """How many steps it takes to measure all images."""
        return sum(self._steps(stop - start) for start, stop in self.groups)

    def _steps(self, n: int) -> int:
        batches = full_batches(n, self.size, shrink=True, multiple=self.model.devices)
        return self.chain * sum(1 for _ in batches)

    def _labels(self, start: int, stop: int) -> np.ndarray | None:
        return None if self.labels is None else self.labels[start:stop]

    def _decoder_bits(self, key, x_0, start: int) -> np.ndarray:
        return self.model.ddpm.decoder_bits(
            self.model.params,
            key,
            x_0,
            DECODER_VARIANCES,
            labels=self._labels(start, start + len(x_0)),
            start=start,
            batch_size=self.size,
        )

    def make(self, draw: int, key: jax.Array, progress: Any) -> None:
        """Writes the missing parts of a draw."""
        groups = list(self._missing(draw, progress))
        measured = bits_of_each(
            self.model.ddpm,
            self.model.params,
            key,
            map(self._measured, groups),
            self.sampler,
            self.size,
            progress.update,
        )
        for group, (images, bits) in zip(groups, measured, strict=True):
            errors = group.errors
            if errors is not None:
                decoder = self._decoder_bits(key, images.x_0, group.start)
                errors.add(group.start, bits.cells, decoder)
                errors.write(self.folder)  # Before the parts, so that none is there without it.
            count = group.stop - group.start
            for at, file in zip(range(0, count, PART), group.files, strict=True):
                part = BitsPerDim(*(field[at : at + PART] for field in bits[:4]))
                write_file(file, npz(_part(part)))

    def _missing(self, draw: int, progress) -> Iterator["_Group"]:
        """The groups of a draw that are to be measured; moves `progress` past the others.

        Measuring one changes nothing for those after it.
        """
        errors = self.errors if draw == 0 else None
        for start, stop in self.groups:
            files = files_of(self.folder, draw, start, stop)
            have = have_all(files)
            if errors is not None and have and errors.images < stop and not self.calibrating:
                errors = None  # Parts of before there were errors, which are not made again.
            if have and (errors is None or errors.images >= stop):
                progress.update(self._steps(stop - start))
                continue
            yield _Group(start, stop, files, errors)

    def _measured(self, group: "_Group") -> Measured:
        indices = self.images.indices[group.start : group.stop]
        x_0 = to_float(self.images.source.read(indices))
        labels = self._labels(group.start, group.stop)
        return Measured(group.start, x_0, labels, group.errors is not None)


class _Group(NamedTuple):
    """Images start, ..., stop - 1, which are measured and written together."""

    start: int
    stop: int
    files: list[epath.Path]
    errors: Errors | None
    """To be filled with theirs."""


def _part(bits) -> dict[str, np.ndarray]:
    """The numbers kept for a few images: the bits of each, and sums over them of curves over t."""
    return {
        "total": bits.total,
        "prior": bits.prior,
        "distortion": bits.terms[:, 0],
        "terms": bits.terms.sum(axis=0, dtype=np.float64),
        "mse": bits.mse.sum(axis=0, dtype=np.float64),
    }
