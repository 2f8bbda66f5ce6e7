"""Configuration: frozen dataclasses that check themselves, strict to and from JSON."""

from ddpm_jax.config.fields import (
    Checkpoint,
    Config,
    Data,
    Diffusion,
    Model,
    Natural,
    Optim,
    Parallel,
    Positive,
    Timesteps,
    Train,
    flatten,
    from_dict,
    load_config,
    shipped_configs,
    to_dict,
)

__all__ = [
    "Checkpoint",
    "Config",
    "Data",
    "Diffusion",
    "Model",
    "Natural",
    "Optim",
    "Parallel",
    "Positive",
    "Timesteps",
    "Train",
    "flatten",
    "from_dict",
    "load_config",
    "shipped_configs",
    "to_dict",
]
