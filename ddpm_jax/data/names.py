"""Names of files as they stand in messages and in hashes, whatever bytes they are made of."""

import os
from collections import Counter
from collections.abc import Sequence

from ddpm_jax.errors import printable


def name_bytes(name: str) -> bytes:
    """The bytes of a file's name; a name that is not UTF-8 gives those that it has on the disk."""
    return name.encode("utf-8", "surrogateescape")


def shown(name: str | os.PathLike) -> str:
    """`name` on one line that can be printed: other bytes and characters as escapes."""
    # Python has "\udce9" for the byte e9 of a name that is not UTF-8.
    letters = (
        f"\\x{ord(c) - 0xDC00:x}" if "\udc80" <= c <= "\udcff" else c for c in os.fspath(name)
    )
    return printable("".join(letters))


def some(items: Sequence[str], most: int = 10) -> str:
    """The first of `items`, and how many more there are."""
    more = len(items) - most
    return ", ".join(items[:most]) + (f" and {more} more" if more > 0 else "")


def ending(name: str) -> str:
    """Of a path with /, in lower case: ".png"; empty where the file's name has none."""
    stem, dot, last = name.rpartition("/")[2].rpartition(".")
    return dot + last.lower() if stem else ""


def endings(names: Sequence[str]) -> str:
    """How many of `names` have which ending, the most frequent first: "3 .zip, 2 .txt"."""
    counted = Counter(ending(name) or "without an ending" for name in names)
    return some([f"{n} {shown(last)}" for last, n in counted.most_common()], 5)
