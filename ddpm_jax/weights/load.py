"""Trained weights from a run, a file of `export`, a diffusers folder or the Hugging Face hub."""

import dataclasses
import logging
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ddpm_jax.average import first_share
from ddpm_jax.calibration import Calibration
from ddpm_jax.config import Config, Step, Weights, names_where, value_of
from ddpm_jax.data.names import shown
from ddpm_jax.ddpm import DDPM
from ddpm_jax.devices.mesh import mesh_of, replicate
from ddpm_jax.errors import UserError
from ddpm_jax.sampler import Tuned
from ddpm_jax.shapes import PyTree
from ddpm_jax.storage.best import best_step
from ddpm_jax.storage.files import path_of
from ddpm_jax.storage.measured import Measured, identity_of, read_measured
from ddpm_jax.storage.run import data_fingerprint, is_run, load_checkpoint
from ddpm_jax.weights.diffusers import CONVERT, is_diffusers, read_diffusers
from ddpm_jax.weights.hub import KINDS, download, is_hub_name
from ddpm_jax.weights.single_file import read_with_measured

log = logging.getLogger(__name__)

Kind = Literal["ema", "raw", "unknown"]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Loaded(NamedTuple):
    """A model with its weights."""

    path: epath.PathLike
    """Where it was loaded from, as the user named it."""
    ddpm: DDPM
    params: Any
    kind: Kind
    """Whether they are the averaged weights; unknown where the file does not say."""
    step: int | None
    """Updates that made them, or None where that is not known."""
    data_fingerprint: str | None
    """Of the images they were trained on, or None where that is not known."""
    measured: Measured = Measured()
    """What was measured of them, which `ddpm` holds, too, and how."""

    @property
    def devices(self) -> int:
        """How many devices hold the parameters and share the work."""
        mesh = mesh_of(self.params)
        return mesh.size if mesh else 1

    @property
    def home(self) -> epath.Path:
        """As `home_of` says it."""
        return home_of(self.path)

    @property
    def words(self) -> str:
        """As `words_of` says it."""
        return words_of(self.kind, self.step)

    def calibrated(self, calibration: Calibration, about: dict[str, Any]) -> "Loaded":
        """The same model with this calibration; `about` says how it was measured."""
        measured = self.measured._replace(calibration=calibration, of_calibration=about)
        return with_measured(self, measured)

    def tuned(self, tuned: Tuned, about: dict[str, Any]) -> "Loaded":
        """The same model with these samplers tuned to it; `about` says how they were found."""
        return with_measured(self, self.measured._replace(tuned=tuned, of_tuned=about))

    @property
    def label(self) -> dict[str, Any]:
        """The model's identity, for files that record how they were made."""
        return {
            **identity_of(self.ddpm, self.params),
            "weights": self.kind,
            "step": self.step,
        }


def with_measured(loaded: Loaded, measured: Measured) -> Loaded:
    """The model with what was measured of its weights."""
    ddpm = dataclasses.replace(loaded.ddpm, calibration=measured.calibration, tuned=measured.tuned)
    return loaded._replace(ddpm=ddpm, measured=measured)


def home_of(path: epath.PathLike) -> epath.Path:
    """The run directory `path`, where results of it go. Raises UserError if it is no run."""
    if not is_run(path):
        raise UserError(
            f"{path}: not a run directory, so results have no default folder; choose one with --out"
        )
    return path_of(path)


def words_of(kind: Kind, step: int | None) -> str:
    """For example "ema weights of step 5000"."""
    words = "weights that may be averaged or not" if kind == "unknown" else f"{kind} weights"
    return words if step is None else f"{words} of step {step}"


def load(
    path: epath.PathLike, *, weights: Weights | None = None, step: Step | None = None
) -> tuple[DDPM, PyTree]:
    """(ddpm, params) of `path`; params are on the default device.

    `path` is one of

    - a run directory: the averaged weights (or the `raw` ones) of its newest checkpoint, that of
      `step`, or with "best" the one where the metric of checkpoint.best was lowest
    - a .safetensors file of `ddpm-jax export`
    - a folder of the diffusers library
    - a name on huggingface.co, such as google/ddpm-cifar10-32

    Raises UserError if it is something else, its network is not this package's, or the weights are
    not those asked for.
    """
    loaded = load_weights(path, weights=weights, step=step)
    return loaded.ddpm, loaded.params


def load_weights(
    path: epath.PathLike,
    *,
    weights: Weights | None = None,
    step: Step | None = None,
    mesh: Mesh | None = None,
) -> Loaded:
    """As `load`, with all that is known of the weights; params are on each device of `mesh`."""
    if weights not in (None, "ema", "raw"):
        raise UserError(f"weights: must be ema or raw, got {weights!r}")
    if is_run(path):
        kind = weights or "ema"
        step = best_step(path) if step == "best" else step
        step, ddpm, params = load_checkpoint(path, weights=kind, step=step, mesh=mesh)
        loaded = Loaded(path, ddpm, params, kind, step, data_fingerprint(path))
        return with_measured(loaded, read_measured(path, ddpm, params))
    config, params, about, measured = _read(path)
    if step not in (None, about["step"]):
        its = "an unknown step" if about["step"] is None else f"step {about['step']}"
        raise UserError(f"step: {path} holds only the weights of {its}; leave --step out")
    if weights not in (None, about["weights"]):
        unknown = about["weights"] == "unknown"
        its = (
            "does not say whether its weights are averaged"
            if unknown
            else f"holds only {about['weights']} weights"
        )
        raise UserError(f"weights: {path} {its}; leave --weights out")
    params = replicate(params, mesh) if mesh else jax.device_put(params, jax.local_devices()[0])
    known = (about["weights"], about["step"], about["data_fingerprint"])
    loaded = Loaded(path, DDPM(config), params, *known)
    return with_measured(loaded, measured)


