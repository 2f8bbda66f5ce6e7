"""Storage: files written completely or not at all, checksums, checkpoints, the run directory."""
