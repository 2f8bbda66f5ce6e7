"""All that a report reads of one run directory, whether it is finished or trains now."""

import dataclasses
import functools
import logging
import math
import os
import shlex
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from ddpm_jax.config import Config
from ddpm_jax.data.names import shown
from ddpm_jax.ddpm import DDPM
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.evaluate import LEAST
from ddpm_jax.report.curves import Log, read_log
from ddpm_jax.report.results import Results, read_results
from ddpm_jax.storage.files import path_of, read_table
from ddpm_jax.storage.restore import steps_of
from ddpm_jax.storage.run import is_run, read_config

log = logging.getLogger(__name__)

PAPERS = 50_000
"""Samples that the paper evaluates, and `ddpm-jax evaluate` takes by default."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run directory holds."""

    path: str
    """As the user named it."""
    name: str
    """Short, and another one than that of each other run in the report."""
    config: Config
    record: dict[str, Any]
    """run.json; empty where it cannot be read."""
    log: Log
    checkpoints: list[int]
    """Their steps, ascending."""
    grids: dict[int, epath.Path]
    """{step: PNG file} of samples drawn on the way, ascending."""
    results: Results
    faults: list[str]
    """A line for each thing that could not be read."""

    @property
    def step(self) -> int:
        """The last step that anything is known of."""
        return max(self.log.step, *self.checkpoints, *self.grids, 0)

    @property
    def is_finished(self) -> bool:
        """Whether it has made all its steps."""
        return self.step >= self.config.train.steps

    @functools.cached_property
    def ddpm(self) -> DDPM:
        """The model, without weights."""
        return DDPM(self.config)

    @functools.cached_property
    def parameters(self) -> int:
        """How many numbers the network learns."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.ddpm.shapes))

    @property
    def starts(self) -> list[dict[str, Any]]:
        """What run.json says of each start."""
        starts = self.record.get("starts")
        if not isinstance(starts, list):
            return []
        return [each for each in starts if isinstance(each, dict)]

    @property
    def fingerprint(self) -> str | None:
        """That of the images it was trained on, where it is known."""
        found = self.record.get("data_fingerprint")
        return found if isinstance(found, str) else None

    @property
    def home(self) -> epath.Path:
        """The folder."""
        return path_of(self.path)

    @property
    def evaluate_command(self) -> str:
        """The command that compares samples with real images, with as many samples as images."""
        images = self.record.get("images")
        few = isinstance(images, int) and LEAST <= images < PAPERS
        return self.command("evaluate", f"-n {images}" if few else "")

    def command(self, words: str, options: str = "") -> str:
        """`ddpm-jax WORDS RUN OPTIONS` as a shell takes it."""
        return f"ddpm-jax {words} {shlex.quote(shown(self.path))} {options}".rstrip()


def read_runs(paths: Sequence[str]) -> list[Run]:
    """The runs of these directories.

    Raises UserError naming a path that is no run directory, is named twice or has a damaged config.
    """
    homes = [path.rstrip("/") if "://" in path else os.path.abspath(path) for path in paths]
    twice = [path for place, path in enumerate(homes) if path in homes[:place]]
    if twice:
        raise UserError(f"runs: {shown(twice[0])} is named twice; name each run once")
    return [_read_run(path, name) for path, name in zip(paths, _names(homes), strict=True)]


def _names(homes: list[str]) -> list[str]:
    """The last part of each path, or as many parts as tell them apart."""
    parts = [path.split("/") for path in homes]
    most = max(map(len, parts))
    names = (["/".join(each[-count:]) for each in parts] for count in range(1, most + 1))
    apart = next(each for each in names if len(set(each)) == len(each))
    return [shown(name) for name in apart]


def _read_run(path: str, name: str) -> Run:
    if not is_run(path):
        raise UserError(
            f"{shown(path)}: not a run directory, which a report is of; name the folder that "
            "ddpm-jax train wrote"
        )
    home = path_of(path)
    config = read_config(path)
    results = read_results(home)
    faults = list(results.faults)
    record: dict[str, Any] = {}
    try:
        record = read_table(home / "run.json")
    except UserError as error:
        faults.append(str(error))
    lines = read_log(home)
    if lines.damaged:
        is_one = lines.damaged == 1
        faults.append(
            f"{home / 'metrics.jsonl'}: {lines.damaged} "
            f"{'line is' if is_one else 'lines are'} damaged and left out of the curves"
        )
    for fault in faults:
        log.warning("%s", fault)
    return Run(path, name, config, record, lines, steps_of(path), _grids(home), results, faults)


def _grids(home: epath.Path) -> dict[int, epath.Path]:
    folder = home / "samples"
    if not folder.is_dir():
        return {}
    found = {
        int(file.stem): file
        for file in folder.iterdir()
        if file.suffix == ".png" and file.stem.isdecimal()
    }
    return dict(sorted(found.items()))
