"""Checkpoints read back, whole or one part, from the newest that is not damaged."""

import logging
import math
import os
from typing import Any

import jax
from etils import epath

from ddpm_jax.errors import UserError, machine_remedy
from ddpm_jax.shapes import PyTree
from ddpm_jax.storage.apart import apart
from ddpm_jax.storage.checksum import checksums
from ddpm_jax.storage.files import path_of, read_table, refuse_pointer
from ddpm_jax.storage.orbax_log import demote_orbax_errors
from ddpm_jax.storage.plain_name import plain_name

log = logging.getLogger(__name__)
demote_orbax_errors()

# Words of errors that say nothing of the files' state: another try may read them.
NOT_DAMAGE = (
    "PERMISSION_DENIED",
    "UNAVAILABLE",
    "UNAUTHENTICATED",
    "DEADLINE_EXCEEDED",
    "RESOURCE_EXHAUSTED",
    "ABORTED",
)


def last_step(workdir: epath.PathLike) -> int:
    """The number of the run's newest checkpoint, which may be damaged; 0 before the first."""
    folder = folder_of(workdir)
    return max(_numbers(folder), default=0) if folder.is_dir() else 0


def steps_of(workdir: epath.PathLike) -> list[int]:
    """The steps of the run's checkpoints, ascending; some may be damaged."""
    folder = folder_of(workdir)
    return _steps(folder)[0] if folder.is_dir() else []


def newest_of(
    workdir: epath.PathLike, abstract_parts: dict
) -> tuple[int, dict, dict[int, Exception]] | None:
    """(step, parts, {step: its damage}) of the run's newest whole checkpoint; None without any.

    As `Checkpoints.restore`, but nothing is written.
    """
    folder = folder_of(workdir)
    steps, unreadable = _steps(folder) if folder.is_dir() else ([], [])
    if not steps:
        return None
    step, parts, damaged = _newest_whole(folder, steps, abstract_parts)
    damaged |= dict.fromkeys(unreadable, _Unusable("its metadata cannot be read"))
    return step, parts, damaged


def restore_part(
    workdir: epath.PathLike, name: str, abstract: PyTree, step: int | None = None
) -> tuple[int, PyTree]:
    """(step, part `name` of the run's checkpoint `step`), None for the newest that is not damaged.

    `abstract` is the part's tree of jax.ShapeDtypeStruct. Raises UserError if there is no such
    checkpoint, it does not fit, or it is damaged.
    """
    folder = folder_of(workdir)
    if not folder.exists():
        raise UserError(f"{workdir}: this run has no checkpoint yet")
    steps, _ = _steps(folder)
    if not steps:
        raise UserError(f"{workdir}: this run has no checkpoint yet")
    if step is not None and step not in steps:
        raise UserError(
            f"{workdir}: no checkpoint of step {step}; choose one of {', '.join(map(str, steps))}"
        )
    found, parts, damaged = _newest_whole(
        folder, steps if step is None else [step], {name: abstract}
    )
    for bad, reason in damaged.items():
        log.warning(
            "%s: damaged (%s), using checkpoint %d instead", folder / str(bad), reason, found
        )
    return found, parts[name]


