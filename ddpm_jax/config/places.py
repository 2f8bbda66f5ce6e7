"""Where images come from, by name: npz:PATH and the like."""

FILE_SOURCES = {"folder": "PATH", "npz": "PATH", "npy": "PATH", "hf": "PATH", "tfds": "NAME"}
"""The kinds of places, and what follows their colon."""

READ_AS_NEEDED = {"folder", "npy", "hf", "tfds"}
"""Kinds whose images stay on the disk where they do not fit data.cache_mb."""

_NAMES = [f"{kind}:{rest}" for kind, rest in FILE_SOURCES.items()]

CHOICES = f"{', '.join(_NAMES[:-1])} or {_NAMES[-1]}"
"""All of them, for messages."""

METAVAR = "|".join(_NAMES)
"""All of them, as help names an option's value."""


def is_file_source(source: str) -> bool:
    """Whether `source` is one of these kinds with a path or name behind the colon."""
    kind, _, path = source.partition(":")
    return kind in FILE_SOURCES and bool(path)
