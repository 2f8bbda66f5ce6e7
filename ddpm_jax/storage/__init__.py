"""Storage: files written completely or not at all, checksums, checkpoints, the run directory."""

from ddpm_jax.errors import refuse_windows

# Before any file of this room imports what only Unix has.
refuse_windows()
