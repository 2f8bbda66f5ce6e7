"""Measures a model: likelihood, FID and related metrics of its samples, the paper's own numbers."""
