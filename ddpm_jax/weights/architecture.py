"""Converts the JSON fields of diffusers' U-Nets and schedulers to a `Config`, and back.

An absent field has the library's default, which often differs from the paper's network. A value
that this package does not support is refused, and the field named. So is an unknown field of a
U-Net, unless it is null; fields that a scheduler's class does not take are ignored, as the library
does. Names that begin with _ are the library's own notes. `no_class_row` is a field of ours.

The steps of a shorter chain (`timestep_spacing`, `steps_offset`) are not part of the model here, so
these fields may have any value: `DDPM.sample` takes `steps` and `grid`. Its grids `leading` and
`trailing` are the library's if `steps` divides T. A chain of all T steps does not depend on them.
"""

import json
from typing import Any, NoReturn

from etils import epath

from ddpm_jax.config import Config, Data, Diffusion, Model
from ddpm_jax.diffusion import QUANTILE, Clip, Variance
from ddpm_jax.errors import UserError

UNET = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
"""The library's defaults for UNet2DModel. Only a refused time embedding uses the last field."""

NO_CLASS_ROW = "no_class_row"
"""Our own field of a U-Net with classes: true where the last of its `num_class_embeds` rows is that
of no class. The library warns that it ignores the field, saves it again, and counts the row as one
more class."""

PAPER = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_padding": 0,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "norm_eps": 1e-6,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
}
"""The values that these fields must have to describe the paper's network."""

_BOTH = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "clip_sample": True,
    "prediction_type": "epsilon",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "clip_sample_range": 1.0,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
}
SCHEDULERS = {
    "DDPMScheduler": _BOTH | {"variance_type": "fixed_small"},
    "DDIMScheduler": _BOTH | {"set_alpha_to_one": True},
}
"""The library's defaults for its schedulers that describe the paper's process: all arguments of
their constructors in diffusers 0.42.1."""

# Each maps diffusers' names to ours.
SCHEDULES = {"linear": "linear", "scaled_linear": "quad", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",  # The same variance, computed from its logarithm.
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",
}
DYNAMIC = {
    "thresholding": True,
    "dynamic_thresholding_ratio": QUANTILE,
    "sample_max_value": 1e38,
}
"""What stands for diffusion.clip dynamic: a quantile without a bound that is ever reached."""
LEAST_BOUND = 1e6
"""The least sample_max_value that is read as none."""
NO_VARIANCES = {
    "fixed_large_log": "diffusers takes the square root of log beta there, which is NaN",
    "learned": "diffusers takes the output as the variance there, but here it is its logarithm",
}


class Fields:
    """The fields of one JSON file, with the library's defaults. Errors name the file and field."""

    def __init__(self, file: epath.Path, values: dict, defaults: dict) -> None:
        """Raises UserError for a field that is not in `defaults`, unless it is null."""
        self.file = file
        self.values = values
        self.defaults = defaults
        for name, value in values.items():
            if name not in defaults and not name.startswith("_") and value is not None:
                raise UserError(
                    f"{file}: unknown field {name}, which is {_shown(value)}; "
                    "remove it if the model does not use it"
                )

    def __getitem__(self, name: str) -> Any:
        return self.values.get(name, self.defaults[name])

    def refuse(self, name: str, must_be: str) -> NoReturn:
        """Raises a UserError that gives the field's value and what it must be."""
        absent = "" if name in self.values else " (absent; this is diffusers' default)"
        raise UserError(
            f"{self.file}: {name} is {_shown(self[name])}{absent}; it must be {must_be}"
        )

    def require(self, name: str, value: object) -> None:
        """Refuses any other value than `value`."""
        if self[name] != value:
            self.refuse(name, json.dumps(value))

    def count(self, name: str) -> int:
        """A whole number of at least 1."""
        if not _is_count(self[name]):
            self.refuse(name, "a whole number of at least 1")
        return self[name]

    def counts(self, name: str) -> list[int]:
        """A list of whole numbers of at least 1, not empty."""
        if (
            not isinstance(self[name], list)
            or not self[name]
            or not all(map(_is_count, self[name]))
        ):
            self.refuse(name, "a list of whole numbers of at least 1")
        return self[name]

    def one_of(self, name: str, choices: dict) -> Any:
        """The entry of `choices` for the field's value."""
        if not isinstance(self[name], str) or self[name] not in choices:
            self.refuse(name, f"one of {', '.join(choices)}")
        return choices[self[name]]


