"""Images in: a Source is a settled list of images, Batches an endless stream of them."""

from ddpm_jax.data.batches import Batches, open_batches, split
from ddpm_jax.data.sources import Source, from_array, load_source

__all__ = ["Batches", "Source", "from_array", "load_source", "open_batches", "split"]
