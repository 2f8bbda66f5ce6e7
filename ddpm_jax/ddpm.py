"""DDPM: the schedule, the network and the image's shape bound together; what users call."""

import dataclasses
import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import losses
from ddpm_jax.calibration import Calibration
from ddpm_jax.calls import bounds, choice, edits, programs, samples
from ddpm_jax.calls.batches import Drawing, share_rows
from ddpm_jax.calls.conditions import Condition, checked_labels, class_rows, conditions
from ddpm_jax.calls.inputs import (
    check_concrete,
    check_count,
    check_key,
    check_keys,
    check_numbers,
    checked_images,
    checked_params,
)
from ddpm_jax.calls.ready import Ready, ready
from ddpm_jax.config import Config, SamplerName, names_where, value_of
from ddpm_jax.data.scaling import Scaling
from ddpm_jax.data.view import View
from ddpm_jax.devices.segments import Progress, moving, watched
from ddpm_jax.guidance import NO_CLASS
from ddpm_jax.keys import (
    DROPOUT,
    LABEL,
    NOISE,
    example_keys,
    fold,
    gaussian_noise,
    happens,
    random_times,
)
from ddpm_jax.likelihood import BitsAndCells, BitsPerDim
from ddpm_jax.models import TILES, UNet, parameter_shapes
from ddpm_jax.operators import Operator
from ddpm_jax.sampler import NOTHING_TUNED, Sampler, Tuned, as_sampler
from ddpm_jax.samplers import start_state
from ddpm_jax.schedule import Schedule, make_schedule
from ddpm_jax.shapes import AnyKey, AnyKeys, Array, Float, Int, Integer, PyTree, Shaped

Labels = Integer[Array, " b"] | int | None
"""The classes of images, -1 for no class: one for all of them, or one each."""

# The order in which the first digests hashed these fields; saved files compare them.
HASHED_FIRST = (
    "diffusion.prediction",
    "diffusion.variance",
    "diffusion.clip",
    "model.norm_groups",
    "model.dtype",
    "data.image_shape",
)

COMPILED = tuple(names_where(Config, lambda field: field.compiled))
"""The names of the fields that a compiled program may read."""


