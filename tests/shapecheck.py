"""Checks annotated shapes and dtypes at every call; conftest.py applies it to the mathematics."""

from typing import Literal, get_origin

from beartype import BeartypeConf, beartype

# An int is a float to mypy and to people.
TOWER = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function):
    """As beartype, but without names of a Literal: the functions refuse unknown ones themselves."""
    for argument, hint in function.__annotations__.items():
        if get_origin(hint) is Literal:
            function.__annotations__[argument] = str
    return TOWER(function)
