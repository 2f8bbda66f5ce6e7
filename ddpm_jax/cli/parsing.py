"""Options from arguments, by tyro; its boxed complaints become one line."""

import contextlib
import copy
import dataclasses
import io
import re
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import tyro

from ddpm_jax.config import Config, Metavar
from ddpm_jax.config.checked import marks_of
from ddpm_jax.errors import UserError

Options = TypeVar("Options")


def parse(
    kind: type[Options], args: list[str], prog: str, default: Options | None = None
) -> Options:
    """The dataclass `kind` that `args` describe, on top of `default` where there is one.

    `prog` is the command as the user typed it. Raises UserError for arguments that are not
    understood; --help prints the help and ends the program.
    """
    given: dict[str, Any] = {} if default is None else {"default": default}
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                _named(kind),
                args=with_values(with_numbers(args), kind),
                prog=prog,
                config=(tyro.conf.PositionalRequiredArgs,),
                **given,
            )
    except SystemExit as exit:
        if not exit.code:
            raise
        words = _one_line(complaint.getvalue()).removesuffix(f"{prog} --help").rstrip()
        raise UserError(f"{words}; see {prog} --help") from None


def with_numbers(args: list[str]) -> list[str]:
    """`args` with the numbers of `--data.values range 0 1` in one argument with their word."""
    complete: list[str] = []
    for arg in args:
        if complete[-2:-1] == ["--data.values"] and _is_number(arg):
            complete[-1] += f" {arg}"
        else:
            complete.append(arg)
    return complete


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def with_values(args: list[str], kind: type | None = None) -> list[str]:
    """`args` with the values True and False of switches that also take words, or None.

    --diffusion.clip alone is True, and --diffusion.no-clip False; tyro asks for a value. So it is
    with fields of the options `kind` that are bool or None.
    """
    own = get_type_hints(kind).items() if kind else ()
    undecided = [name.replace("_", "-") for name, hint in own if bool in get_args(hint)]
    ons = {f"--{name}" for name in (*_switches(), *undecided)}
    offs = {re.sub(r"(\w+)$", r"no-\1", on): on for on in ons}
    complete = []
    for i, arg in enumerate(args):
        if arg in offs:
            complete += [offs[arg], "False"]
            continue
        complete.append(arg)
        if arg in ons and (i + 1 == len(args) or args[i + 1].startswith("--")):
            complete.append("True")
    return complete


def _switches() -> list[str]:
    """The config's fields that are true, false or a word: diffusion.clip."""
    found = []
    for group, kind in get_type_hints(Config).items():
        hints = get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        for name, hint in hints.items():
            if bool in get_args(hint) and type(None) not in get_args(hint):
                found.append(f"{group}.{name}")
    return found


def _named(kind: type[Options]) -> type[Options]:
    """The dataclass `kind`, or a subclass of it in which each Metavar is tyro's own."""
    fields = []
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type] # all options are dataclasses
        for mark in marks_of(hints[field.name], Metavar):
            argument = tyro.conf.arg(metavar=mark.name)
            hint: Any = Annotated[hints[field.name], argument]
            fields.append((field.name, hint, copy.copy(field)))
    if not fields:
        return kind
    return dataclasses.make_dataclass(kind.__name__, fields, bases=(kind,), frozen=True)


def _one_line(box: str) -> str:
    """The words of tyro's box, whose frame is of lines or, on a plain terminal, of dashes."""
    rows = [row.strip(" │|") for row in box.splitlines()]
    rows = [
        row
        for row in rows
        if row.strip("─-╭╮╰╯ ") and not row.startswith(("╭", "For full helptext"))
    ]
    words = " ".join(rows)
    words = words.replace(" Perhaps you meant:", "; perhaps you meant")
    words = words.replace(" Argument helptext:", " for")
    words = re.sub(
        r"no type matching (.*) could be instantiated from \[(.*?)\]\. Got .* for (--\S+) .*",
        r"\3: must be \1, got \2",
        words,
    )
    words = re.sub(
        r"Could not find valid parse for arguments: \[(.*?)\] for (--\S+) (\[.*?\]\]) .*",
        r"\2: must be \3, got \1",
        words,
    )
    # The kind of a list, "[INT [INT ...]]", alone or in the place of None.
    words = re.sub(r"must be \{None\}\|\{?(.*?)\}?, got", r"must be None or \1, got", words)
    words = re.sub(r"\[(\w+) \[\1 \.\.\.\]\]", r"\1 \1 ..., with spaces between", words)
    words = re.sub(r".*Missing from .*: (\S+) .*\(required\)", r"\1 is missing", words)
    # "Error parsing config.optim: optim.learning_rate: must be ..." names the option twice.
    return re.sub(r".*Error parsing \S+: ", "", words).rstrip(".")
