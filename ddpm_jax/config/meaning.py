"""What each field of the config decides, said once, in the field's own annotation."""

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

from ddpm_jax.config.checked import marks_of


@dataclasses.dataclass(frozen=True)
class Meaning:
    """What a field decides; every field of the config carries one."""

    resume: bool
    """Whether it may differ when a run resumes: it changes nothing of what is learned."""
    network: bool = False
    """Whether it decides which parameters there are, or what the network's output stands for."""
    images: bool = False
    """Whether it decides, beside the parameters, which image a key gives."""
    through_betas: bool = False
    """Whether it does so through the betas alone, which are compared themselves."""
    place: bool = False
    """Whether it names a place on this machine, which is nobody else's business."""
    compiled: bool = True
    """Whether a compiled program may read it: two models that differ in it share no program."""


LEARNING = Meaning(resume=False)
NETWORK = Meaning(resume=False, network=True)
IMAGES = Meaning(resume=False, images=True)
BETAS = Meaning(resume=False, images=True, through_betas=True)
NETWORK_AND_IMAGES = Meaning(resume=False, network=True, images=True)
FREE = Meaning(resume=True)
# The loop around the programs reads it, and they do not: how long, how often, from where.
AROUND = Meaning(resume=True, compiled=False)
# The data may have moved: their fingerprint is compared when a run resumes.
PLACE = Meaning(resume=True, place=True, compiled=False)


def meanings(kind: type, prefix: str = "") -> dict[str, Meaning]:
    """{"model.dropout": its Meaning, ...} of all fields of the config class `kind`.

    Raises TypeError for a field that carries none.
    """
    found: dict[str, Meaning] = {}
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        name = prefix + field.name
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            found |= meanings(hint, f"{name}.")
            continue
        marks = marks_of(hint, Meaning)
        if len(marks) != 1:
            raise TypeError(f"{name}: say what the field decides, one Meaning in its annotation")
        found[name] = marks[0]
    return found


def names_where(kind: type, holds: Callable[[Meaning], bool]) -> list[str]:
    """The names of the fields of `kind` whose Meaning `holds`, in the order of the fields."""
    return [name for name, meaning in meanings(kind).items() if holds(meaning)]


def value_of(config: Any, name: str) -> Any:
    """The value of the field called "model.dropout" or the like."""
    for part in name.split("."):
        config = getattr(config, part)
    return config
