"""Checkpoints on disk, as a run that trains saves them. Orbax is known here and in restore.py.

A checkpoint is a folder `checkpoints/STEP` with one part for each field of the training state, so
that reading the weights does not touch the optimiser's. With it a checksum of each part is saved.
"""

import contextlib
import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from ddpm_jax.devices.processes import is_first, wait_for_all
from ddpm_jax.errors import UserError
from ddpm_jax.shapes import PyTree
from ddpm_jax.storage.apart import apart
from ddpm_jax.storage.checksum import checksums
from ddpm_jax.storage.files import writing
from ddpm_jax.storage.plain_name import plain_name
from ddpm_jax.storage.restore import check_metadata, folder_of, newest_of, orbax, reason_of

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a run that trains, saved in the background; `close` waits for the last.

    A checkpoint that cannot be saved is reported as UserError by the next call, once.
    """

    def __init__(self, workdir: epath.PathLike, keep: int):
        """Opens `workdir`/checkpoints, made if missing; the `keep` newest stay, and `best`."""
        self.folder = folder_of(workdir)
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
                    orbax().training.Checkpointer,
                    self._opened,
                    preservation_policy=self,
                    cleanup_tmp_directories=True,
                )
        except UserError:
            raise
        except Exception as error:  # Orbax raises errors of many kinds, of its own and of others.
            raise UserError(
                f"{self.folder}: cannot be opened ({reason_of(error, self._opened, self.folder)}); "
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
                check_metadata(self._opened / str(step), name, abstract)
        except Exception as error:  # Orbax raises errors of many kinds, of its own and of others.
            reason = reason_of(error, self._opened, self.folder)
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
                f"({reason_of(error, self._opened, self.folder)}); {good}"
            ) from error


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _set_aside(path) -> str:
    number = 1
    aside = path.parent / f"{path.name}.damaged"
    while aside.exists():
        number += 1
        aside = path.parent / f"{path.name}.damaged-{number}"
    if is_first():
        path.rename(aside)
    return aside.name
