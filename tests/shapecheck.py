"""Checks annotated shapes and dtypes at every call; conftest.py applies it to the mathematics."""

import types
from typing import Literal, Union, get_args, get_origin

from beartype import BeartypeConf, beartype

# An int is a float to mypy and to people.
TOWER = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function):
    """As beartype, but without names of a Literal: the functions refuse unknown ones themselves."""
    for argument, hint in function.__annotations__.items():
        function.__annotations__[argument] = _without_names(hint)
    return TOWER(function)


def _without_names(hint):
    """The hint with str in the place of a Literal, which may be one of several types."""
    if get_origin(hint) is Literal:
        return str
    if get_origin(hint) in (Union, types.UnionType):
        return Union[tuple(_without_names(each) for each in get_args(hint))]  # noqa: UP007
    return hint
