"""One reader of the package, and how its files are made, damaged and read."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Reader:
    """`read` gets a folder with `valid` files that `edit` has damaged, and an rng for its choices.

    It returns a word for the result, and asserts that the result is plausible; it raises UserError
    where the package does.
    """

    name: str
    cases: int
    valid: Callable
    """rng -> {path: content}."""
    edit: Callable
    """(rng, files) -> files."""
    read: Callable
    """(folder, rng) -> "read", or another word for the result."""
    keeps: bool = True
    """Whether reading must leave the files as they are."""


def edit_one(edit, *names):
    """The edit of one file, any or one of `names`."""

    def edited(rng, files):
        name = rng.choice(names or sorted(files))
        return files | {name: edit(rng, files[name])}

    return edited


def files_of(folder):
    """{path: content} of all files below `folder`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
