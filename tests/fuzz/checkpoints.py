"""Damaged checkpoints: files edited, removed, emptied, swapped, and stray ones beside them."""

import functools
import zipfile

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.storage.checkpoint import Checkpoints
from ddpm_jax.storage.restore import abstract_like, restore_part
from fuzz.arrays import RUN
from fuzz.edits import edit_bytes
from fuzz.json_edits import edit_json
from fuzz.models import read_model
from fuzz.reader import Reader, edit_one, files_of

STEPS = (3, 6)


@functools.cache
def _parts(step):
    noise = np.random.default_rng(step)
    return {
        "params": {
            "a": jnp.asarray(noise.normal(size=(5, 3)), jnp.float32),
            "b": {"c": jnp.asarray(noise.normal(size=7), jnp.bfloat16)},
        },
        "step": jnp.int32(step),
    }


@functools.cache
def _abstract():
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    parts = _parts(STEPS[0])
    return abstract_like(parts, jax.tree.map(lambda _: one, parts))


@functools.cache
def _saved():
    """Both, saved once: a new save has other names of files and times in it, and so other cases."""
    with zipfile.ZipFile(RUN.parent / "two_checkpoints.zip") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@functools.cache
def _run():
    return files_of(RUN)


def _edit_files(rng, files):
    """One to three files of the checkpoints edited, removed, emptied, swapped or put elsewhere."""
    files = dict(files)
    for _ in range(rng.choice((1, 1, 1, 3))):
        name = rng.choice([name for name in sorted(files) if name.startswith("checkpoints/")])
        other = rng.choice(sorted(files))
        action = rng.randrange(12)
        if action == 0:
            del files[name]
        elif action == 1:
            files[name] = b""
        elif action == 2:
            files[name], files[other] = files[other], files[name]
        elif action == 3:
            part = name.rsplit("/", 1)[0]
            files = {path: files[path] for path in files if not path.startswith(part + "/")}
        elif action == 4:
            files[rng.choice((f"{name}.x", "checkpoints/9/x", "checkpoints/abc/x"))] = b"x"
        elif files[name][:1] == b"{" and action < 9:
            files[name] = edit_json(rng, files[name])
        else:
            files[name] = edit_bytes(rng, files[name])
        if not any(name.startswith("checkpoints/") for name in files):
            break
    return files


def _whole(found):
    """The step whose saved arrays are bit for bit those in `found`."""
    for step in STEPS:
        saved = {name: _parts(step)[name] for name in found}
        same = jax.tree.map(lambda a, b: np.array_equal(a, b) and a.dtype == b.dtype, found, saved)
        if all(jax.tree.leaves(same)):
            return step
    raise AssertionError("a damaged checkpoint was taken for a whole one")


def _read_part(folder, rng):
    step, params = restore_part(folder, "params", _abstract()["params"])
    assert _whole({"params": params}) == step, "the arrays are another step's"
    return f"step {step}"


def _resume(folder, rng):
    """As training does, which puts damaged checkpoints aside."""
    checkpoints = Checkpoints(folder, keep=2)
    try:
        parts = checkpoints.restore(_abstract())
        return "none there" if parts is None else f"step {_whole(parts)}"
    finally:
        checkpoints.close()


READERS = [
    Reader("checkpoint", 150, lambda rng: _saved(), _edit_files, _read_part),
    Reader("resumed checkpoint", 100, lambda rng: _saved(), _edit_files, _resume, keeps=False),
    Reader(
        "config of a run",
        150,
        lambda rng: _run(),
        edit_one(edit_json, "config.json"),
        lambda folder, rng: read_model(folder),
    ),
    Reader(
        "run",
        60,
        lambda rng: _run(),
        _edit_files,
        lambda folder, rng: read_model(folder),
    ),
]
