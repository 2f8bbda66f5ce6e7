"""Dataclasses whose fields are checked against their annotations when an instance is made."""

import dataclasses
import functools
import math
import types
import typing
from typing import Annotated, Any, ClassVar, Literal

from ddpm_jax.errors import UserError, shown


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number, or of each number of a tuple; `above` and `below` are exclusive."""

    min: float = -math.inf
    max: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, number: float) -> bool:
        return self.min <= number <= self.max and self.above < number < self.below

    def __str__(self) -> str:
        words = {"min": "at least", "max": "at most", "above": "above", "below": "below"}
        bounds = [f"{word} {getattr(self, name)}" for name, word in words.items()]
        return " and ".join(bound for bound in bounds if "inf" not in bound)


@dataclasses.dataclass(frozen=True)
class Metavar:
    """The name that help gives to a field's value: RUN, PATH."""

    name: str


class Checked:
    """Checks every field's type and range when the dataclass is made; raises UserError naming it.

    A field's range stands in its annotation: Annotated[int, Range(min=1)]. A subclass that is not
    a group of the config sets `GROUP` to what stands before its fields' names.
    """

    GROUP: ClassVar[str | None] = None
    LONGEST: ClassVar[int] = 16
    """Entries of a tuple: a network has a handful of levels, and each halves the image."""

    def __post_init__(self) -> None:
        group = f"{type(self).__name__.lower()}." if self.GROUP is None else self.GROUP
        hints = _hints_of(type(self))  # type: ignore[arg-type] # a class has a hash
        for field in dataclasses.fields(self):  # type: ignore[arg-type] # every subclass is one
            value = getattr(self, field.name)
            if isinstance(value, tuple) and len(value) > self.LONGEST:
                raise UserError(
                    f"{group}{field.name}: must have at most {self.LONGEST} entries, "
                    f"got {len(value)}"
                )
            _check(group + field.name, value, hints[field.name])


@functools.cache
def _hints_of(kind: type) -> dict[str, Any]:
    """The annotations of a class, which take long to evaluate."""
    return typing.get_type_hints(kind, include_extras=True)


def marks_of(hint: Any, kind: type) -> list:
    """The values of type `kind` that the annotation `hint` carries beside the type."""
    if typing.get_origin(hint) is not Annotated:
        return []
    return [mark for mark in hint.__metadata__ if isinstance(mark, kind)]


def _check(label: str, value, hint, bounds: Range | None = None) -> None:
    for mark in marks_of(hint, Range):
        bounds = mark
    if typing.get_origin(hint) is Annotated:
        hint = hint.__origin__
    options = typing.get_args(hint)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        if value is None and type(None) in options:
            return
        if bool in options:
            _check_switch(label, value, options)
            return
        _check(label, value, _first_that_fits(value, options), bounds)
    elif typing.get_origin(hint) is Literal:
        if value not in options:
            raise UserError(f"{label}: must be one of {', '.join(options)}, got {shown(value)}")
    elif typing.get_origin(hint) is tuple:
        size = None if options[-1] is Ellipsis else len(options)
        if not isinstance(value, tuple) or (size is not None and len(value) != size):
            numbers = "texts" if options[0] is str else "numbers"
            if size:
                numbers = f"{size} {numbers}"
            raise UserError(f"{label}: must be a tuple of {numbers}, got {shown(value)}")
        for item in value:
            _check(label, item, options[0], bounds)
    else:
        _check_one(label, value, hint, bounds)


def _check_switch(label: str, value, options) -> None:
    """A field that is true, false or one of a few words."""
    words = [word for each in options for word in typing.get_args(each)]
    if not isinstance(value, bool) and (not isinstance(value, str) or value not in words):
        raise UserError(f"{label}: must be True, False or {' or '.join(words)}, got {shown(value)}")


def _first_that_fits(value, options):
    """The part of a union that `value` is checked against.

    Several lists of choices are one; beside a type, choices are for texts.
    """
    choices = [each for each in options if typing.get_origin(each) is Literal]
    others = [each for each in options if each not in choices and each is not type(None)]
    if choices and (not others or isinstance(value, str)):
        return Literal[tuple(name for each in choices for name in typing.get_args(each))]
    return others[0]


def _check_one(label: str, value, kind: type, bounds: Range | None) -> None:
    # bool is an int to Python, and nobody means one by the other. An int for a float is fine.
    accepted: Any = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{label}: must be of type {kind.__name__}, got {shown(value)}")
    if bounds is not None and value not in bounds:
        raise UserError(f"{label}: must be {bounds}, got {shown(value)}")
    if isinstance(value, int | float) and not abs(value) < 2.0**63:  # nan is not, either.
        raise UserError(f"{label}: must be a number below 2**63, got {shown(value)}")
