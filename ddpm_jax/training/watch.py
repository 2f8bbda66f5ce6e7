"""All that a run measures of its averaged weights as it trains."""

import logging
import math
import typing

from etils import epath

from ddpm_jax.config.choices import Metric
from ddpm_jax.devices.mesh import replicate
from ddpm_jax.devices.processes import agreed
from ddpm_jax.errors import UserError
from ddpm_jax.shapes import PyTree
from ddpm_jax.storage.best import Best, best_of, values_of
from ddpm_jax.storage.checkpoint import Checkpoints
from ddpm_jax.training import holdout
from ddpm_jax.training.logs import Values
from ddpm_jax.training.prepare import Prepared
from ddpm_jax.training.quality import Quality, check_quality, names_of_samples, why_no_bound
from ddpm_jax.training.signals import UntilSignal
from ddpm_jax.training.update import TrainState

log = logging.getLogger(__name__)

NEEDS = {
    "holdout_loss": "train.eval_every and data.holdout above 0",
    "bits_per_dim": "train.evaluate_every and data.holdout above 0",
    "fid": "train.evaluate_every above 0 and train.inception",
    "kid": "train.evaluate_every above 0 and train.inception",
    "proxy_fid": "train.evaluate_every above 0, and no train.inception",
    "proxy_kid": "train.evaluate_every above 0, and no train.inception",
}
"""The settings by which a run measures each metric."""


class Watch:
    """Measures the average of a run's weights, and finds its best checkpoint."""

    def __init__(
        self, prepared: Prepared, quality: Quality | None, run: epath.Path, checkpoints: Checkpoints
    ):
        """Open it after the log, which then holds what counts of earlier starts.

        `quality` is None where train.evaluate_every is 0.
        """
        self.prepared = prepared
        self.quality = quality
        self.checkpoints = checkpoints
        self.held_out = holdout.spread(prepared.held_out, prepared.config.train.eval_images)
        self.overfitting = holdout.Overfitting(values_of(run, "holdout_loss"))
        self.metric = prepared.config.checkpoint.best
        self.best = None if self.metric is None else _agreed(best_of(run, self.metric))
        checkpoints.best = None if self.best is None else self.best.step

    @property
    def holds_out(self) -> bool:
        """Whether there are images for a held-out loss."""
        return len(self.held_out) > 0

    def compare(self, state: TrainState) -> Values:
        """The held-out loss, its bands of t and the gaps to the training images' own loss."""
        compared = holdout.compare(
            self.prepared.ddpm,
            self._params(state),
            self.prepared.source,
            self.held_out,
            self.prepared.train,
        )
        self.overfitting.add(int(state.step), compared)
        return compared.values

    def evaluate(self, state: TrainState, progress: UntilSignal) -> dict[str, float]:
        """FID, KID and bits/dim by their names in the log; ends as `progress` does."""
        assert self.quality is not None  # It is due where train.evaluate_every is above 0.
        return self.quality.measure(self._params(state), progress)

    def improves(self, step: int, values: Values) -> bool:
        """Whether `step` is the best so far by its `values`; its checkpoint then stays."""
        value = values.get(self.metric) if self.metric else None
        if value is None:
            return False
        if not agreed(self.best is None or value < self.best.value):
            return False
        self.best = Best(step, value)
        self.checkpoints.best = step
        return True

    def conclude(self) -> None:
        """Logs which checkpoint is the best."""
        if self.best is not None:
            log.info(
                "best %s so far: %.5g at step %d (--step best)",
                self.metric,
                self.best.value,
                self.best.step,
            )

    def _params(self, state: TrainState) -> PyTree:
        return replicate(state.ema_params, self.prepared.mesh)


def check_watch(prepared: Prepared) -> None:
    """Raises UserError for settings of the watching that cannot be used in this run.

    Logs a line if it evaluates, and bits/dim cannot be measured.
    """
    config = prepared.config
    if config.train.evaluate_every:
        check_quality(prepared)
        reason = why_no_bound(prepared)
        if reason is not None:
            log.warning("train.evaluate_every: %s, so bits/dim is not measured", reason)
    best = config.checkpoint.best
    there = measured_names(prepared)
    if best is not None and best not in there:
        raise UserError(
            f"checkpoint.best: {best} is not measured in this run; it needs {NEEDS[best]} "
            f"(measured is {' '.join(there) or 'nothing'})"
        )


def measured_names(prepared: Prepared) -> list[str]:
    """The metrics that this run measures, of those that its best checkpoint can be chosen by."""
    config = prepared.config
    names = set()
    if config.train.eval_every and len(prepared.held_out):
        names.add("holdout_loss")
    if config.train.evaluate_every:
        names.update(names_of_samples(config))
        if why_no_bound(prepared) is None:
            names.add("bits_per_dim")
    return [name for name in typing.get_args(Metric) if name in names]


def _agreed(best: Best | None) -> Best | None:
    """Process 0's; the value is that of this process, and decides nothing in the others."""
    step = int(agreed(-1 if best is None else best.step))
    if step < 0:
        return None
    return best if best is not None and best.step == step else Best(step, math.inf)
