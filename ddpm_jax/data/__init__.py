"""Images in: a Source is a settled list of images, a BatchReader an endless stream of them."""

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
