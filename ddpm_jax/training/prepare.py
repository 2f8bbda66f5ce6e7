"""What a training needs before its first update; nothing is written."""

import dataclasses
import functools
import logging
from collections.abc import Collection
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from numpy.typing import ArrayLike

from ddpm_jax.config import Config
from ddpm_jax.data import Source, from_array, load_source, split
from ddpm_jax.data.class_names import numbered_words
from ddpm_jax.data.guard import leave_unguarded_reader
from ddpm_jax.data.scaled import scaled
from ddpm_jax.data.survey import log_units, with_units
from ddpm_jax.ddpm import DDPM
from ddpm_jax.devices.mesh import make_mesh, state_shardings
from ddpm_jax.errors import UserError
from ddpm_jax.guidance import NO_CLASS
from ddpm_jax.shapes import PyTree
from ddpm_jax.storage.files import path_of
from ddpm_jax.storage.restore import abstract_like, last_step
from ddpm_jax.storage.run import data_fingerprint, is_run, starts_from
from ddpm_jax.training.idle import idle_settings
from ddpm_jax.training.update import TrainState, check_batch, init_state
from ddpm_jax.weights.load import Loaded, weights_for

log = logging.getLogger(__name__)


class Prepared(NamedTuple):
    """A training that is checked and could start."""

    ddpm: DDPM
    mesh: Mesh
    source: Source
    train: np.ndarray
    """[N] the images of the source that are trained on."""
    held_out: np.ndarray
    """[M] the others."""
    initial: Loaded | None
    """The weights that a new run starts from; None for fresh ones."""

    @property
    def config(self) -> Config:
        """That of the model."""
        return self.ddpm.config

    @property
    def params(self) -> PyTree:
        """Those to start from, or None for fresh ones."""
        return None if self.initial is None else self.initial.params


def prepare(
    config: Config,
    workdir: epath.PathLike,
    images: np.ndarray | None = None,
    labels: ArrayLike | None = None,
    init_from: epath.PathLike | None = None,
) -> Prepared:
    """Reads the data and finds the devices, as for `fit`. Raises UserError where it does."""
    leave_unguarded_reader()
    config, source = _with_source(config, workdir, images, labels)
    config = with_classes(config, source)
    train, held_out = split(source, config.data.holdout)
    config = dataclasses.replace(config, data=with_units(config.data, source, train))
    source = scaled(source, config.data)
    parallel = config.parallel
    mesh = make_mesh(parallel.devices, parallel.fsdp, parallel.mode)
    check_batch(config.train, mesh.size)
    _check_steps(workdir, config.train.steps)
    ddpm = DDPM(config)
    initial = None if init_from is None else weights_for(ddpm, init_from, mesh)
    return Prepared(ddpm, mesh, source, train, held_out, initial)


def describe(prepared: Prepared, given: Collection[str]) -> None:
    """Logs what the data are, and which settings have no effect; `given` as for `fit`."""
    config = prepared.config
    log.info(
        "data: %d images, %d of them for training, fingerprint %s",
        len(prepared.source),
        len(prepared.train),
        prepared.source.fingerprint,
    )
    if config.data.class_names:
        log.info("data: the classes are %s", numbered_words(config.data.class_names))
    log_units(config.data)
    lines = idle_settings(
        config,
        streamed=prepared.source.streamed,
        held_out=len(prepared.held_out),
        devices=prepared.mesh.size,
        given=given,
        has_no_class=prepared.source.labels is not None and NO_CLASS in prepared.source.labels,
    )
    for line in lines:
        log.warning("%s", line)


def abstract_state(ddpm: DDPM, mesh: Mesh) -> TrainState:
    """The training state's shapes, dtypes and places on `mesh`: a tree of ShapeDtypeStruct.

    They are known first, so that every array is made where it belongs.
    """
    return _init_on(ddpm, mesh)[0]


def new_state(prepared: Prepared, workdir: epath.Path) -> TrainState:
    """The state before the first update of a run in `workdir`.

    Raises UserError if that has been started from weights that are not given now.
    """
    if prepared.params is None and (workdir / "run.json").exists() and starts_from(workdir):
        raise UserError(
            f"{workdir}: this run has no checkpoint yet; "
            "name the weights that it starts from with --init-from"
        )
    init = _init_on(prepared.ddpm, prepared.mesh)[1]
    return init(prepared.params)


@functools.lru_cache(maxsize=16)
def _init_on(ddpm: DDPM, mesh: Mesh):
    """(the shapes of a state with their places on the mesh, the program that makes the first).

    They are kept for the next run of the same model in this process.
    """
    init = functools.partial(init_state, ddpm)
    shapes = jax.eval_shape(init, ddpm.shapes)
    shardings = state_shardings(shapes, mesh)
    return abstract_like(shapes, shardings), jax.jit(init, out_shardings=shardings)


def _with_source(
    config: Config,
    workdir: epath.PathLike,
    images: np.ndarray | None,
    labels: ArrayLike | None,
) -> tuple[Config, Source]:
    """(the config, the images): those of config.data, or `images`, which the config then names."""
    if images is None:
        if labels is not None:
            raise UserError("labels: belong to images that are given, too; pass both")
        source = load_source(config.data)
        if source.remembered and not _is_of_run(source, path_of(workdir)):
            source = load_source(config.data, believe=False)
        return config, source
    data = config.data
    source = from_array(images, data.image_shape, labels, values=data.value_kind)
    data = dataclasses.replace(data, source="array")
    return dataclasses.replace(config, data=data), source


def _is_of_run(source: Source, workdir: epath.Path) -> bool:
    """Whether the run in `workdir`, if there is one, was trained on these images."""
    return not is_run(workdir) or data_fingerprint(workdir) == source.fingerprint


def with_classes(config: Config, source: Source) -> Config:
    """The config with the number of the data's classes in the place of auto, and their names.

    Raises UserError if the data have no labels, or labels or names that the model has no class for.
    """
    wanted = config.model.num_classes
    if wanted is None:
        return config
    if source.labels is None:
        raise UserError(
            "model.num_classes: these images have no labels; sort them into a folder a class, or "
            "leave it out"
        )
    least = int(source.labels.min())
    last = int(source.labels.max())
    given = config.data.class_names
    if wanted == "auto":
        wanted = len(given) or last + 1
    if least < NO_CLASS or last >= wanted or wanted < 1:
        raise UserError(
            f"model.num_classes: {wanted} classes have labels 0 to {wanted - 1}, or -1 for no "
            f"class, but those of these images are from {least} to {last}; renumber them, or "
            "raise the number of classes"
        )
    if len(given) > wanted:
        raise UserError(
            f"data.class_names: {len(given)} names for {wanted} classes; leave some out, or raise "
            "model.num_classes"
        )
    names = given or (source.class_names or ())[:wanted]
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_classes=wanted),
        data=dataclasses.replace(config.data, class_names=names),
    )


def _check_steps(workdir: epath.PathLike, steps: int) -> None:
    """Raises UserError if the run in `workdir` is past `steps`: nothing would be trained."""
    last = last_step(workdir)
    if last > steps:
        raise UserError(
            f"train.steps: {steps}, but the run in {workdir} is at step {last} already; raise it, "
            "or choose another --workdir"
        )
