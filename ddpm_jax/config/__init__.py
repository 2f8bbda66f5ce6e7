"""Configuration: frozen dataclasses that check themselves, strict to and from JSON."""

from etils import epy

# Lazily: the list of shipped configs is wanted where importing jax would cost time.
with epy.lazy_api_imports(globals()):
    from ddpm_jax.config.checked import Checked, Metavar, Range
    from ddpm_jax.config.choices import Format, SamplerName, ScheduleName, Split, Step, Weights
    from ddpm_jax.config.fields import (
        Beta,
        Checkpoint,
        Config,
        Data,
        Diffusion,
        Model,
        Natural,
        Optim,
        Parallel,
        Positive,
        Seed,
        Timesteps,
        Train,
    )
    from ddpm_jax.config.meaning import meanings, names_where, value_of
    from ddpm_jax.config.reading import changed, flatten, from_dict, load_config, to_dict
    from ddpm_jax.config.shipped import shipped_configs

__all__ = [
    "Beta",
    "Checked",
    "Checkpoint",
    "Config",
    "Data",
    "Diffusion",
    "Format",
    "Metavar",
    "Model",
    "Natural",
    "Optim",
    "Parallel",
    "Positive",
    "Range",
    "SamplerName",
    "ScheduleName",
    "Seed",
    "Split",
    "Step",
    "Timesteps",
    "Train",
    "Weights",
    "changed",
    "flatten",
    "from_dict",
    "load_config",
    "meanings",
    "names_where",
    "shipped_configs",
    "to_dict",
    "value_of",
]
