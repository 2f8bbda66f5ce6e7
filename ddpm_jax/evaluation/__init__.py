"""Samples and real images compared: likelihood, FID and its relatives, the paper's own figures."""
