"""Figures 8 and 9: interpolation between two images, in the latents of the forward process."""

import dataclasses
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ddpm_jax.config import Metavar, Range
from ddpm_jax.data.decode import decode, read_dtype
from ddpm_jax.data.faults import Undecodable
from ddpm_jax.data.images import to_float
from ddpm_jax.data.scaled import as_source
from ddpm_jax.ddpm import DDPM
from ddpm_jax.devices.progress import progress_bar
from ddpm_jax.devices.segments import Progress
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.splits import read_split
from ddpm_jax.figures.base import OptionalSource, RunFigure, diffused, keys_of, steps_at
from ddpm_jax.figures.panel import image_table
from ddpm_jax.keys import START, WAY_BACK, gaussian_noise, seed_key
from ddpm_jax.shapes import AnyKey, Array, Float, PyTree
from ddpm_jax.weights.load import Loaded


@dataclasses.dataclass(frozen=True)
class Interpolate(RunFigure):
    """Mixtures of two images: columns are weights, rows are diffusion steps."""

    between: Annotated[tuple[str, str], Metavar("IMAGE IMAGE")] = ("0", "1")
    """Two images: files, or indices in the run's data set."""
    weights_across: Annotated[int, Range(min=2)] = 11
    """Number of mixing weights, evenly spaced from 0 to 1."""
    slerp: bool = False
    """Interpolate the images' DDIM latents spherically instead; draws no noise."""
    steps: Annotated[int, Range(min=1)] | None = None
    """With --slerp: DDIM steps for each direction; None for all."""
    data: OptionalSource = None
    """The run's images; None for the config's source."""

    @property
    def name(self) -> str:  # type: ignore[override] # fixed in the other figures
        """Stem of the figure's file names."""
        return "interpolate-slerp" if self.slerp else "interpolate"

    def draw(self) -> epath.Path:
        """Writes interpolate.png (interpolate-slerp.png) and .npz.

        The .npz holds weight [W], uint8 source [2,H,W,C] and images [R,W,H,W,C], and their k [R].
        """
        if self.steps is not None and not self.slerp:
            raise UserError("steps: only applies with --slerp; add --slerp, or leave it out")
        model = self.load()
        ddpm = model.ddpm
        params = model.params
        if ddpm.config.model.num_classes and not ddpm.config.model.no_class:
            raise UserError(
                "run: the images are mixed as ones of no class, which this model does not know; "
                "name one that was trained with model.no_class"
            )
        sources = np.stack([read_image(model, name, self.data) for name in self.between])
        x_0 = to_float(sources)
        weights = np.linspace(0, 1, self.weights_across, dtype=np.float32)
        T = ddpm.schedule.num_timesteps
        if self.slerp:
            title = "Interpolation between DDIM latents"
            note = "Top: mixed on a great circle between the DDIM latents. Bottom: mixed pixels."
            ks = [T, 0]
            rows = ["latents", "pixels"]
            with progress_bar(total=2 * (self.steps or T), desc=self.name, unit="step") as bar:
                on_circle = slerp_latents(ddpm, params, x_0, weights, self.steps, bar)
            mixtures = [on_circle, _mix(x_0[:1], x_0[1:], weights)]
        else:
            title = "Interpolation in latent space (Fig. 8 and 9)"
            note = (
                f"k: diffusion steps before the images are mixed; k={T} is pure noise, k=0 mixes "
                "pixels. All weights share the same noise; at large k the noise of the reverse "
                "process decides the image."
            )
            ks = steps_at(T, np.linspace(1, 0, 9))
            rows = [f"k={k}" for k in ks]
            rng = seed_key(self.seed)
            with progress_bar(total=sum(ks), desc=self.name, unit="step") as bar:
                mixtures = [mix_latents(ddpm, params, rng, x_0, weights, k, bar) for k in ks]
        mixed = np.stack([np.asarray(row) for row in mixtures])
        images = ddpm.to_picture(mixed, self.channels)
        shown = ddpm.to_picture(x_0, self.channels)
        ends = np.broadcast_to(shown[:, None], (2, len(rows), *shown.shape[1:]))
        picture = image_table(
            np.concatenate([ends[0][:, None], images, ends[1][:, None]], axis=1),
            rows=rows,
            columns=["image 1", *(f"{weight:.2g}" for weight in weights), "image 2"],
            title=title,
            notes=[f"Columns: the weight of image 2. {note}", *self.notes_of(model)],
        )
        return self.write(
            picture, {"k": np.array(ks), "weight": weights, "source": shown, "images": images}
        )


