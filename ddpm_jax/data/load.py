"""Which source a config names, and how its batches are read."""

import dataclasses
from pathlib import Path

import numpy as np

from ddpm_jax.config import Data
from ddpm_jax.data.arrays import check_kind
from ddpm_jax.data.batches import Batches, BatchReader
from ddpm_jax.data.class_names import numbered
from ddpm_jax.data.names import shown
from ddpm_jax.data.npy import load_npy
from ddpm_jax.data.sources import Source, load_npz
from ddpm_jax.errors import UserError


def load_source(data: Data, test: bool = False, believe: bool = True) -> Source:
    """The images that `data.source` names, or with `test` those of `data.test`.

    Where the names of their classes are known, `data.class_names` numbers them. Raises UserError if
    there are no images, they cannot be read, are not of `data.image_shape`, of other numbers than
    `data.values` says or of another class.

    Without `believe`, no image is taken from what an earlier start remembered.
    """
    place = (data.test if test else data.source) or ""
    source = _load(place, data, test, believe)
    check_kind(source.dtype, data.value_kind, shown(place))
    return numbered(source, data.class_names, place)


def _load(place: str, data: Data, test: bool, believe: bool) -> Source:
    kind, _, path = place.partition(":")
    if kind == "folder":
        from ddpm_jax.data.folder import load_folder  # Pillow is needed here alone.

        return load_folder(path, data, believe)
    if kind == "tfds":
        from ddpm_jax.data.tfds import load_tfds  # tensorflow_datasets takes a second to import.

        return load_tfds(path, data, test)
    if kind == "hf":
        return _load_hf(path, data, test)
    if kind == "npy":
        return load_npy(Path(path).expanduser(), data)
    if kind == "npz":
        return load_npz(Path(path).expanduser(), data.image_shape, data.value_kind)
    if kind == "digits":
        source = load_npz(Path(__file__).parent / "digits.npz", data.image_shape, data.value_kind)
        # The package's own folder is no place for users' files.
        return dataclasses.replace(source, beside=None)
    raise UserError(
        "data.source: arrays come from Python only; call ddpm_jax.fit(config, workdir, images)"
    )


def _load_hf(path: str, data: Data, test: bool) -> Source:
    try:
        from ddpm_jax.data.hf import load_hf  # It takes seconds to import.
    except ModuleNotFoundError as error:
        if error.name not in ("datasets", "pyarrow"):
            raise
        raise UserError(
            f'data: hf:{shown(path)} is read with the datasets library; pip install "ddpm-jax[hf]"'
        ) from error
    return load_hf(path, data, test)


def open_batches(
    source: Source,
    indices: np.ndarray,
    batch_size: int,
    seed: int,
    data: Data,
    rows: np.ndarray | None = None,
) -> BatchReader:
    """The Batches of a source in memory, or of any other a Stream that `data.workers` fill.

    A thread fills that of a source which is read in blocks.
    """
    batches = Batches(source, indices, batch_size, seed, rows)
    if not source.streamed:
        return batches
    from ddpm_jax.data.stream import Stream  # Grain takes a second to import.

    # Processes would keep the same blocks, each for itself, and a thread reads these fast enough.
    return Stream(batches, 0 if source.blocks else data.workers)