def read_config(unet: Fields, scheduler: Fields | None) -> Config:
    """The config that the fields of a U-Net and a scheduler describe.

    Without a scheduler the process is the paper's. Raises UserError naming the first field that has
    no equivalent in this package.
    """
    diffusion = _read_diffusion(scheduler) if scheduler else Diffusion()
    try:
        return Config(
            model=_read_model(unet),
            diffusion=diffusion,
            data=Data(
                source="array",
                image_shape=_read_image_shape(unet, 2 if diffusion.learns_variance else 1),
            ),
        )
    except UserError as error:
        if str(error).startswith(str(unet.file)):
            raise
        raise UserError(f"{unet.file}: {error}") from None


def write_config(config: Config) -> tuple[dict, dict]:
    """(fields of the U-Net, fields of the scheduler) for UNet2DModel and DDPMScheduler.

    Raises UserError naming the first field that has no equivalent in the library.
    """
    model = config.model
    diffusion = config.diffusion
    if model.channel_multipliers[0] != 1:
        raise UserError(
            f"model.channel_multipliers: the first is {model.channel_multipliers[0]}, but must be "
            "1 for diffusers, whose first level is as wide as its stem; export as safetensors"
        )
    height, width, channels = config.data.image_shape
    attends = [
        min(height, width) >> level in model.attention_resolutions
        for level in range(len(model.channel_multipliers))
    ]
    unet = PAPER | {
        "_class_name": "UNet2DModel",
        "sample_size": height if height == width else [height, width],
        "in_channels": channels,
        "out_channels": channels * (2 if diffusion.learns_variance else 1),
        "block_out_channels": [
            model.base_channels * multiplier for multiplier in model.channel_multipliers
        ],
        "down_block_types": [
            "AttnDownBlock2D" if attention else "DownBlock2D" for attention in attends
        ],
        "up_block_types": _mirrored(attends),
        "layers_per_block": model.num_res_blocks,
        "dropout": model.dropout,
        "act_fn": "silu",
        "attention_head_dim": None,
        "norm_num_groups": model.norm_groups,
        "num_class_embeds": model.class_rows or None,
    }
    if model.num_classes and model.no_class:
        unet[NO_CLASS_ROW] = True
    scheduler = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": diffusion.num_timesteps,
        "beta_schedule": _theirs("schedule", diffusion.schedule, SCHEDULES),
        "prediction_type": _theirs("prediction", diffusion.prediction, PREDICTIONS),
        "variance_type": _theirs("variance", diffusion.variance, VARIANCES),
        "clip_sample": bool(diffusion.clip),
    }
    if diffusion.clip == "dynamic":
        scheduler |= DYNAMIC
    return unet, scheduler | diffusion.schedule_parameters


