"""What a run keeps of its images, to name one that differs when they are no longer the same."""

from collections.abc import Mapping

import numpy as np

from ddpm_jax.data.names import name_bytes, shown
from ddpm_jax.data.sources import Source

SEPARATOR = b"\0"
"""No file's name has it."""


def record(source: Source) -> dict[str, np.ndarray]:
    """The names of the images, and 32 bits of a hash of each: arrays for an npz file.

    Empty for a source that does not know its images one by one.
    """
    if source.marks is None:
        return {}
    names = SEPARATOR.join(name_bytes(name) for name in source.names)
    return {"names": np.frombuffer(names, np.uint8), "marks": source.marks()}


def differences(before: Mapping[str, np.ndarray], source: Source) -> list[str]:
    """How the images differ from those of a record, each kind with one image by name.

    Empty if that is not known.
    """
    names, marks = (np.asarray(before.get(name)) for name in ("names", "marks"))
    known = (names.dtype, names.ndim, marks.dtype, marks.ndim) == (np.uint8, 1, np.uint32, 1)
    if source.marks is None or not known:
        return []
    was = dict(zip(_names(names), marks.tolist(), strict=False))
    now = dict(zip(source.names, source.marks().tolist(), strict=True))
    changed = [
        f"{shown(name)} has changed" for name in now if was.get(name, now[name]) != now[name]
    ]
    gone = {was[name]: name for name in was if name not in now}
    new = [name for name in now if name not in was]
    renamed = [
        f"{shown(name)} was called {shown(gone.pop(now[name]))}"
        for name in new
        if now[name] in gone
    ]
    if renamed:
        return [*_first(changed), *_first(renamed)]
    return [
        *_first(changed),
        *_first([f"{shown(name)} is new" for name in new]),
        *_first([f"{shown(name)} is gone" for name in gone.values()]),
    ]


def _names(joined: np.ndarray) -> list[str]:
    return joined.tobytes().decode("utf-8", "surrogateescape").split(SEPARATOR.decode())


def _first(of_a_kind: list[str]) -> list[str]:
    more = len(of_a_kind) - 1
    return [text + (f", as {more} more" if more else "") for text in of_a_kind[:1]]