def load_for_command(
    path: epath.PathLike, weights: Weights | None, step: Step | None, mesh: Mesh | None
) -> Loaded:
    """As `load_weights`; says where a run's average is largely what it started from."""
    loaded = load_weights(path, weights=weights, step=step, mesh=mesh)
    if is_run(path) and loaded.kind == "ema" and loaded.step is not None:
        optim = loaded.ddpm.config.optim
        share = first_share(loaded.step, decay=optim.ema_decay, warmup=optim.ema_warmup)
        if share > 0.1:
            log.warning(
                "%s: in the averaged weights of step %d, those that the run started from still "
                "count for %.0f %%; --weights raw takes those of the last update",
                path,
                loaded.step,
                100 * share,
            )
    return loaded


def weights_for(ddpm: DDPM, path: epath.PathLike, mesh: Mesh) -> Loaded:
    """The weights of `path`, as `load` finds them, to train `ddpm` from; on each device of `mesh`.

    Raises UserError naming the fields by which its network is another or predicts something else.
    """
    loaded = load_weights(path, mesh=mesh)
    if ddpm.config.model.num_classes and not loaded.ddpm.config.model.num_classes:
        loaded = _with_classes(loaded, ddpm, mesh)
    if _network(loaded.ddpm) != _network(ddpm):
        differences = []
        for name in names_where(Config, lambda field: field.network):
            there = value_of(loaded.ddpm.config, name)
            here = value_of(ddpm.config, name)
            if there != here:
                differences.append(f"{name} is {there!r} there, but {here!r} in this config")
        raise UserError(f"--init-from: {path} has another network: {', '.join(differences)}")
    if not np.array_equal(loaded.ddpm.schedule.betas, ddpm.schedule.betas):
        log.warning(
            "--init-from: %s was trained with other betas than this config's diffusion.schedule",
            path,
        )
    _warn_of_names(loaded.ddpm.config.data.class_names, ddpm.config.data.class_names, path)
    return loaded


def _warn_of_names(before: tuple[str, ...], now: tuple[str, ...], path: epath.PathLike) -> None:
    """Warns where a class that is trained starts from the row of one with another name."""
    for label, (was, name) in enumerate(zip(before, now, strict=False)):
        if was != name:
            log.warning(
                "--init-from: label %d is the class %s in %s, and %s here; --data.class-names "
                "numbers the classes",
                label,
                shown(was),
                path,
                shown(name),
            )
            return


def _with_classes(loaded: Loaded, ddpm: DDPM, mesh: Mesh) -> Loaded:
    """The model with the classes of `ddpm`, which so far all draw alike: their rows are zero."""
    model = ddpm.config.model
    config = loaded.ddpm.config
    network = dataclasses.replace(
        config.model, num_classes=model.num_classes, no_class=model.no_class
    )
    config = dataclasses.replace(config, model=network)
    rows = np.zeros((model.class_rows, 4 * config.model.base_channels), np.float32)
    params = {**loaded.params, "class_embedding": {"embedding": replicate(rows, mesh)}}
    return loaded._replace(ddpm=DDPM(config), params=params)


def _network(ddpm: DDPM):
    """Whatever two models must have in common for the weights of one to fit the other."""
    diffusion = ddpm.config.diffusion
    learned = diffusion.variance if diffusion.learns_variance else None
    return (
        jax.tree.map(lambda leaf: leaf.shape, ddpm.shapes),
        ddpm.config.model.norm_groups,
        # Of as many rows the last may be that of a class, or of no class.
        ddpm.config.model.num_classes,
        diffusion.prediction,
        learned,
    )


def _read(path: epath.PathLike):
    """(config, params, {weights, step, data_fingerprint}, Measured) of a model that is no run."""
    local = path_of(path)
    if local.suffix == ".safetensors" and local.is_file():
        return read_with_measured(local)
    kind = "unknown"
    mistyped = local.suffix == ".safetensors" or local.parent.exists()
    if not local.exists() and not mistyped and is_hub_name(str(path)):
        log.info("%s: no such path, looking on huggingface.co", path)
        local = path_of(download(str(path)))
        kind = KINDS.get(str(path), "unknown")
    if is_diffusers(local):
        config, params = read_diffusers(local)
        about = {"weights": kind, "step": None, "data_fingerprint": None}
        return config, params, about, read_measured(local, DDPM(config), params)
    if not local.exists():
        raise UserError(
            f"{path}: not found; name a run directory, a .safetensors file or a diffusers folder"
        )
    if local.suffix in PICKLES:
        raise UserError(
            f"{path}: pickle files can run any code, so they are not read; for a diffusers model, "
            f"`{CONVERT}` (needs torch), then name its folder"
        )
    raise UserError(
        f"{path}: not a model; name a run directory, a .safetensors file or a diffusers folder"
    )
