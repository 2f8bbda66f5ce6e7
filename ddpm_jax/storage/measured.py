"""What was measured of a model's weights, in files beside them or inside a .safetensors file.

calibration.npz  the Calibration, and a head: format version, the weights and process it is of, the
                 images and the seed it was measured with
tuned.json       the Tuned samplers, likewise

A file that is of other weights, or of another process, is not used.
"""

import json
import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
from etils import epath

from ddpm_jax.calibration import ARRAYS, Calibration, cell_grid
from ddpm_jax.ddpm import DDPM
from ddpm_jax.errors import UserError
from ddpm_jax.sampler import NOTHING_TUNED, Sampler, Tuned
from ddpm_jax.shapes import PyTree
from ddpm_jax.storage.files import npz, path_of, read_npz, read_table, write_file
from ddpm_jax.storage.kept import Kept, check_kept
from ddpm_jax.storage.run import digest

log = logging.getLogger(__name__)

VERSION = 1
"""Of both formats."""

CALIBRATION = "calibration.npz"
TUNED = "tuned.json"

HEAD = {
    "version": int,
    "parameters": str,
    "process": str,
    "images": int,
    "decoder": float,
    "seed": int,
    "split": str,
    "data_fingerprint": str,
}
"""What is said of a calibration beside its arrays; `parameters` and `process` are digests."""

PREFIX = "calibration."
"""Before the names of its arrays in a .safetensors file."""

IN_NPZ = {int: Kept("int64", ()), float: Kept("float64", ()), str: Kept("<U64", ())}
"""The head's entries as arrays."""

Identity = Mapping[str, str]
"""The digests of the parameters and of the process: {"parameters": ..., "process": ...}."""

About = Mapping[str, Any]

NOTHING: About = MappingProxyType({})


class Measured(NamedTuple):
    """What is known of some weights, and how it was measured."""

    calibration: Calibration | None = None
    tuned: Tuned = NOTHING_TUNED
    of_calibration: About = NOTHING
    """seed, split and data_fingerprint of the images."""
    of_tuned: About = NOTHING
    """Anything that JSON can hold."""


NOTHING_MEASURED = Measured()


class Labelled(Protocol):
    """A model that knows its digests, as `weights.load.Loaded` does."""

    @property
    def label(self) -> dict[str, Any]:
        """`parameters` and `process` are among it."""


def identity_of(ddpm: DDPM, params: PyTree) -> dict[str, str]:
    """The digests of weights and of their process."""
    return {"parameters": digest(params), "process": ddpm.process_digest}


def digest_of_errors(ddpm: DDPM, sampler: Sampler) -> str | None:
    """Of the errors that a sampler's variance follows from; None where it follows from none."""
    if sampler.variance != "optimal" or ddpm.calibration is None:
        return None
    return digest([ddpm.calibration.mse, np.array(ddpm.calibration.decoder)])


def read_measured(folder: epath.PathLike, ddpm: DDPM, params: PyTree) -> Measured:
    """What the files in `folder` say of these weights; nothing of files that are absent.

    Raises UserError naming a file that is damaged, or of a later format.
    """
    folder = path_of(folder)
    if not any((folder / name).exists() for name in (CALIBRATION, TUNED)):
        return Measured()
    identity = identity_of(ddpm, params)
    calibration = None
    of_calibration = NOTHING
    if (folder / CALIBRATION).exists():
        calibration, of_calibration = _read_calibration(folder / CALIBRATION, ddpm, identity)
    tuned = NOTHING_TUNED
    of_tuned = NOTHING
    if (folder / TUNED).exists():
        tuned, of_tuned = _read_tuned(folder / TUNED, ddpm, identity)
    return Measured(calibration, tuned, of_calibration, of_tuned)


