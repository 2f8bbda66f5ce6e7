"""Configs read and written: strict to and from JSON, and from files that export one CONFIG."""

import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any

from ddpm_jax.config.fields import Config
from ddpm_jax.config.shipped import shipped_configs
from ddpm_jax.errors import UserError, shown


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested dicts that JSON can hold."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: dict[str, Any]) -> Config:
    """The config that `to_dict` gave; fields that are missing have their defaults.

    Raises UserError naming any unknown field, wrong type or bad value.
    """
    return _from_dict(Config, values, "")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim.learning_rate": ..., ...} of nested dicts."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def changed(before: Config, after: Config) -> set[str]:
    """The names of the fields that differ: {"train.steps"}."""
    old = flatten(to_dict(before))
    return {name for name, value in flatten(to_dict(after)).items() if old[name] != value}


def load_config(name: str) -> Config:
    """The CONFIG of a shipped config (`digits`) or of a file (`configs/digits.py`).

    The file is executed. Raises UserError if the file is missing or exports no Config named CONFIG.
    """
    shipped = shipped_configs()
    path = shipped.get(name, Path(name))
    if not path.is_file():
        raise UserError(
            f"config: {name!r} is not a file or a shipped config; the shipped ones are "
            f"{', '.join(shipped)}"
        )
    try:
        config = runpy.run_path(str(path)).get("CONFIG")
    except UserError:
        raise
    except Exception as error:  # The user's own code can raise anything.
        raise UserError(
            f"config: {path} cannot be loaded ({type(error).__name__}: {error}); fix it"
        ) from error
    if not isinstance(config, Config):
        raise UserError(f"config: {path} must define CONFIG = Config(...)")
    return config


def _from_dict(kind, values, prefix):
    if not isinstance(values, dict):
        label = prefix.rstrip(".") or "config"
        raise UserError(f"{label}: must be a table of fields, got {shown(values)}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            raise UserError(f"{prefix}{name:.80}: unknown field; choose one of {', '.join(fields)}")
    converted = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(fields[name].type):
            value = _from_dict(fields[name].type, value, f"{prefix}{name}.")
        converted[name] = tuple(value) if isinstance(value, list) else value
    return kind(**converted)
