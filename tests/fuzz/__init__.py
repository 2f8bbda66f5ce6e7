"""Damaged files for every reader of the package: see `fuzz.run`, and docs/robustness.md."""
