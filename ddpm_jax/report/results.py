"""The results of later commands that a run directory holds: likelihood, evaluation and others."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
from etils import epath

from ddpm_jax.errors import UserError
from ddpm_jax.storage.files import read_npz, read_table
from ddpm_jax.storage.measured import CALIBRATION, TUNED

Result = TypeVar("Result")

PARTS = ("total", "rate", "prior", "distortion", "rmse")
"""The numbers of a likelihood."""

CURVES = ("timesteps", "terms", "rate", "rmse")
"""Its curves that are shown."""


class LikelihoodResult(NamedTuple):
    """A likelihood.json and the curves beside it."""

    folder: str
    summary: dict[str, Any]
    curves: dict[str, np.ndarray]
    """Those of CURVES, each [S]."""


class EvaluationResult(NamedTuple):
    """A result of `ddpm-jax evaluate`."""

    file: str
    table: dict[str, Any]


class Results(NamedTuple):
    """All of them, the newest weights first."""

    likelihoods: list[LikelihoodResult]
    evaluations: list[EvaluationResult]
    calibration: dict[str, Any] | None
    """Images and split."""
    tuned: list[dict[str, Any]]
    """The options of each sampler that was tuned."""
    figures: list[epath.Path]
    """PNG files, by their names."""
    faults: list[str]
    """A line for each file that cannot be used."""


def read_results(home: epath.Path) -> Results:
    """What the run directory `home` holds. Files that cannot be used become `faults`."""
    faults: list[str] = []

    def each(files: Iterator[epath.Path], read: Callable[[epath.Path], Result]) -> list[Result]:
        found = []
        for file in files:
            try:
                found.append(read(file))
            except UserError as error:
                faults.append(str(error))
        return found

    likelihoods = each(_files(home / "likelihood", "likelihood.json"), _read_likelihood)
    evaluations = each(_files(home / "evaluation", ".json"), _read_evaluation)
    calibrations = each(_present(home / CALIBRATION), _read_calibration)
    tuned = each(_present(home / TUNED), _read_tuned)
    return Results(
        sorted(likelihoods, key=_rank),
        sorted(evaluations, key=lambda each: -_step_of(each.table)),
        calibrations[0] if calibrations else None,
        tuned[0] if tuned else [],
        sorted(_pictures(home / "figures")),
        faults,
    )


def _rank(result: LikelihoodResult) -> tuple:
    """The newest weights first; of these the whole chain, on unseen images, on most of them."""
    summary = result.summary
    is_short = chain_length(summary) is not None
    is_trained_on = summary.get("split") == "train"
    return (-_step_of(summary), is_short, is_trained_on, -summary["images"])


def chain_length(summary: dict[str, Any]) -> int | None:
    """The steps of a bound's chain where it is not the whole one."""
    chain = summary.get("chain")
    steps = chain.get("timesteps") if isinstance(chain, dict) else None
    return len(steps) if isinstance(steps, list) else None


def _files(folder: epath.Path, ending: str) -> Iterator[epath.Path]:
    """The files below the folders in `folder` whose name ends so."""
    for inside in sorted(_inside(folder)):
        yield from sorted(file for file in _inside(inside) if file.name.endswith(ending))


def _pictures(folder: epath.Path) -> list[epath.Path]:
    return [file for file in _inside(folder) if file.suffix == ".png"]


def _inside(folder: epath.Path) -> list[epath.Path]:
    """The files of the folder, if there is one, without those still being written (.NAME)."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _present(file: epath.Path) -> Iterator[epath.Path]:
    if file.exists():
        yield file


def _read_likelihood(file: epath.Path) -> LikelihoodResult:
    summary = read_table(file)
    wrong = [name for name in (*PARTS, "images", "draws") if not is_number(summary.get(name))]
    if wrong:
        raise UserError(f"{file}: has no number {wrong[0]}; measure it again")
    path = file.parent / "curves.npz"
    arrays = read_npz(path) if path.exists() else {}
    curves = {name: arrays[name] for name in CURVES if name in arrays}
    lengths = {array.shape for array in curves.values()}
    whole = len(curves) == len(CURVES) and len(lengths) == 1
    if curves and not (whole and all(map(_is_curve, curves.values()))):
        raise UserError(f"{path}: does not hold {', '.join(CURVES)} of one length; delete it")
    return LikelihoodResult(file.parent.name, summary, curves)


def _is_curve(array: np.ndarray) -> bool:
    is_list = array.ndim == 1 and array.size > 0 and array.dtype.kind in "fi"
    return is_list and bool(np.isfinite(array).all())


def _read_evaluation(file: epath.Path) -> EvaluationResult:
    table = read_table(file)
    values = table.get("values")
    if not isinstance(values, dict) or not all(map(_is_value, values.values())):
        raise UserError(f"{file}: holds no values of an evaluation; delete it")
    return EvaluationResult(f"{file.parent.name}/{file.name}", table)


def _is_value(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("title"), str)
        and is_number(value.get("value"))
    )


def _read_calibration(file: epath.Path) -> dict[str, Any]:
    arrays = read_npz(file)
    return {
        name: arrays[name].item()
        for name in ("images", "split")
        if name in arrays and arrays[name].shape == ()
    }


def _read_tuned(file: epath.Path) -> list[dict[str, Any]]:
    table = read_table(file)
    samplers: list[Any] = []
    for name in ("choices", "grids"):
        entries = table.get(name)
        if not isinstance(entries, list):
            raise UserError(f"{file}: does not hold tuned samplers; tune the model again")
        samplers += entries
    known = [each for each in samplers if isinstance(each, dict)]
    return [each for each in known if isinstance(each.get("timesteps"), list)]


def _step_of(table: dict[str, Any]) -> int:
    step = table.get("step")
    return step if type(step) is int else 0


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)
