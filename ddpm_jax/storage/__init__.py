"""Files: whole or not there, checksums, checkpoints, and the run directory that they lie in."""
