"""Checkpoints on disk: the only place that knows Orbax.

A checkpoint is a folder `checkpoints/STEP` with one part for each field of the training state, so
that reading the weights does not touch the optimiser's.
"""

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from ddpm_jax.errors import UserError
from ddpm_jax.files import path_of


class Checkpoints:
    """The checkpoints of a run that trains. Saving goes on in the background; `close` waits for it."""

    def __init__(self, workdir: epath.PathLike, keep: int):
        """Opens `workdir`/checkpoints, made if missing, of which the `keep` newest stay."""
        self.folder = _folder(workdir)
        self._checkpointer = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest_step(self) -> int | None:
        """The newest step, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, parts: dict) -> None:
        """Starts to save `parts`, a dict of pytrees, as `step`; a step that is there already stays."""
        if step != self.latest_step:
            self._checkpointer.save_checkpointables_async(step, parts, force=True)

    def restore(self, step: int, abstract_parts: dict) -> dict:
        """The parts of `step`, placed as the ShapeDtypeStructs of `abstract_parts` say."""
        return _load(self._checkpointer, self.folder, step, abstract_parts)

    def wait(self) -> None:
        """Waits for what is being saved."""
        self._checkpointer.wait()

    def close(self) -> None:
        """Waits for what is being saved, and ends."""
        self._checkpointer.close()


def restore_part(workdir: epath.PathLike, name: str, abstract, step: int | None = None):
    """(step, part `name` of the run's checkpoint `step`), None for the newest.

    `abstract` is the part's tree of jax.ShapeDtypeStruct. Raises UserError if there is no such
    checkpoint or it does not fit.
    """
    folder = _folder(workdir)
    if not folder.exists():
        raise UserError(f"{workdir}: there is no checkpoint in this run yet")
    checkpointer = ocp.training.Checkpointer(folder)
    try:
        steps = [checkpoint.step for checkpoint in checkpointer.checkpoints]
        if not steps:
            raise UserError(f"{workdir}: there is no checkpoint in this run yet")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise UserError(f"{workdir}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
        return step, _load(checkpointer, folder, step, {name: abstract})[name]
    finally:
        checkpointer.close()


def abstract_like(tree, shardings):
    """jax.ShapeDtypeStructs of `tree` (arrays or the like), to be placed by `shardings`, a tree like it."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )


def _folder(workdir: epath.PathLike) -> epath.Path:
    path = path_of(workdir)
    # Orbax wants absolute paths; resolve() would take gs:// for a local folder's name.
    return (path if "://" in str(path) else path.resolve()) / "checkpoints"


def _load(checkpointer, folder, step, abstract_parts):
    try:
        return checkpointer.load_checkpointables(step, abstract_parts)
    except Exception as error:
        # Orbax puts what does not fit into the cause; what it raises itself speaks of its handlers.
        reason = str(error.__cause__ or error).replace("\n", " ")
        raise UserError(f"{folder / str(step)}: this checkpoint cannot be read: {reason:.300}") from error
