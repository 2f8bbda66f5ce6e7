"""Checkpoints on disk: the only place that knows Orbax.

A checkpoint is a folder `checkpoints/STEP` with one part for each field of the training state, so
that reading the weights does not touch the optimiser's. With it a checksum of each part is saved.
"""

import contextlib
import functools
import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from ddpm_jax.devices.processes import is_first, wait_for_all
from ddpm_jax.errors import UserError, machine_remedy
from ddpm_jax.shapes import PyTree
from ddpm_jax.storage.apart import apart
from ddpm_jax.storage.checksum import checksums
from ddpm_jax.storage.files import path_of, read_table, refuse_pointer, writing
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


class Checkpoints:
    """The checkpoints of a run that trains, saved in the background; `close` waits for the last.

    A checkpoint that cannot be saved is reported as UserError by the next call, once.
    """

    def __init__(self, workdir: epath.PathLike, keep: int):
        """Opens `workdir`/checkpoints, made if missing; the `keep` newest stay, and `best`."""
        self.folder = _folder(workdir)
        self._failed = False
        self._saved: tuple[int, dict] | None = None
        self._proven = False
        self._keep = keep
        self.best: int | None = None
        """A step that stays however old it is; to be set by whoever finds that it is the best."""
        with writing(self.folder):
            if "://" not in str(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            self._opened = plain_name(self.folder)

    @functools.cached_property
    def _checkpointer(self):
        """Opened at first use, once `restore` has set damaged checkpoints aside."""
        try:
            with writing(self.folder):
                return apart(
                    _orbax().training.Checkpointer,
                    self._opened,
                    preservation_policy=self,
                    cleanup_tmp_directories=True,
                )
        except UserError:
            raise
        except Exception as error:  # Orbax raises errors of many kinds, of its own and of others.
            raise UserError(
                f"{self.folder}: cannot be opened ({_reason(error, self._opened, self.folder)}); "
                "move what is damaged away"
            ) from error

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        """Which of the `checkpoints`, in the order of their steps, stay: Orbax asks at each save.

        The others are deleted once the new one is complete.
        """
        newest = len(checkpoints) - self._keep
        return [i >= newest or each.step == self.best for i, each in enumerate(checkpoints)]

    @property
    def latest_step(self) -> int | None:
        """The newest step, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, parts: dict) -> None:
        """Starts to save `parts`, a dict of pytrees, as `step`; an existing step is kept."""
        if step == self.latest_step:
            return
        if self._saved is not None and not self._proven:
            self.wait()  # Orbax would wait too, and may delete the older checkpoint then.
        about = {"checksums": checksums(parts)}
        with self._reported():
            apart(
                self._checkpointer.save_checkpointables_async,
                step,
                parts,
                force=True,
                custom_metadata=about,
            )
        if not self._proven and self._saved is None:
            self._saved = step, {name: _shapes(part) for name, part in parts.items()}

    def restore(self, abstract_parts: dict) -> dict | None:
        """The parts of the newest whole checkpoint, or None before the first one.

        They are placed as the ShapeDtypeStructs of `abstract_parts` say. Damaged checkpoints are
        reported and renamed to STEP.damaged, which makes room for the step when it is reached
        again. Raises UserError if all are damaged, or one does not fit.
        """
        found = newest_of(self.folder.parent, abstract_parts)
        if found is None:
            return None
        step, parts, damaged = found
        wait_for_all("restored")  # All have read before one renames.
        for bad, reason in damaged.items():
            aside = _set_aside(self.folder / str(bad))
            log.warning(
                "checkpoint %d is damaged (%s): renamed to %s, resuming from checkpoint %d",
                bad,
                reason,
                aside,
                step,
            )
        wait_for_all("set aside")
        return parts

    def check(self) -> None:
        """Raises UserError if the last checkpoint could not be saved; does not wait."""
        if not self._checkpointer.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits for the save in progress, if any."""
        with self._reported():
            apart(self._checkpointer.wait)
        self._prove()

    def close(self) -> None:
        """Waits for the save in progress, deletes what need not stay, and ends."""
        if "_checkpointer" not in vars(self):  # Never opened: all that is there is damaged.
            return
        with self._reported():
            try:
                self._delete_former_best()
            finally:
                apart(self._checkpointer.close)
        self._prove()

    def _delete_former_best(self) -> None:
        """A checkpoint can turn out to be the best after it was saved, with no save to follow."""
        if self.best is None or self._failed:
            return
        apart(self._checkpointer.wait)
        there = self._checkpointer.checkpoints
        if self.best not in [each.step for each in there]:
            return
        stays = self.should_preserve(there, context=None)
        for each, stay in zip(there, stays, strict=True):
            if not stay:
                apart(self._checkpointer.delete, each.step)

    def _prove(self) -> None:
        """Looks once for the first checkpoint that was saved, and reads all but its arrays.

        A folder that takes files and does not give them back must not cost a whole training.
        Raises UserError if the checkpoint is not found as it was saved.
        """
        if self._proven or self._saved is None or self._failed:
            return
        self._proven = True
        step, shapes = self._saved
        if not is_first():
            return
        try:
            for name, abstract in shapes.items():
                _check_metadata(self._opened / str(step), name, abstract)
        except Exception as error:  # Orbax raises errors of many kinds, of its own and of others.
            reason = _reason(error, self._opened, self.folder)
            raise UserError(
                f"{self.folder / str(step)}: was saved, but cannot be read back ({reason}); "
                "choose a --workdir on another disk"
            ) from error

    @contextlib.contextmanager
    def _reported(self):
        """Turns what Orbax raises into one line; after that nothing more is raised."""
        try:
            yield
        except Exception as error:
            if self._failed:
                return
            self._failed = True
            last = self.latest_step
            good = (
                "there is no checkpoint yet"
                if last is None
                else f"the last good checkpoint is {last}"
            )
            raise UserError(
                f"{self.folder}: a checkpoint cannot be saved "
                f"({_reason(error, self._opened, self.folder)}); {good}"
            ) from error


def last_step(workdir: epath.PathLike) -> int:
    """The number of the run's newest checkpoint, which may be damaged; 0 before the first."""
    folder = _folder(workdir)
    return max(_numbers(folder), default=0) if folder.is_dir() else 0


def steps_of(workdir: epath.PathLike) -> list[int]:
    """The steps of the run's checkpoints, ascending; some may be damaged."""
    folder = _folder(workdir)
    return _steps(folder)[0] if folder.is_dir() else []


def newest_of(
    workdir: epath.PathLike, abstract_parts: dict
) -> tuple[int, dict, dict[int, Exception]] | None:
    """(step, parts, {step: its damage}) of the run's newest whole checkpoint; None without any.

    As `Checkpoints.restore`, but nothing is written.
    """
    folder = _folder(workdir)
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
    folder = _folder(workdir)
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


def _orbax() -> Any:
    """Orbax, which takes half a second to import; a model from a file needs none of it."""
    from orbax.checkpoint import v1

    return v1


def _folder(workdir: epath.PathLike) -> epath.Path:
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
        checkpointer = apart(_orbax().training.Checkpointer, opened)
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
            saved = _check_metadata(folder / path.name, name, abstract)
        parts = apart(_orbax().load_checkpointables, folder / path.name, abstract_parts)
        wrong = [name for name, value in checksums(parts).items() if value != saved[name]]
    except Exception as error:  # Orbax raises errors of many kinds, of its own and of others.
        if _holds_pointers(path):
            raise UserError(
                f"{path}: holds git-lfs pointers, not the files themselves; "
                "run `git lfs pull` in its folder"
            ) from error
        if isinstance(error, _Unusable):
            raise
        reason = _reason(error, folder, path.parent)
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


def _check_metadata(path, part: str, abstract) -> dict[str, int]:
    """The checksums of all parts. No memory is taken for arrays yet.

    Raises _Unusable if there are none or `part` is not like `abstract`.
    """
    metadata = apart(_orbax().metadata, path, part)
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


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _named(tree) -> dict:
    """{"1.0.count": leaf, ...}: the same for named tuples and for the lists in metadata."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _describe(leaf) -> str:
    return "not there" if leaf is None else f"{leaf.dtype} of shape {tuple(leaf.shape)}"


def _set_aside(path) -> str:
    number = 1
    aside = path.parent / f"{path.name}.damaged"
    while aside.exists():
        number += 1
        aside = path.parent / f"{path.name}.damaged-{number}"
    if is_first():
        path.rename(aside)
    return aside.name


def _reason(error: BaseException, opened: epath.Path, folder: epath.Path) -> str:
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
