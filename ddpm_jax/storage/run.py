"""The run directory: what a run is (config.json), what it ran on (run.json), and its weights.

config.json    the config, as last started
run.json       the data's fingerprint and, a start each, versions, devices, XLA flags, PRNG
metrics.jsonl  one line a tick
.lock          who trains here now
checkpoints/   see checkpoint.py
samples/, samples.png, tensorboard/
likelihood/    see nll.py
evaluation/    see evaluate.py
figures/       see figures/
"""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import platform

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ddpm_jax.config import Config, Weights, flatten, from_dict, names_where, to_dict
from ddpm_jax.data import Source
from ddpm_jax.ddpm import DDPM
from ddpm_jax.devices.mesh import replicated
from ddpm_jax.devices.processes import wait_for_all
from ddpm_jax.errors import UserError
from ddpm_jax.keys import seed_key
from ddpm_jax.storage import checkpoint
from ddpm_jax.storage.files import locked, path_of, read_json, write_file

log = logging.getLogger(__name__)

PACKAGES = ("ddpm-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pillow")


def load_checkpoint(
    path: epath.PathLike,
    *,
    weights: Weights = "ema",
    step: int | None = None,
    mesh: Mesh | None = None,
):
    """(step, ddpm, params) of the run directory `path`: the averaged weights, or the `raw` ones, of `step`.

    `step` None is the newest checkpoint. params lie on each device of `mesh`, or on the default device.
    Raises UserError if this is no run or has no such checkpoint.
    """
    parts = {"ema": "ema_params", "raw": "params"}
    ddpm = DDPM(read_config(path))
    shapes = jax.eval_shape(ddpm.init, jax.random.key(0))
    sharding = (
        replicated(mesh) if mesh else jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    )
    abstract = checkpoint.abstract_like(shapes, jax.tree.map(lambda _: sharding, shapes))
    step, params = checkpoint.restore_part(path, parts[weights], abstract, step)
    return step, ddpm, params


def is_run(path: epath.PathLike) -> bool:
    """Whether `path` is a run directory, damaged or not. A folder of the diffusers library has a config.json, too."""
    file = path_of(path) / "config.json"
    return file.exists() and b'"_class_name"' not in file.read_bytes()


def read_config(path: epath.PathLike) -> Config:
    """The config of the run directory `path`. Raises UserError if it is none or its config is damaged."""
    file = path_of(path) / "config.json"
    if not file.exists():
        raise UserError(f"{path}: this is not a run directory, it has no config.json")
    return from_dict(read_json(file))


@contextlib.contextmanager
def start_run(
    workdir: epath.PathLike,
    config: Config,
    source: Source,
    devices: str,
    init_from: dict | None = None,
):
    """Makes the run directory or checks that it may be continued with `config` and these data.

    A context manager that gives its path; until it ends no other process can start the run. `init_from` tells
    which weights it is to start from, None for fresh ones or, if it is there, those it started from.
    Raises UserError naming every field that differs and would change what is learned, or if `workdir`
    holds something else or cannot be written; then the run is as it was.
    """
    workdir = path_of(workdir)
    if workdir.exists() and (not workdir.is_dir() or _is_foreign(workdir)):
        raise UserError(
            f"workdir: {workdir} is not empty and not a run; choose another with --workdir"
        )
    with locked(workdir):
        config_file, run_file = workdir / "config.json", workdir / "run.json"
        run = {
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
        wait_for_all("start_run")  # All have looked before one writes.
        write_file(run_file, json.dumps(run, indent=1).encode())
        write_file(config_file, json.dumps(to_dict(config), indent=1).encode())
        yield workdir


def starts_from(workdir: epath.Path) -> dict | None:
    """What is known of the weights that the run starts from; None for fresh ones."""
    return _read_run(workdir).get("init_from")


def data_fingerprint(run: epath.PathLike) -> str:
    """Of the images that the run was trained on."""
    return _read_run(path_of(run))["data_fingerprint"]


def _read_run(workdir: epath.Path) -> dict:
    """What run.json holds."""
    run = read_json(workdir / "run.json")
    if not isinstance(run, dict) or not {"data_fingerprint", "images", "starts"} <= run.keys():
        raise UserError(
            f"{workdir / 'run.json'}: this is not what a run writes; choose another run"
        )
    return run


def _is_foreign(folder: epath.Path) -> bool:
    """Whether it holds something and is no run. run.json alone is what a start leaves that was killed early."""
    # A folder made in a bucket's web console lists itself, under a name at which there is nothing.
    names = {
        path.name for path in folder.iterdir() if not path.name.startswith(".") and path.exists()
    }
    return "config.json" not in names and bool(names - {"run.json"})


def _check_same(workdir, saved: Config, config: Config, run, source: Source, init_from) -> None:
    before = flatten(to_dict(saved))
    now = flatten(to_dict(config))
    differences = [
        f"{name} was {before[name]!r} and is {now[name]!r}"
        for name in names_where(Config, lambda field: not field.resume)
        if before[name] != now[name]
    ]
    if run["data_fingerprint"] != source.fingerprint:
        differences.append(
            f"the data are not those it was started with ({run['images']} images, now {len(source)})"
        )
    if init_from not in (None, run.get("init_from")):
        differences.append(
            "it started from other weights than --init-from names (leave --init-from out to go on)"
        )
    if differences:
        raise UserError(
            f"{workdir} cannot be continued: {'; '.join(differences)}. Undo that or choose another --workdir"
        )


def _warn_of_other_bits(starts: list[dict]) -> None:
    """The same run to the last bit needs the same programs: tell what is another than before."""
    if len(starts) > 1:
        before, now = flatten(starts[-2]), flatten(starts[-1])
        changes = [
            f"{name} {before.get(name)!r} -> {now[name]!r}"
            for name in now
            if before.get(name) != now[name]
        ]
        if changes:
            log.warning(
                "the last bits may differ from an uninterrupted run's: %s", ", ".join(changes)
            )


def _provenance(devices: str) -> dict:
    return {
        "python": platform.python_version(),
        "versions": versions(),
        "devices": devices,
        "cores": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "prng": str(jax.random.key_impl(seed_key(0))),
    }


def versions() -> dict[str, str | None]:
    """Of the packages that a result depends on."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # A checkout that is not installed.
        return None


def digest(params) -> str:
    """A hash of a tree of arrays: what tells one set of weights from another."""
    hashed = hashlib.blake2b(digest_size=8)
    for leaf in jax.tree.leaves(params):
        hashed.update(np.ascontiguousarray(leaf))
    return hashed.hexdigest()