def abstract_like(tree: PyTree, shardings: PyTree) -> PyTree:
    """jax.ShapeDtypeStructs of the arrays of `tree`, placed by `shardings`, a tree like it."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


class _Unusable(Exception):
    """A checkpoint is damaged, or is not of the shapes that are asked for."""


def orbax() -> Any:
    """Orbax, which takes half a second to import; a model from a file needs none of it."""
    from orbax.checkpoint import v1

    return v1


def folder_of(workdir: epath.PathLike) -> epath.Path:
    """`workdir`/checkpoints, as an absolute path."""
    path = path_of(workdir)
    # Orbax wants absolute paths; resolve() would take gs:// for a local folder's name.
    if "://" in str(path):
        return path / "checkpoints"
    # It also takes `..` for the folder before it in the path, which is wrong after a link.
    absolute = epath.Path(os.path.realpath(path)) if ".." in path.parts else path.resolve()
    return absolute / "checkpoints"


def _steps(folder: epath.Path) -> tuple[list[int], list[int]]:
    """(the steps in `folder`, those of them whose metadata Orbax cannot read)."""
    opened = plain_name(folder)
    try:
        checkpointer = apart(orbax().training.Checkpointer, opened)
    except Exception:  # Orbax reads the metadata of all before it lists any. Errors of many kinds.
        steps = _numbers(folder)
        return steps, [step for step in steps if not _is_readable(folder / str(step))]
    steps = [checkpoint.step for checkpoint in checkpointer.checkpoints]
    apart(checkpointer.close)
    return steps, []


def _numbers(folder: epath.Path) -> list[int]:
    names = [path.name for path in folder.iterdir() if path.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def _is_readable(path: epath.Path) -> bool:
    """Whether the metadata of the checkpoint are as Orbax writes them."""
    try:
        metadata = read_table(path / "_CHECKPOINT_METADATA")
    except UserError as error:
        if _may_be_whole(error):
            raise
        return False
    tables = ("metrics", "performance_metrics", "custom_metadata", "item_handlers")
    times = [metadata.get(f"{name}_timestamp_nsecs", 0) for name in ("init", "commit")]
    return all(isinstance(metadata.get(name), dict | None) for name in tables) and all(
        time is None or (isinstance(time, int) and 0 <= time < 2**63) for time in times
    )


def _newest_whole(folder, steps, abstract_parts):
    """(step, parts, {newer step: its damage}) of the newest of `steps` that can be used.

    All checkpoints of a run have the same shapes: where an older one fits, one that does not is
    damaged. Raises UserError if none can be used.
    """
    unusable: dict[int, _Unusable] = {}
    for step in reversed(steps):
        try:
            return step, _load(folder / str(step), abstract_parts), unusable
        except _Unusable as error:
            unusable[step] = error
    reasons = "; ".join(f"{step}: {reason}" for step, reason in unusable.items())
    raise UserError(
        f"{folder}: no checkpoint can be used ({reasons}); nothing was changed, so restore "
        "one from a copy"
    )


def _load(path, abstract_parts) -> dict:
    """The parts of one checkpoint.

    Raises _Unusable, or UserError if it may be whole but cannot be read now.
    """
    folder = plain_name(path.parent)
    try:
        for name, abstract in abstract_parts.items():
            saved = check_metadata(folder / path.name, name, abstract)
        parts = apart(orbax().load_checkpointables, folder / path.name, abstract_parts)
        wrong = [name for name, value in checksums(parts).items() if value != saved[name]]
    except Exception as error:  # Orbax raises errors of many kinds, of its own and of others.
        if _holds_pointers(path):
            raise UserError(
                f"{path}: holds git-lfs pointers, not the files themselves; "
                "run `git lfs pull` in its folder"
            ) from error
        if isinstance(error, _Unusable):
            raise
        reason = reason_of(error, folder, path.parent)
        if _may_be_whole(error) or any(word in reason for word in NOT_DAMAGE):
            raise UserError(
                f"{path}: cannot be read now ({reason}); fix that and try again"
            ) from error
        raise _Unusable(reason) from error
    if wrong:
        raise _Unusable(f"its checksum differs from the saved one: {', '.join(wrong)}")
    return parts


def _may_be_whole(error: BaseException | None) -> bool:
    """Whether `error` or a cause of it is not the files' fault: another try may read them."""
    at_fault = (MemoryError, PermissionError, jax.errors.JaxRuntimeError)
    while error is not None:
        if isinstance(error, at_fault) or machine_remedy(error) is not None:
            return True
        error = error.__cause__
    return False


def _holds_pointers(path) -> bool:
    """Whether git-lfs has left pointers in place of files of this checkpoint."""
    if "://" in str(path):
        return False
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                with open(os.path.join(folder, name), "rb") as file:
                    refuse_pointer(file.read(200))
            except ValueError:
                return True
            except OSError:
                continue
    return False


def check_metadata(path: epath.Path, part: str, abstract: PyTree) -> dict[str, int]:
    """The checksums of all parts. No memory is taken for arrays yet.

    Raises _Unusable if there are none or `part` is not like `abstract`.
    """
    metadata = apart(orbax().metadata, path, part)
    if metadata.metadata is None or not (metadata.custom_metadata or {}).get("checksums"):
        raise _Unusable("its metadata cannot be read")
    there, here = _named(metadata.metadata), _named(abstract)
    for name in sorted({*there, *here}):
        on_disk, wanted = (_describe(leaves.get(name)) for leaves in (there, here))
        if on_disk != wanted:
            raise _Unusable(f"{part} {name} is {on_disk}, but must be {wanted} by the run's config")
        pieces = there[name].storage_metadata
        if any(
            math.prod(shape or ()) > math.prod(there[name].shape)
            for shape in (pieces.chunk_shape, pieces.write_shape)
        ):
            raise _Unusable(f"{part} {name} is stored in pieces larger than itself")
    return metadata.custom_metadata["checksums"]


def _named(tree) -> dict:
    """{"1.0.count": leaf, ...}: the same for named tuples and for the lists in metadata."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _describe(leaf) -> str:
    return "not there" if leaf is None else f"{leaf.dtype} of shape {tuple(leaf.shape)}"


def reason_of(error: BaseException, opened: epath.Path, folder: epath.Path) -> str:
    """The innermost cause: Orbax puts the fault there, and speaks of its handlers itself.

    `folder` was opened under the name `opened`.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).partition("[tensorstore_spec")[0].partition("See full TensorStore")[0]
    words = " ".join(text.split()).replace(str(opened), str(folder)) or type(error).__name__
    if len(words) < 300:
        return words
    return f"{words[:140]} ... {words[-140:]}"  # The system's own words come last.
