"""Numbers the classes of images by names: another folder of the same classes gets the same labels.

A folder alone numbers the classes that it holds. One that lacks a class would number those behind
it otherwise.
"""

import dataclasses
import hashlib

import numpy as np

from ddpm_jax.data.names import shown, some
from ddpm_jax.data.sources import Source
from ddpm_jax.errors import UserError
from ddpm_jax.shapes import Int


def numbered(source: Source, names: tuple[str, ...], place: str) -> Source:
    """`source` with labels that count in `names`; unchanged if `names` is empty.

    A source that does not know the names of its classes keeps its labels. Where labels change, so
    do the fingerprints. Raises UserError, which calls the source `place`, if it has images of a
    class that is not among `names`.
    """
    own = source.labels
    if not names or source.class_names is None or own is None:
        return source
    labels = _renumbered(own, source.class_names, names, place)
    source = dataclasses.replace(source, class_names=names)
    if np.array_equal(labels, own):
        return source
    return dataclasses.replace(
        source,
        labels=labels,
        fingerprint=_with_labels(source.fingerprint, labels),
        former={_with_labels(each, labels): why for each, why in source.former.items()},
    )


def numbered_words(names: tuple[str, ...]) -> str:
    """The names with their labels: "0 cat, 1 dog"."""
    return some([f"{label} {shown(name)}" for label, name in enumerate(names)])


def _renumbered(
    labels: Int[np.ndarray, " n"], own: tuple[str, ...], names: tuple[str, ...], place: str
) -> Int[np.ndarray, " n"]:
    """`labels`, which count in `own`, as numbers that count in `names`; -1 stays."""
    numbers = {name: number for number, name in enumerate(names)}
    found = [own[label] for label in np.unique(labels[labels >= 0])]
    unknown = [name for name in found if name not in numbers]
    if unknown:
        classes = "the class" if len(unknown) == 1 else "the classes"
        raise UserError(
            f"data: {shown(place)} has images of {classes} {_words(unknown)}, but the classes are "
            f"{_words(names)} (data.class_names); rename or remove those images' folder"
        )
    table = np.array([numbers.get(name, -1) for name in own], np.int32)
    return np.where(labels < 0, labels, table[labels]).astype(np.int32)


def _with_labels(fingerprint: str, labels: Int[np.ndarray, " n"]) -> str:
    digest = hashlib.blake2b(fingerprint.encode(), digest_size=16)
    digest.update(labels.tobytes())
    return digest.hexdigest()


def _words(names) -> str:
    return some([shown(name) for name in names])
