"""Reads images: a Source is a fixed list of images, a BatchReader an endless series of batches."""

from ddpm_jax.data.batches import Batch, Batches, BatchReader, split
from ddpm_jax.data.load import load_source, open_batches
from ddpm_jax.data.sources import Source, from_array

__all__ = [
    "Batch",
    "BatchReader",
    "Batches",
    "Source",
    "from_array",
    "load_source",
    "open_batches",
    "split",
]