def _read_model(fields: Fields) -> Model:
    for name, value in PAPER.items():
        fields.require(name, value)
    if fields["act_fn"] not in ("silu", "swish"):
        fields.refuse("act_fn", '"silu"')
    widths = fields.counts("block_out_channels")
    if any(width % widths[0] for width in widths):
        fields.refuse("block_out_channels", f"whole multiples of the first, {widths[0]}")
    if fields["time_embedding_dim"] not in (None, 4 * widths[0]):
        fields.refuse(
            "time_embedding_dim", f"null or {4 * widths[0]}, four times the first level's width"
        )
    if fields["attn_norm_num_groups"] not in (None, fields["norm_num_groups"]):
        fields.refuse("attn_norm_num_groups", "null or the same as norm_num_groups")
    attends = _read_attention(fields, widths)
    smaller_side = min(_read_size(fields))
    return Model(
        base_channels=widths[0],
        channel_multipliers=tuple(width // widths[0] for width in widths),
        num_res_blocks=fields.count("layers_per_block"),
        attention_resolutions=tuple(
            smaller_side >> level for level, attention in enumerate(attends) if attention
        ),
        dropout=fields["dropout"],
        norm_groups=fields.count("norm_num_groups"),
        **_read_classes(fields),
    )


def _read_classes(fields: Fields) -> dict[str, Any]:
    """K rows are K classes; with NO_CLASS_ROW they are K - 1, and no class."""
    marked = fields.values.get(NO_CLASS_ROW) or False
    if not isinstance(marked, bool):
        fields.refuse(NO_CLASS_ROW, "true or false")
    if fields["num_class_embeds"] is None:
        if marked:
            fields.refuse(NO_CLASS_ROW, "false, as num_class_embeds is null")
        return {}
    rows = fields.count("num_class_embeds")
    if rows == 1 and marked:
        fields.refuse("num_class_embeds", f"at least 2, as {NO_CLASS_ROW} is true")
    return {"num_classes": rows - marked, "no_class": marked}


def _read_attention(fields: Fields, widths: list[int]) -> list[bool]:
    """Whether each level has attention, on the way down and up. It must have a single head."""
    kinds = {"DownBlock2D": False, "AttnDownBlock2D": True}
    down = _block_types(fields, "down_block_types")
    up = _block_types(fields, "up_block_types")
    if len(down) != len(widths) or not kinds.keys() >= set(down):
        fields.refuse(
            "down_block_types", f"{' or '.join(kinds)} for each of the {len(widths)} levels"
        )
    attends = [kinds[name] for name in down]
    if up != _mirrored(attends):
        fields.refuse(
            "up_block_types", f"{json.dumps(_mirrored(attends))}, the mirror of down_block_types"
        )
    attended = {width for width, attention in zip(widths, attends, strict=True) if attention} | {
        widths[-1]
    }
    if fields["attention_head_dim"] is not None and sorted(attended) != [
        fields["attention_head_dim"]
    ]:
        fields.refuse("attention_head_dim", "null, for a single head as wide as its level")
    return attends


def _block_types(fields: Fields, name: str) -> list[str]:
    if not isinstance(fields[name], list) or not all(
        isinstance(kind, str) for kind in fields[name]
    ):
        fields.refuse(name, "a list of names")
    # Early versions of the library wrote this prefix, and it is still dropped on reading.
    return [kind.removeprefix("UNetRes") for kind in fields[name]]


def _read_size(fields: Fields) -> tuple[int, int]:
    size = fields["sample_size"]
    if _is_count(size):
        return size, size
    if isinstance(size, list) and len(size) == 2 and all(map(_is_count, size)):
        return tuple(size)
    fields.refuse("sample_size", "the image size, or a list of height and width")


def _read_image_shape(fields: Fields, outputs: int) -> tuple[int, int, int]:
    channels = fields.count("in_channels")
    if fields["out_channels"] != outputs * channels:
        why = "like in_channels" if outputs == 1 else "twice in_channels, for learned_range"
        fields.refuse("out_channels", f"{outputs * channels}, {why}")
    return *_read_size(fields), channels


def _read_diffusion(fields: Fields) -> Diffusion:
    fields.require("trained_betas", None)
    fields.require("rescale_betas_zero_snr", False)
    if "set_alpha_to_one" in fields.defaults:
        fields.require("set_alpha_to_one", True)
    schedule = fields.one_of("beta_schedule", SCHEDULES)
    parameters: dict[str, Any] = (
        {}
        if schedule == "cosine"
        else {name: _beta(fields, name) for name in ("beta_start", "beta_end")}
    )
    # DDIMScheduler has no variance_type: it samples with the posterior variance.
    variance: Variance = (
        _read_variance(fields) if "variance_type" in fields.defaults else "fixed_small"
    )
    prediction = fields.one_of("prediction_type", PREDICTIONS)
    T = fields.count("num_train_timesteps")
    try:
        return Diffusion(
            schedule=schedule,
            num_timesteps=T,
            prediction=prediction,
            variance=variance,
            clip=_read_clip(fields),
            loss="hybrid" if variance == "learned_range" else "simple",
            **parameters,
        )
    except UserError as error:
        raise UserError(f"{fields.file}: {error}") from None


def _read_clip(fields: Fields) -> Clip:
    """Thresholding comes before clip_sample there, and divides by at most sample_max_value.

    Where that is 1, the library's default, it only clips to [-1, 1].
    """
    for name in ("clip_sample", "thresholding"):
        if not isinstance(fields[name], bool):
            fields.refuse(name, "true or false")
    if not fields["thresholding"]:
        if fields["clip_sample"]:
            fields.require("clip_sample_range", 1)
        return fields["clip_sample"]
    bound = fields["sample_max_value"]
    if bound == 1:
        return True
    if not isinstance(bound, int | float) or not bound >= LEAST_BOUND:
        fields.refuse("sample_max_value", f"1, which only clips, or at least {LEAST_BOUND:g}")
    fields.require("dynamic_thresholding_ratio", QUANTILE)
    return "dynamic"


def _read_variance(fields: Fields) -> Variance:
    if fields["variance_type"] in list(NO_VARIANCES):
        fields.refuse(
            "variance_type",
            f"one of {', '.join(VARIANCES)}: {NO_VARIANCES[fields['variance_type']]}",
        )
    return fields.one_of("variance_type", VARIANCES)


def _beta(fields: Fields, name: str) -> float | None:
    """The field's value, or None for the default, which is the paper's in both packages."""
    return None if fields[name] == fields.defaults[name] else fields[name]


def _theirs(name: str, ours: str, equals: dict[str, str]) -> str:
    for theirs, known in equals.items():
        if known == ours:
            return theirs
    raise UserError(
        f"diffusion.{name}: diffusers' schedulers have no {ours!r}, only "
        f"{', '.join(dict.fromkeys(equals.values()))}; export as safetensors"
    )


def _mirrored(attends: list[bool]) -> list[str]:
    return ["AttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)]


def _shown(value) -> str:
    """The value as JSON, cut to 80 characters."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