def mix_latents(
    ddpm: DDPM,
    params: PyTree,
    rng: AnyKey,
    x_0: Float[Array, "b h w c"],
    weights: Float[Array, " weights"],
    k: int,
    progress: Progress = False,
) -> Float[jax.Array, "weights h w c"]:
    """Images [W,H,W,C]: the two x_0 [2,H,W,C] diffused k steps, mixed by `weights` [W], denoised.

    The noise of the two images, and that of the reverse process, is the same for all weights and
    every k.
    """
    noise = gaussian_noise(keys_of(rng, 2), START, ddpm.image_shape)
    x_k = diffused(ddpm, x_0, noise, k)
    mixed = _mix(x_k[:1], x_k[1:], weights)
    if k == 0:
        return mixed
    same_noise = jnp.repeat(keys_of(jax.random.fold_in(rng, WAY_BACK), 1), len(weights))
    return ddpm.reverse(params, same_noise, mixed, k, progress=progress)[0]


def slerp_latents(
    ddpm: DDPM,
    params: PyTree,
    x_0: Float[Array, "b h w c"],
    weights: Float[Array, " weights"],
    steps: int | None,
    progress: Progress = False,
) -> Float[jax.Array, "weights h w c"]:
    """Images [W,H,W,C] of latents on the great circle between those of the two x_0 [2,H,W,C]."""
    a, b = ddpm.encode(params, x_0, steps=steps, progress=progress)
    return ddpm.decode(params, slerp(a, b, weights), steps=steps, progress=progress)


def slerp(
    a: Float[jax.Array, "*shape"], b: Float[jax.Array, "*shape"], weights: Float[Array, " weights"]
) -> Float[jax.Array, "weights *shape"]:
    """Spherical interpolation [W, ...] between arrays `a` and `b` by `weights` [W].

    Song et al. 2021, Appendix D.5.
    """
    cosine = jnp.vdot(a, b) / (jnp.linalg.norm(a.ravel()) * jnp.linalg.norm(b.ravel()))
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))
    weights = weights.reshape(-1, *(1,) * a.ndim)
    # For nearly equal directions, use the straight line, the limit of sin(w angle) / sin(angle).
    near = angle < 1e-4
    sine = jnp.where(near, 1.0, jnp.sin(angle))
    of_a = jnp.where(near, 1 - weights, jnp.sin((1 - weights) * angle) / sine)
    of_b = jnp.where(near, weights, jnp.sin(weights * angle) / sine)
    return of_a * a[None] + of_b * b[None]


def read_image(model: Loaded, name: str, data: str | None = None) -> np.ndarray:
    """Image `name` [H,W,C], as a Source reads it: a file, or an index in the run's data set.

    Raises UserError if it is neither.
    """
    file = Path(name).expanduser()
    image_shape = model.ddpm.image_shape
    config = model.ddpm.config.data
    if name.isascii() and name.isdigit() and not file.is_file():
        source = read_split(model, "train", data).source
        if int(name) >= len(source):
            raise UserError(
                f"between: there is no image {name}; choose an index from 0 to {len(source) - 1}"
            )
        return source.read(np.array([int(name)]))[0]
    dtype = read_dtype(config.value_kind)
    try:
        return as_source(decode(file.read_bytes(), image_shape, file.name, dtype=dtype), config)
    except UserError as error:
        raise UserError(f"between: {str(error).removeprefix('data: ')}") from error
    except Exception as error:  # Pillow raises errors of many kinds.
        reason = getattr(error, "strerror", None) or "not an image that can be decoded"
        reason = str(error) if isinstance(error, Undecodable) else reason
        raise UserError(
            f"between: {name} cannot be read: {reason}; name an image file or an index"
        ) from error


def _mix(a, b, weights):
    weights = weights.reshape(-1, *(1,) * (a.ndim - 1))
    return (1 - weights) * a + weights * b
