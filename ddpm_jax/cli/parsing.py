"""Options from arguments, by tyro; its boxed complaints become one line."""

import contextlib
import io
import re
from typing import Any, TypeVar

import tyro

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
                kind, args=args, prog=prog, config=(tyro.conf.PositionalRequiredArgs,), **given
            )
    except SystemExit as exit:
        if not exit.code:
            raise
        words = _one_line(complaint.getvalue()).removesuffix(f"{prog} --help").rstrip()
        raise UserError(f"{words}; see {prog} --help") from None


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
    # "Error parsing config.optim: optim.learning_rate: must be ..." names the option twice.
    return re.sub(r".*Error parsing \S+: ", "", words).rstrip(".")
