"""The metrics of the updates between two lines of the log."""

import time

import jax
import numpy as np

from ddpm_jax.errors import NonFiniteLoss
from ddpm_jax.storage.checkpoint import Checkpoints
from ddpm_jax.training.logs import Values


class Window:
    """Collects the metrics of the updates since the last line, on the device until the next."""

    def __init__(
        self, step: int, checkpoints: Checkpoints, batch_size: int, full_rate: float | None
    ):
        """`full_rate` is the updates per second of devices at their peak, None if not known."""
        self.step = step
        self.checkpoints = checkpoints
        self.batch_size = batch_size
        self.full_rate = full_rate
        self.metrics: list[dict] = []
        self.restart_clock()

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Adds the metrics of one update."""
        self.metrics.append(metrics)

    def restart_clock(self) -> None:
        """Restarts the timing. It must leave out work that is no update, such as a checkpoint."""
        self.started = time.monotonic()

    def close(self, measured: Values | None = None) -> Values:
        """Empties the window. Returns the means over it, its rates, and what was `measured`.

        Raises NonFiniteLoss naming the first value that is not finite.
        """
        metrics = jax.device_get(self.metrics)
        steps = len(metrics)
        measured = measured or {}
        self.metrics = []
        for number, values in enumerate(metrics, self.step + 1):
            self._check(number, values)
        self.step += steps
        self._check(self.step, measured)
        means = {name: float(np.mean([values[name] for values in metrics])) for name in metrics[0]}
        rate = steps / (time.monotonic() - self.started)
        rates = {"steps_per_s": rate, "images_per_s": rate * self.batch_size}
        if self.full_rate is not None:
            rates["mfu"] = rate / self.full_rate
        return {**means, "steps": steps, **rates, **measured}

    def _check(self, step: int, values: dict) -> None:
        for name, value in values.items():
            numbers = value if isinstance(value, list) else [value]
            if all(number is None or np.isfinite(number) for number in numbers):
                continue
            self.checkpoints.wait()
            last = self.checkpoints.latest_step
            good = f"the last good checkpoint is {last}"
            if last is None:
                good = "there is no checkpoint yet"
            raise NonFiniteLoss(
                f"{name} is {value} at step {step}; {good}; try a lower optim.learning_rate"
            )
