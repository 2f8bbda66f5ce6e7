"""Trained models in and out: runs, .safetensors, diffusers folders, names on huggingface.co, StableHLO."""
