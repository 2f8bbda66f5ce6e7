"""Loads and exports trained models: runs, .safetensors, diffusers folders, the Hub, StableHLO."""
