"""HTML from Python values. All text is escaped; only `Html` goes through as it is."""

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

VOID = {"img", "input"}
"""Elements that have no end."""


class Html(str):
    """Text that is HTML already."""


def text(value: object) -> Html:
    """`value` as HTML: itself if it is Html, else its text, escaped; nothing of None."""
    if isinstance(value, Html):
        return value
    return Html("" if value is None else html.escape(str(value)))


def join(parts: Iterable[object]) -> Html:
    """The parts one after another."""
    return Html("".join(text(part) for part in parts))


def tag(name: str, *children: object, **attributes: object) -> Html:
    """An element. An attribute of True stands alone, and one of None or False is left out.

    Names are written with _ for -, and with _ at the end where they are words of Python: class_.
    """
    written = "".join(_attribute(name, value) for name, value in attributes.items())
    if name in VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def _attribute(name: str, value: object) -> str:
    name = name.rstrip("_").replace("_", "-")
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{html.escape(str(value))}"'


def table(
    caption: str, head: Sequence[object], rows: Iterable[Sequence[object]], kind: str = ""
) -> Html:
    """A table; the first cell of each row names the row. It scrolls by itself where it is wide."""
    top = tag("tr", *(tag("th", cell, scope="col") for cell in head)) if head else ""
    body = (
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in rows
    )
    inside = tag(
        "table",
        tag("caption", caption),
        tag("thead", top) if head else "",
        tag("tbody", *body),
        class_=kind or None,
    )
    return tag("div", inside, class_="scroll", role="region", aria_label=caption, tabindex="0")


def command(words: str) -> Html:
    """A command to copy."""
    return tag("pre", tag("code", words), class_="command", tabindex="0")


def details(summary: object, *children: object, **attributes: object) -> Html:
    """Something that is folded away until it is opened."""
    return tag("details", tag("summary", summary), *children, **attributes)


def data(value: Any) -> str:
    """`value` as JSON that can stand in a script element.

    Without <, > and &, no text in it can end the element; other characters are ASCII.
    """
    content = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for letter in "<>&":
        content = content.replace(letter, f"\\u{ord(letter):04x}")
    return content
