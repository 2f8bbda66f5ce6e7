"""Finds the files of a data set of the datasets library, and of one of its splits."""

import re
from pathlib import Path
from typing import NamedTuple

from ddpm_jax.data.faults import reason_of
from ddpm_jax.data.names import shown, some
from ddpm_jax.errors import UserError

TRAIN = ("train",)
TEST = ("test", "validation", "valid", "val")
"""Splits of images to train on, and of others: the first that is there is taken."""


class Place(NamedTuple):
    """The files of one split."""

    title: str
    """As the user named it: hf:PATH."""
    root: Path
    """The folder or file that holds the whole data set."""
    saved: Path | None
    """A folder that save_to_disk wrote; None for files of parquet."""
    parquet: tuple[str, ...] = ()


def find(path: str, test: bool = False) -> Place:
    """The split `train` of the data set in `path`, or with `test` its test or validation split.

    A data set without splits is taken as a whole. PATH/SPLIT names a split. Raises UserError if
    there is no such data set or split.
    """
    root = Path(path).expanduser().absolute()
    wanted = TEST if test else TRAIN
    try:
        if not root.exists() and _is_set(root.parent):
            wanted = (root.name,)
            root = root.parent
        if root.is_file():
            return Place(f"hf:{path}", root, None, (str(root),))
        if (root / "state.json").is_file() and wanted in (TEST, TRAIN):
            return Place(f"hf:{path}", root, root)
        saved = {file.parent.name: file.parent for file in root.glob("*/state.json")}
        if saved:
            return Place(f"hf:{path}", root, saved[_chosen(path, saved, wanted)])
        files = sorted(file.relative_to(root).as_posix() for file in root.rglob("*.parquet"))
    except OSError as error:
        raise UserError(
            f"data: cannot read {shown(path)} ({reason_of(error)}); name another data set"
        ) from error
    if not files:
        there = "does not exist" if not root.exists() else "is no such data set"
        raise UserError(
            f"data: {shown(path)} {there}; name a folder that datasets.Dataset.save_to_disk wrote, "
            "or one with files of parquet"
        )
    chosen = _of_split(path, files, wanted)
    return Place(f"hf:{path}", root, None, tuple(str(root / file) for file in chosen))


def _is_set(folder: Path) -> bool:
    """Whether a folder holds a data set. It looks two folders deep and no deeper."""
    patterns = ("dataset_dict.json", "state.json", "*.parquet", "*/*.parquet")
    return any(next(folder.glob(pattern), None) for pattern in patterns)


def _chosen(path: str, splits, wanted: tuple[str, ...]) -> str:
    for split in wanted:
        if split in splits:
            return split
    there = some([shown(split) for split in sorted(splits)]) or "none"
    raise UserError(
        f"data: {shown(path)} has no split {' or '.join(map(shown, wanted))} (its splits: "
        f"{there}); name one of these as hf:PATH/SPLIT"
    )


def _of_split(path: str, files: list[str], wanted: tuple[str, ...]) -> list[str]:
    """Those of `files` that belong to a split, which stands in their names; all without splits."""
    by_split: dict[str, list[str]] = {}
    for split in (*TRAIN, *TEST, *wanted):
        # train-00000-of-00002.parquet, data/train.parquet, train/0000.parquet
        word = re.compile(rf"(^|[/_.-]){re.escape(split)}([/_.-]|$)")
        found = [file for file in files if word.search(file)]
        if found:
            by_split[split] = found
    if not by_split and wanted in (TEST, TRAIN):
        return files
    return by_split[_chosen(path, by_split, wanted)]
