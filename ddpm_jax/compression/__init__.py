"""Images as files whose every prefix decodes (Ho et al. 2020, Section 4.3)."""

from ddpm_jax.compression.compress import Asked, Compressed, compress, compressed
from ddpm_jax.compression.decompress import Picture, decompress

__all__ = ["Asked", "Compressed", "Picture", "compress", "compressed", "decompress"]