@dataclasses.dataclass(frozen=True)
class DDPM:
    """The model that `config` describes.

    Holds no weights; frozen and hashable, so jit takes it as static. Two are equal if no program
    can tell them apart: jit then compiles once for both. Their configs may differ in what the loop
    around the programs alone reads, such as train.steps.
    """

    config: Config
    calibration: Calibration | None = None
    """The errors that were measured of the weights."""
    tuned: Tuned = NOTHING_TUNED
    """The samplers that were tuned to the weights."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DDPM):
            return NotImplemented
        return self._compiled == other._compiled

    def __hash__(self) -> int:
        return hash(self._compiled)

    @functools.cached_property
    def _compiled(self) -> tuple:
        """All that a program can tell of this model."""
        values = tuple(value_of(self.config, name) for name in COMPILED)
        return values, self.calibration, self.tuned

    @functools.cached_property
    def schedule(self) -> Schedule:
        """The diffusion process."""
        diffusion = self.config.diffusion
        return make_schedule(
            diffusion.schedule, diffusion.num_timesteps, **diffusion.schedule_parameters
        )

    @functools.cached_property
    def network(self) -> UNet:
        """The Flax module."""
        model = self.config.model
        return UNet(
            out_channels=self.image_shape[-1] * (2 if self.config.diffusion.learns_variance else 1),
            base_channels=model.base_channels,
            channel_multipliers=model.channel_multipliers,
            num_res_blocks=model.num_res_blocks,
            attention_resolutions=model.attention_resolutions,
            dropout=model.dropout,
            norm_groups=model.norm_groups,
            dtype=jnp.dtype(model.dtype),
            remat=model.remat,
            class_rows=model.class_rows,
        )

    @functools.cached_property
    def process_digest(self) -> str:
        """A hash of all that, beside the parameters, decides which image a key gives."""
        first = tuple(value_of(self.config, name) for name in HASHED_FIRST)
        hashed = hashlib.blake2b(repr(first).encode(), digest_size=8)
        hashed.update(np.asarray(self.schedule.betas))
        default = Config()
        for name in names_where(Config, lambda field: field.images and not field.through_betas):
            value = value_of(self.config, name)
            # A default leaves the digest as it was before there was such a field.
            if name not in HASHED_FIRST and value != value_of(default, name):
                hashed.update(f"{name} {value!r}".encode())
        if self.config.model.dtype != "float32":  # Before, x_t was rounded to it.
            hashed.update(b"float32 ends")
        return hashed.hexdigest()

    @functools.cached_property
    def shapes(self) -> PyTree:
        """The shapes and dtypes of the parameters, as a tree of jax.ShapeDtypeStruct."""
        return parameter_shapes(self.network, self.image_shape)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image."""
        return self.config.data.image_shape

    @property
    def levels(self) -> int | None:
        """How many levels the data's values have, which the bound counts; None if continuous."""
        return self.config.data.value_kind.levels

    @functools.cached_property
    def scaling(self) -> Scaling:
        """Between the data's values and the model's units."""
        return Scaling(self.config.data)

    def from_data(self, values: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Images [...,H,W,C] of the data's own values, as the model takes them.

        See `Scaling.from_data`: uint8 is x / 127.5 - 1. Raises UserError for values that the
        config's data.values does not allow.
        """
        return self.scaling.from_data(values)

    def to_data(self, x: Float[Array, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
        """Images x [...,H,W,C] of the model, such as samples, in the data's own values and type.

        See `Scaling.to_data`. Raises UserError for images that are not finite.
        """
        return self.scaling.to_data(x)

    def to_picture(
        self, x: Float[Array, "*shape"], channels: tuple[int, ...] | None = None
    ) -> Shaped[np.ndarray, "*picture"]:
        """uint8 pictures for the eye of images x [...,H,W,C] of the model, such as samples.

        `channels` are those that are shown, counted from 1; None is for all. Raises UserError for
        a channel that the images do not have. See `data.view.View` for what black and white are.
        """
        return View(self.config.data, channels)(x)

    def init(self, rng: AnyKey) -> PyTree:
        """Fresh parameters: a tree of float32 arrays."""
        check_key(rng)
        return programs.init(self, rng)

    def denoise(
        self,
        params: PyTree,
        x_t: Float[Array, "b h w c"],
        t: Int[Array, " b"],
        labels: Labels = None,
    ) -> Float[jax.Array, "b h w outputs"]:
        """The network's output for x_t at the original 0-based steps t; no dropout.

        It has 2 C channels where the variance is learned. `labels` are the images' classes: one
        for all, or integers [B]; -1 is no class, and None no class for all.
        """
        tiles: PyTree = {}
        if isinstance(params, Ready):
            params, tiles = params
        params = checked_params(params, self.shapes)
        x_t = checked_images("x_t", x_t, self.image_shape)
        check_numbers("t", t, x_t.shape[0])
        rows = self._class_rows(labels, x_t.shape[0])  # len takes no symbolic size.
        variables = {"params": params, TILES: tiles}
        return jnp.asarray(self.network.apply(variables, x_t, t, classes=rows))

    def _class_rows(self, labels: Labels, n: int):
        model = self.config.model
        return class_rows(checked_labels(labels, n, model), n, model)

    def loss(
        self,
        params: PyTree,
        rng: AnyKey,
        x_0: Float[Array, "b h w c"],
        *,
        labels: Labels = None,
        rows: Integer[Array, " b"] | None = None,
        train: bool = False,
    ) -> Float[jax.Array, " b"]:
        """config.diffusion.loss of images x_0 in [-1, 1], t uniform.

        `labels` as in `denoise`. Dropout, that of labels too, is on only if `train`. Example i
        draws its t, noise and dropout from fold_in(rng, rows[i]); `rows` are 0, ..., B - 1 unless
        x_0 is a part of a batch. Raises TypeError for images that are not floats.
        """
        check_key(rng)
        x_0 = checked_images("x_0", x_0, self.image_shape)
        rows = jnp.arange(len(x_0), dtype=jnp.uint32) if rows is None else rows
        check_numbers("rows", rows, len(x_0))
        keys = example_keys(rng, rows)
        return self.loss_of_examples(params, keys, x_0, labels=labels, train=train)

    def loss_of_examples(
        self,
        params: PyTree,
        keys: AnyKeys,
        x_0: Float[Array, "b h w c"],
        *,
        labels: Labels = None,
        train: bool = False,
    ) -> Float[jax.Array, " b"]:
        """As `loss`, with the key of each example."""
        params = checked_params(params, self.shapes)
        x_0 = checked_images("x_0", x_0, self.image_shape)
        check_keys(keys, len(x_0))
        diffusion = self.config.diffusion
        t = random_times(keys, self.schedule.num_timesteps)
        noise = gaussian_noise(keys, NOISE, x_0.shape[1:])
        dropout_keys = fold(keys, DROPOUT) if train else None
        if train:
            labels = self._with_dropout(keys, labels)
        classes = self._class_rows(labels, len(x_0))

        def denoise_fn(x_t, timesteps):
            return self.network.apply({"params": params}, x_t, timesteps, dropout_keys, classes)

        return losses.training_loss(
            diffusion.loss,
            self.schedule,
            denoise_fn,
            x_0,
            t,
            noise,
            prediction=diffusion.prediction,
            variance=diffusion.variance,
            weight=losses.weight_of(diffusion.weighting, diffusion.min_snr_gamma),
            levels=self.levels,
        )

    def _with_dropout(self, keys: AnyKeys, labels: Labels) -> Labels:
        """The labels, some of them replaced by no class (Ho & Salimans 2022, Algorithm 1)."""
        rate = self.config.train.label_dropout
        if labels is None or not rate or not self.config.model.no_class:
            return labels
        return jnp.where(happens(fold(keys, LABEL), rate, ()), NO_CLASS, labels)

    def resolve(self, sampler: Sampler) -> Sampler:
        """The Sampler with its name and steps, in its simplest form, checked against the model.

        Steps of a measured grid are taken from what was measured of the weights. Raises UserError
        for what does not fit, or was not measured.
        """
        return choice.resolve(self, sampler)

    def sample(
        self,
        params: PyTree,
        rng: AnyKey,
        n: int,
        *,
        labels: Labels = None,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        start: int = 0,
        batch_size: int | None = None,
        sampler: Sampler | SamplerName | None = None,
        progress: Progress = False,
        **options: Any,
    ) -> np.ndarray:
        """Images start, ..., start + n - 1 of the key `rng`, float32 [n,H,W,C] in [-1, 1].

        `labels` are their classes: one for all, or integers [n], labels[j] of image start + j; -1
        is no class, and None no class for all. `guidance` above 1 moves images further towards
        their class, at twice the cost (see `guidance.guided`); with `guidance_interval` (lo, hi) at
        the original steps lo <= t < hi alone.

        `sampler` is a Sampler, or the name of one with its fields as `options`; None is ancestral
        sampling, or with grid="tuned" the choice of `ddpm-jax tune`. For example sampler="ddim",
        steps=50, or steps=8, grid="tuned".

        Image i is made from fold_in(rng, i) alone: the same for any n, start, batch_size and
        number of devices. `batch_size` (default 64 a device) bounds the memory; the result is in
        the host's memory. Where params are on a mesh of several devices, these share the work.
        `progress` shows a bar of the steps of all batches, or is a tqdm that they move. Ctrl-C
        ends it within about a second, or one step's time.

        Raises ValueError for a negative n or start, a batch_size below 1, or a sampler that does
        not fit the model, UserError for labels or a guidance that do not, and NonFiniteSamples
        with the step if x stops being finite.
        """
        n = check_count("n", n)
        start = check_count("start", start)
        if n < 0 or start < 0 or start + n > 2**32:
            raise ValueError(
                "n and start: must satisfy 0 <= start <= start + n <= 2**32, "
                f"got n {n} and start {start}"
            )
        chosen = self.resolve(as_sampler(sampler, **options))
        check_concrete("sample", params=params, rng=rng, labels=labels)
        condition = conditions(self.config.model, labels, n, guidance, guidance_interval)
        runs = [samples.Run(start, n, condition)]
        (result,) = samples.draw(self, params, rng, runs, chosen, batch_size, progress)
        return result

    def inpaint(
        self,
        params: PyTree,
        rng: AnyKey,
        images: Float[Array, "b h w c"],
        mask: Shaped[Array, "..."],
        *,
        steps: int = 250,
        resample: int = 10,
        jump: int = 10,
        labels: Labels = None,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        start: int = 0,
        batch_size: int | None = None,
        progress: Progress = False,
    ) -> np.ndarray:
        """Images float32 [N,H,W,C] that are `images` where `mask` is 1, and drawn anew elsewhere.

        RePaint (Lugmayr et al. 2022), see `editing.inpaint`: ancestral sampling with `steps` of the
        T steps (all where there are fewer), which goes `jump` steps back up again and again, to
        come down `resample` times in all; 250 steps call the network 2,410 times. `images` are
        floats in [-1, 1], and `mask`, of bool or numbers from 0 to 1, is [H,W], [H,W,1] or
        [1 or N,H,W,1]. Known pixels come back bit for bit.
        The other arguments, and what image i depends on, are as in `sample`. Raises UserError for
        what does not fit, and TypeError for images that are not floats.
        """
        images = checked_images("images", images, self.image_shape)
        T = self.schedule.num_timesteps
        steps = check_count("steps", steps)
        sampler = self.resolve(Sampler("ancestral", min(steps, T)))
        passes = (check_count("resample", resample), check_count("jump", jump))
        drawing = Drawing(labels, guidance, guidance_interval, start, batch_size, progress)
        return edits.inpaint(self, params, rng, images, mask, sampler, passes, drawing)

    def vary(
        self,
        params: PyTree,
        rng: AnyKey,
        images: Float[Array, "b h w c"],
        strength: float,
        *,
        labels: Labels = None,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        start: int = 0,
        batch_size: int | None = None,
        sampler: Sampler | SamplerName | None = None,
        progress: Progress = False,
        **options: Any,
    ) -> np.ndarray:
        """Variations float32 [N,H,W,C] of `images` [N,H,W,C] in [-1, 1].

        SDEdit (Meng et al. 2021), see `editing.vary`: the images are diffused by the first
        `strength` of the T steps, and come back from there: near 0 they stay, at 1 nothing of them
        is left. A number of `steps` lies among those alone. The other arguments, and what image i
        depends on, are as in `sample`. Raises UserError for what does not fit, and TypeError for
        images that are not floats.
        """
        images = checked_images("images", images, self.image_shape)
        chosen = self.resolve(as_sampler(sampler, **options))
        drawing = Drawing(labels, guidance, guidance_interval, start, batch_size, progress)
        return edits.vary(self, params, rng, images, strength, chosen, drawing)

    def restore(
        self,
        params: PyTree,
        rng: AnyKey,
        y: Float[Array, "b h w c"],
        operator: Operator,
        *,
        noise: float = 0.0,
        r2: Float[Array, " T"] | None = None,
        labels: Labels = None,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        start: int = 0,
        batch_size: int | None = None,
        sampler: Sampler | SamplerName | None = None,
        progress: Progress = False,
        **options: Any,
    ) -> np.ndarray:
        """Images x float32 [N,H,W,C] of which `operator` makes the damaged ones: y = A x + noise.

        `operator` is one of `ddpm_jax.operators`: downscale, grey, mask or blur, or some put
        together; `y` [N,h,w,c] is what it makes of images in [-1, 1], and `noise` the standard
        deviation of the noise on it. Without noise A x = y (DDNM, Wang et al. 2022); with noise the
        gradient of log p(y | x_t) leads there (PiGDM, Song et al. 2023), which takes about three
        times as long. `r2` [T] is the variance of x_0 given x_t at each step, None for
        1 - alphas_bar. See `editing.conditioned`. The other arguments, and what image i depends on,
        are as in `sample`. Raises UserError for what does not fit.
        """
        chosen = self.resolve(as_sampler(sampler, **options))
        drawing = Drawing(labels, guidance, guidance_interval, start, batch_size, progress)
        return edits.restore(self, params, rng, y, operator, noise, r2, chosen, drawing)

    def reverse(
        self,
        params: PyTree,
        keys: AnyKeys,
        x: Float[Array, "b h w c"],
        start: int,
        stop: int = 0,
        *,
        labels: Labels = None,
        progress: Progress = False,
    ) -> tuple[Float[jax.Array, "b h w c"], Float[jax.Array, "b h w c"]]:
        """Algorithm 2 between any two steps: (x, x_0).

        x was diffused `start` times (T is pure noise, k is q_sample at t = k - 1), the
        x that is returned `stop` times (0 is an image); x_0 is the prediction of the last step.
        Row i's noise at step t comes from fold_in(keys[i], t). `labels` as in `denoise`,
        `progress` as in `sample`.
        Raises ValueError unless 0 <= stop < start <= T, and NonFiniteSamples if x does not stay
        finite.
        """
        params = ready(self, checked_params(params, self.shapes))
        x = checked_images("x", x, self.image_shape)
        check_keys(keys, len(x))
        start = check_count("start", start)
        stop = check_count("stop", stop)
        T = self.schedule.num_timesteps
        if not 0 <= stop < start <= T:
            raise ValueError(
                f"start and stop: must satisfy 0 <= stop < start <= {T}, got {start} and {stop}"
            )
        steps = np.arange(stop, start)[::-1]
        with moving(progress, len(steps), "reverse steps") as move:

            def run(keys, x, *labels):
                args = (self, params, Condition(*labels), keys, np.int32(start))
                return watched(programs.reverse, args, (x, x), steps, move)

            return share_rows(run, params, keys, x, *self._given(labels, len(x)))

    def encode(
        self,
        params: PyTree,
        x_0: Float[Array, "b h w c"],
        *,
        labels: Labels = None,
        steps: int | None = None,
        progress: Progress = False,
    ) -> Float[jax.Array, "b h w c"]:
        """The DDIM latents x_T of images x_0 in [-1, 1].

        `labels` as in `denoise`, `steps` and `progress` as in `sample`; `decode` with as many steps
        takes them back to about x_0. Raises TypeError for images that are not floats.
        """
        params = ready(self, checked_params(params, self.shapes))
        x_0 = checked_images("x_0", x_0, self.image_shape)
        sampler = self._ddim(steps)
        steps_up = sampler.timesteps_of(self.config.diffusion)
        with moving(progress, len(steps_up), "encoding") as move:

            def run(x_0, *labels):
                args = (self, sampler, params, Condition(*labels))
                return watched(programs.encode, args, x_0, steps_up, move)

            return share_rows(run, params, x_0, *self._given(labels, len(x_0)))

    def decode(
        self,
        params: PyTree,
        x_T: Float[Array, "b h w c"],
        *,
        labels: Labels = None,
        steps: int | None = None,
        progress: Progress = False,
    ) -> Float[jax.Array, "b h w c"]:
        """Images x_0 of latents x_T: DDIM with eta = 0, nothing clipped."""
        params = ready(self, checked_params(params, self.shapes))
        x_T = checked_images("x_T", x_T, self.image_shape)
        sampler = self._ddim(steps)
        steps_down = sampler.timesteps_of(self.config.diffusion)[::-1]
        with moving(progress, len(steps_down), "decoding") as move:

            def run(x_T, *labels):
                state = start_state(None, self.image_shape, x_T)
                args = (self, sampler, False, params, Condition(*labels), None)
                return watched(programs.advance, args, state, steps_down, move).x

            return share_rows(run, params, x_T, *self._given(labels, len(x_T)))

    def _given(self, labels: Labels, n: int) -> list[np.ndarray]:
        """The labels of n images, checked; nothing for no class."""
        checked = conditions(self.config.model, labels, n).labels
        return [] if checked is None else [np.asarray(checked)]

    def _ddim(self, steps: int | None) -> Sampler:
        return self.resolve(Sampler("ddim", steps))

    def bits_per_dim(
        self,
        params: PyTree,
        rng: AnyKey,
        x_0: Float[Array, "b h w c"],
        *,
        labels: Labels = None,
        start: int = 0,
        batch_size: int | None = None,
        sampler: Sampler | SamplerName | None = None,
        cells: bool = False,
        progress: Progress = False,
    ) -> BitsPerDim | BitsAndCells:
        """The bound on -log2 p of images x_0 and its parts, as NumPy arrays.

        See `likelihood.bits_per_dim`. Images are those of uint8, x / 127.5 - 1. Image i is diffused
        with noise of fold_in(rng, start + i). `labels` as in `denoise`: the bound is that of
        p(x_0 | label). `sampler` is an ancestral one, whose steps and
        variance the bound is of; its steps begin with step 0, which L_0 is of. With `cells` the
        squared errors of the cells of `calibration.cell_grid` come along. `batch_size`, devices
        and `progress` as in `sample`.
        Raises TypeError for images that are not floats, ValueError for a negative start, and
        UserError for a model whose bound is infinite or a sampler that has none. NonFiniteSamples
        names the step at which a term is not finite.
        """
        self.config.diffusion.check_bound()
        chosen = self.resolve_bound(as_sampler(sampler))
        x_0 = checked_images("x_0", x_0, self.image_shape)
        drawing = Drawing(labels, start=start, batch_size=batch_size, progress=progress)
        return bounds.bits_per_dim(self, params, rng, x_0, chosen, cells, drawing)

    def decoder_bits(
        self,
        params: PyTree,
        rng: AnyKey,
        x_0: Float[Array, "b h w c"],
        variances: Float[Array, " V"],
        *,
        labels: Labels = None,
        start: int = 0,
        batch_size: int | None = None,
    ) -> Float[np.ndarray, "n V"]:
        """L_0 of images x_0 in bits/dim with each of `variances`, one network call an image.

        See `likelihood.decoder_bits`; the other arguments are as in `bits_per_dim`.
        """
        x_0 = checked_images("x_0", x_0, self.image_shape)
        drawing = Drawing(labels, start=start, batch_size=batch_size)
        return bounds.decoder_bits(self, params, rng, x_0, variances, drawing)

    def resolve_bound(self, sampler: Sampler) -> Sampler:
        """As `resolve`, for the chain of a bound. Raises UserError if it has none."""
        return choice.resolve_bound(self, sampler)
