"""The run directory: the config, a record of the data and each start, and the weights.

config.json    the config of the latest start
run.json       the data's fingerprint; versions, devices, XLA flags and PRNG of each start
data.npz       names and hashes of the images
metrics.jsonl  one line per tick
.lock          which process trains here now
checkpoints/   see checkpoint.py
samples/, samples.png, tensorboard/
likelihood/    see evaluation/bound.py
calibration.npz, tuned.json   what was measured of the weights, see measured.py
evaluation/    see evaluation/evaluate.py
figures/       see figures/
"""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ddpm_jax.config import Config, Weights, flatten, from_dict, names_where, to_dict
from ddpm_jax.data import Source, record
from ddpm_jax.data.class_names import numbered_words
from ddpm_jax.ddpm import DDPM
from ddpm_jax.devices.mesh import replicated
from ddpm_jax.devices.processes import is_first, wait_for_all
from ddpm_jax.errors import UserError
from ddpm_jax.keys import seed_key
from ddpm_jax.shapes import PyTree
from ddpm_jax.storage import restore
from ddpm_jax.storage.files import locked, npz, path_of, read_npz, read_table, write_file

log = logging.getLogger(__name__)

PACKAGES = ("ddpm-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pillow")
"""The packages that a result depends on."""


def load_checkpoint(
    path: epath.PathLike,
    *,
    weights: Weights = "ema",
    step: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[int, DDPM, PyTree]:
    """(step, ddpm, params) of the run directory `path`: the `ema` or `raw` weights of `step`.

    `ema` is the average. `step` None is the newest checkpoint. params are on each device of `mesh`,
    or on the default device. Raises UserError if `path` is not a run or has no such checkpoint.
    """
    part = {"ema": "ema_params", "raw": "params"}[weights]
    ddpm = DDPM(read_config(path))
    sharding: jax.sharding.Sharding
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if mesh is not None:
        sharding = replicated(mesh)
    shardings = jax.tree.map(lambda _: sharding, ddpm.shapes)
    abstract = restore.abstract_like(ddpm.shapes, shardings)
    step, params = restore.restore_part(path, part, abstract, step)
    return step, ddpm, params


def is_run(path: epath.PathLike) -> bool:
    """Whether `path` is a run directory, damaged or not."""
    file = path_of(path) / "config.json"
    # A folder of the diffusers library has a config.json too, with a class name in it.
    return file.exists() and b'"_class_name"' not in file.read_bytes()


def read_config(path: epath.PathLike) -> Config:
    """The config of the run directory `path`.

    Raises UserError if `path` is not a run directory or its config is damaged.
    """
    file = path_of(path) / "config.json"
    if not file.exists():
        raise UserError(
            f"{path}: not a run directory, since it has no config.json; name a run directory"
        )
    return from_dict(read_table(file))


@contextlib.contextmanager
def start_run(
    workdir: epath.PathLike,
    config: Config,
    source: Source,
    devices: str,
    init_from: dict | None = None,
) -> Iterator[epath.Path]:
    """Makes the run directory, or checks that the run there can resume with `config` and this data.

    A context manager that yields the directory's path. Until it ends, no other process can start
    the run. `init_from` describes the weights that the run starts from. None means fresh weights,
    or those that an existing run started from.

    Raises UserError naming every changed field that affects training, or if `workdir` holds
    something else or cannot be written. The run is then unchanged.
    """
    workdir = path_of(workdir)
    _check_place(workdir)
    with locked(workdir):
        config_file = workdir / "config.json"
        run_file = workdir / "run.json"
        run: dict[str, Any] = {
            "data_fingerprint": source.fingerprint,
            "images": len(source),
            "init_from": init_from,
            "starts": [],
        }
        if config_file.exists():
            run = _read_run(workdir)
            _check_same(workdir, read_config(workdir), config, run, source, init_from)
        run["starts"].append(_provenance(devices))
        _warn_of_other_bits(run["starts"])
        wait_for_all("start_run")  # All processes must have read the files before one writes.
        write_file(run_file, json.dumps(run, indent=1).encode())
        write_file(config_file, json.dumps(to_dict(config), indent=1).encode())
        _record_images(workdir / "data.npz", source)
        yield workdir


def check_run(
    workdir: epath.PathLike, config: Config, source: Source, init_from: dict | None = None
) -> None:
    """Raises UserError where `start_run` would for what is in `workdir`; writes nothing."""
    workdir = path_of(workdir)
    _check_place(workdir)
    if (workdir / "config.json").exists():
        _check_same(workdir, read_config(workdir), config, _read_run(workdir), source, init_from)


def _check_place(workdir: epath.Path) -> None:
    if workdir.exists() and (not workdir.is_dir() or _is_foreign(workdir)):
        raise UserError(
            f"workdir: {workdir} is not empty and not a run directory; choose another --workdir"
        )


def starts_from(workdir: epath.Path) -> dict | None:
    """The record of the weights that the run starts from, or None for fresh weights."""
    return _read_run(workdir).get("init_from")


def data_fingerprint(run: epath.PathLike) -> str:
    """The fingerprint of the images that the run was trained on."""
    return _read_run(path_of(run))["data_fingerprint"]


def _read_run(workdir: epath.Path) -> dict:
    """The content of run.json."""
    file = workdir / "run.json"
    run = read_table(file)
    kinds = {"data_fingerprint": str, "images": int, "starts": list, "init_from": dict | None}
    wrong = [name for name, kind in kinds.items() if not isinstance(run.get(name), kind)]
    if wrong or not all(isinstance(start, dict) for start in run["starts"]):
        names = ", ".join(wrong or ["starts"])
        raise UserError(
            f"{file}: not the record of a run, by its {names}; restore it or choose another run"
        )
    return run


def _is_foreign(folder: epath.Path) -> bool:
    """Whether the folder is neither empty nor a run.

    A start that was killed early leaves run.json alone, which does not count.
    """
    # A folder made in a bucket's web console lists itself, under a name that does not exist.
    names = {
        path.name for path in folder.iterdir() if not path.name.startswith(".") and path.exists()
    }
    return "config.json" not in names and bool(names - {"run.json"})


def _check_same(workdir, saved: Config, config: Config, run, source: Source, init_from) -> None:
    """Raises UserError naming every difference from the saved run that affects training."""
    before = flatten(to_dict(saved))
    now = flatten(to_dict(config))
    differences = [
        f"{name} was {before[name]!r} and is {now[name]!r}"
        for name in names_where(Config, lambda field: not field.resume)
        if before[name] != now[name]
    ]
    if run["data_fingerprint"] != source.fingerprint:
        found = [f"{run['images']} images, now {len(source)}", *_of_images(workdir, run, source)]
        if saved.data.class_names != config.data.class_names:
            found.append(
                f"the classes were {numbered_words(saved.data.class_names) or 'not named'} and are "
                f"{numbered_words(config.data.class_names) or 'not named'}"
            )
        differences.append(f"the data's fingerprint has changed ({'; '.join(found)})")
    if init_from not in (None, run.get("init_from")):
        differences.append(
            "it started from other weights than --init-from (leave that out to resume)"
        )
    if differences:
        raise UserError(
            f"{workdir}: this run cannot resume: {'; '.join(differences)}; "
            "undo these changes or choose another --workdir"
        )


def _record_images(file: epath.Path, source: Source) -> None:
    """Writes the names and hashes of the run's images, once."""
    if is_first() and not file.exists():
        of_images = record.record(source)
        if of_images:
            write_file(file, npz(of_images))


def _of_images(workdir: epath.Path, run, source: Source) -> list[str]:
    """How the images differ from those of the run, as far as that is known."""
    if run["data_fingerprint"] in source.former:
        return [source.former[run["data_fingerprint"]]]
    try:
        return record.differences(read_npz(workdir / "data.npz"), source)
    except UserError:  # A run of an older version has no such file.
        return []


def _warn_of_other_bits(starts: list[dict]) -> None:
    """Warns of everything that changed since the previous start and may change the last bits."""
    if len(starts) < 2:
        return
    before = flatten(starts[-2])
    now = flatten(starts[-1])
    changes = [
        f"{name} {before.get(name)!r} -> {now[name]!r}"
        for name in now
        if before.get(name) != now[name]
    ]
    if changes:
        log.warning(
            "results may differ in the last bits from an uninterrupted run; changed: %s",
            ", ".join(changes),
        )


def _provenance(devices: str) -> dict:
    """The record of this start: software, devices and settings that may change the last bits."""
    return {
        "python": platform.python_version(),
        "versions": versions(),
        "devices": devices,
        "cores": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "prng": str(jax.random.key_impl(seed_key(0))),
    }


def versions() -> dict[str, str | None]:
    """The versions of PACKAGES; None if a package is not installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # A checkout that is not installed.
        return None


def digest(params: PyTree) -> str:
    """A hash of a tree of arrays, which identifies a set of weights."""
    hashed = hashlib.blake2b(digest_size=8)
    for leaf in jax.tree.leaves(params):
        hashed.update(np.ascontiguousarray(leaf))
    return hashed.hexdigest()
