"""What images shall show: labels and guidance, as users pass them and as programs take them."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ddpm_jax.config import Checked, Model, Range
from ddpm_jax.devices.mesh import place
from ddpm_jax.diffusion import DenoiseFn
from ddpm_jax.errors import UserError
from ddpm_jax.guidance import NO_CLASS, check_guidance, guided
from ddpm_jax.shapes import Array, Float, Int, Integer, PyTree


@dataclasses.dataclass(frozen=True)
class Guide(Checked):
    """What images shall show, as users choose it for any number of them."""

    GROUP: ClassVar[str] = ""
    LONGEST: ClassVar[int] = 65_536

    labels: Annotated[tuple[int, ...] | None, Range(min=NO_CLASS)] = None
    """Classes: of k labels, image i has number i modulo k; -1 is no class."""
    guidance: float = 1.0
    """With --labels: above 1 moves images further towards their class, at twice the cost."""
    guidance_interval: tuple[int, int] | None = None
    """With --guidance: LO HI guides at the steps LO <= t < HI of the T alone."""

    def check(self, model: Model) -> None:
        """Raises UserError if it does not fit the model."""
        if self.labels is not None and not self.labels:
            raise UserError("labels: are none; name one or more, or leave them out")
        n = 1 if self.labels is None else len(self.labels)
        conditions(model, self.labels, n, self.guidance, self.guidance_interval)

    def of(self, indices: Integer[Array, " n"]) -> dict[str, Any]:
        """The arguments of `DDPM.sample` for images of these numbers."""
        labels = None
        if self.labels is not None:
            labels = np.array(self.labels, np.int32)[np.asarray(indices) % len(self.labels)]
        return {**self.recorded, "labels": labels}

    @property
    def recorded(self) -> dict[str, Any]:
        """The fields, as they are recorded in files; nothing where there are no labels."""
        return {} if self == UNGUIDED else dataclasses.asdict(self)


UNGUIDED = Guide()
"""No class."""


class Condition(NamedTuple):
    """What the images of a batch shall show; None leaves a part out of the program."""

    labels: Int[Array, " b"] | None = None
    """Their classes, -1 for none."""
    guidance: Float[Array, ""] | None = None
    """None for 1, which costs nothing."""
    interval: Float[Array, " 2"] | None = None
    """(lo, hi): the original steps lo <= t < hi are guided; None for all."""

    def of(self, rows: np.ndarray, mesh: Mesh | None) -> "Condition":
        """That of some of the images, on the mesh."""
        if self.labels is None:
            return self
        return self._replace(labels=place(self.labels[rows], mesh))


FREE = Condition()
"""No class."""


def conditions(
    model: Model,
    labels: Any,
    n: int,
    guidance: float = 1.0,
    interval: Sequence[float] | None = None,
) -> Condition:
    """The Condition of n images in the host's memory. Raises UserError for what does not fit."""
    check_guidance(guidance, interval)
    labels = checked_labels(labels, n, model)
    if guidance == 1:
        if interval is not None:
            raise UserError("guidance_interval: acts on a guidance other than 1; give that, too")
        return FREE if labels is None else Condition(np.asarray(labels))
    if labels is None:
        raise UserError("guidance: leads images towards their class; give labels, too")
    if not model.no_class:
        raise UserError(
            "guidance: needs a model that knows images without a class, and this one does not; "
            "leave it out"
        )
    ends = None if interval is None else np.array(interval, np.float32)
    return Condition(np.asarray(labels), np.array(guidance, np.float32), ends)


def denoise_fn_of(ddpm: Any, params: PyTree, condition: Condition) -> DenoiseFn:
    """The network as a function of x_t and the original steps t."""
    conditional = functools.partial(ddpm.denoise, params)
    if condition.labels is None:
        return conditional
    guidance = 1.0 if condition.guidance is None else condition.guidance
    return guided(conditional, condition.labels, guidance, condition.interval)


def checked_labels(labels: Any, n: int, model: Model) -> Any:
    """`labels` as int32 [n], or None for no class for all.

    They are an int, for all, or integers [n]: 0, ..., num_classes - 1, or -1 for no class. Raises
    UserError if they do not fit the model; the values of traced ones are not known, and not
    checked.
    """
    if labels is None:
        if model.num_classes and not model.no_class:
            raise UserError(
                "labels: this model knows no images without a class; give labels from 0 to "
                f"{_last(model)}"
            )
        return None
    if not model.num_classes:
        raise UserError("labels: this model was trained without classes; leave them out")
    traced = isinstance(labels, jax.core.Tracer)
    numbers = labels if traced else np.asarray(labels)
    if not jnp.issubdtype(numbers.dtype, np.integer):
        raise UserError(f"labels: must be integers, got {numbers.dtype}")
    if numbers.shape not in ((), (n,)):
        raise UserError(f"labels: must be one or [{n}], one per image, got {list(numbers.shape)}")
    if not traced and numbers.size:
        _check_range(numbers, model)
    return jnp.broadcast_to(jnp.asarray(numbers, jnp.int32), (n,))


def _check_range(numbers: np.ndarray, model: Model) -> None:
    least = NO_CLASS if model.no_class else 0
    outside = numbers[(numbers < least) | (numbers > _last(model))]
    if outside.size:
        no_class = ", or -1 for no class" if model.no_class else ""
        raise UserError(
            f"labels: must be from 0 to {_last(model)}{no_class}, got {outside.flat[0]}"
        )


def _last(model: Model) -> int:
    return model.class_rows - 1 - model.no_class


def class_rows(labels: Any, n: int, model: Model) -> Any:
    """The rows int32 [n] of the class embedding for checked `labels`; None without classes."""
    if not model.num_classes:
        return None
    no_class = model.class_rows - 1
    if labels is None:
        return jnp.full(n, no_class, jnp.int32)
    return jnp.where(labels == NO_CLASS, no_class, labels)