def files_of(measured: Measured, identity: Identity) -> dict[str, bytes]:
    """The content of each file that holds a part of `measured`."""
    files = {}
    if measured.calibration is not None:
        files[CALIBRATION] = _npz_of(measured.calibration, identity, measured.of_calibration)
    if measured.tuned != NOTHING_TUNED:
        table = tuned_table(measured.tuned, identity, measured.of_tuned)
        files[TUNED] = json.dumps(table, indent=1).encode()
    return files


def parts_of(
    measured: Measured, identity: Identity
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(what JSON holds of `measured`, the calibration's arrays), for a file that holds both."""
    table: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    if measured.calibration is not None:
        table["calibration"] = calibration_head(
            measured.calibration, identity, measured.of_calibration
        )
        arrays = measured.calibration.arrays
    if measured.tuned != NOTHING_TUNED:
        table["tuned"] = tuned_table(measured.tuned, identity, measured.of_tuned)
    return table, arrays


def measured_of(
    where: object,
    table: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    ddpm: DDPM,
    identity: Identity,
) -> Measured:
    """The Measured of `parts_of`; nothing of parts that are absent or of other weights.

    Raises UserError naming `where` it stands if it is damaged, or of a later format.
    """
    calibration = None
    of_calibration = NOTHING
    if "calibration" in table:
        head = table["calibration"]
        calibration, of_calibration = calibration_of(where, head, arrays, ddpm, identity)
    tuned = NOTHING_TUNED
    of_tuned = NOTHING
    if "tuned" in table:
        tuned, of_tuned = tuned_of(where, table["tuned"], ddpm, identity)
    return Measured(calibration, tuned, of_calibration, of_tuned)


def write_calibration(
    file: epath.PathLike, model: Labelled, calibration: Calibration, about: About
) -> None:
    """Writes `calibration` of the weights of `model`; `about` is the head's seed, split and so on.

    Says so where the file held one of other weights. Raises UserError if it cannot be written.
    """
    file = path_of(file)
    if file.exists() and not _is_of(read_npz(file), model.label):
        log.info("%s: held a calibration of other weights, which this one replaces", file)
    write_file(file, _npz_of(calibration, model.label, about))


def write_tuned(folder: epath.PathLike, model: Labelled, tuned: Tuned, about: About) -> None:
    """Writes `tuned`, of the weights of `model`, into tuned.json of `folder`.

    `about` says how it was found, and must be valid JSON. Says so where the file held results of
    other weights. Raises UserError if it cannot be written.
    """
    file = path_of(folder) / TUNED
    if file.exists():
        there = read_table(file)
        if any(there.get(name) != model.label[name] for name in ("parameters", "process")):
            log.info("%s: held samplers tuned to other weights, which these replace", file)
    table = tuned_table(tuned, model.label, about)
    write_file(file, json.dumps(table, indent=1).encode())


def calibration_head(calibration: Calibration, identity: Identity, about: About) -> dict[str, Any]:
    """The entries of HEAD; those that `about` lacks are 0 or empty."""
    head = {name: about.get(name, kind()) for name, kind in HEAD.items()}
    known = {name: identity[name] for name in ("parameters", "process")}
    measured = {"images": calibration.images, "decoder": calibration.decoder}
    return {**head, **known, **measured, "version": VERSION}


def calibration_of(
    where: object,
    head: Any,
    arrays: Mapping[str, np.ndarray],
    ddpm: DDPM,
    identity: Identity,
) -> tuple[Calibration | None, About]:
    """(the Calibration, the rest of its head), or (None, nothing) if it is not of these weights.

    Raises UserError naming `where` it stands if it is damaged, or of a later format.
    """
    of_kinds = isinstance(head, dict) and head.keys() == HEAD.keys()
    if not of_kinds or not all(type(head[name]) is kind for name, kind in HEAD.items()):
        raise UserError(f"{where}: does not describe its calibration; calibrate the model again")
    _check_version(where, head["version"])
    if any(head[name] != identity[name] for name in ("parameters", "process")):
        return None, NOTHING
    T = ddpm.schedule.num_timesteps
    shapes = {"mse": (T,), "error": (T,)}
    cells = (T, *cell_grid(ddpm.image_shape))
    kept = {name: Kept(kind, shapes.get(name, cells)) for name, kind in ARRAYS.items()}
    check_kept(where, arrays, kept)
    try:
        calibration = Calibration(**arrays, images=head["images"], decoder=head["decoder"])
    except ValueError as error:
        raise UserError(f"{where}: {error}; calibrate the model again") from error
    names = ("seed", "split", "data_fingerprint")
    return calibration, {name: head[name] for name in names}


def tuned_table(tuned: Tuned, identity: Identity, about: About) -> dict[str, Any]:
    """What JSON holds of `tuned`."""
    of_each = {
        name: [sampler.options for sampler in samplers]
        for name, samplers in tuned._asdict().items()
    }
    known = {name: identity[name] for name in ("parameters", "process")}
    return {"version": VERSION, **known, **of_each, "about": dict(about)}


def tuned_of(where: object, table: Any, ddpm: DDPM, identity: Identity) -> tuple[Tuned, About]:
    """(the Tuned, how it was found) of a `tuned_table`; empty if it is not of these weights.

    Raises UserError naming `where` it stands if it is damaged, or of a later format.
    """
    lists = [table.get(name) for name in Tuned._fields] if isinstance(table, dict) else [None]
    whole = all(isinstance(each, list) for each in lists)
    if not whole or not isinstance(table.get("about"), dict):
        raise UserError(f"{where}: does not hold tuned samplers; tune the model again")
    _check_version(where, table.get("version"))
    if any(table.get(name) != identity[name] for name in ("parameters", "process")):
        return NOTHING_TUNED, NOTHING
    samplers = [
        tuple(_sampler_of(where, options, ddpm) for options in each or ()) for each in lists
    ]
    return Tuned(*samplers), table["about"]


def _sampler_of(where, options, ddpm: DDPM) -> Sampler:
    """A Sampler with steps of the model's own."""
    try:
        if not isinstance(options, dict):
            raise UserError("sampler: is not a table of options")
        sampler = Sampler.from_options(options)
    except UserError as error:
        raise UserError(f"{where}: {error}; tune the model again") from error
    T = ddpm.schedule.num_timesteps
    if sampler.timesteps is None or sampler.timesteps[-1] >= T:
        raise UserError(
            f"{where}: a sampler lacks timesteps from 0 to {T - 1}; tune the model again"
        )
    return sampler


def _read_calibration(file: epath.Path, ddpm: DDPM, identity: Identity):
    arrays = read_npz(file)
    head = {name: arrays.pop(name) for name in HEAD if name in arrays}
    check_kept(file, head, {name: IN_NPZ[kind] for name, kind in HEAD.items()})
    plain = {name: value.item() for name, value in head.items()}
    return calibration_of(file, plain, arrays, ddpm, identity)


def _read_tuned(file: epath.Path, ddpm: DDPM, identity: Identity) -> tuple[Tuned, About]:
    try:
        return tuned_of(file, read_table(file), ddpm, identity)
    except UserError as error:
        # `tune` loads the model, too: it can replace the file only once that is gone.
        raise UserError(f"{error} (without this file the model can be tuned again)") from error


def _npz_of(calibration: Calibration, identity: Identity, about: About) -> bytes:
    head = calibration_head(calibration, identity, about)
    arrays = {name: np.array(value, IN_NPZ[HEAD[name]].dtype) for name, value in head.items()}
    return npz({**arrays, **calibration.arrays})


def _is_of(arrays: Mapping[str, np.ndarray], identity: Identity) -> bool:
    names = ("parameters", "process")
    return all(name in arrays and str(arrays[name]) == identity[name] for name in names)


def _check_version(where, version) -> None:
    if type(version) is int and version > VERSION:
        raise UserError(
            f"{where}: is of format {version}, and this version of ddpm-jax reads {VERSION}; "
            "update it"
        )
    if version != VERSION:
        raise UserError(f"{where}: its format has no number; measure the model again")
