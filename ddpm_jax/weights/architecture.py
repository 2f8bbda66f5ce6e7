"""The JSON fields of a U-Net and a scheduler of the diffusers library, and the config they stand for.

A field that is absent has the library's default, which is mostly not the paper's network. What this
network or process cannot be is refused by the field's name, an unknown field too unless it is null;
names that begin with _ are notes of the library's own.

How a shorter chain's steps lie (`timestep_spacing`, `steps_offset`) is not part of the model here: they
may have any value, and `DDPM.sample` takes `steps` and `grid`, whose leading and trailing are those of
the library where `steps` divides T. A chain of all T steps is the same for all of them.
"""

import json

from ddpm_jax.config import Config, Data, Diffusion, Model
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
"""The library's defaults of UNet2DModel. The last field is for a time embedding that is refused."""

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
    "num_class_embeds": None,
}
"""What these fields must be: the paper's network has no other."""

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
"""The library's defaults of the schedulers that stand for the paper's process."""

# Theirs and ours.
SCHEDULES = {"linear": "linear", "scaled_linear": "quad", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",  # The same number by way of its logarithm.
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",
}
NO_VARIANCES = {
    "fixed_large_log": "the library takes the root of log beta there, which is no number",
    "learned": "the library takes the output for the variance there, and this network's is its logarithm",
}


class Fields:
    """One JSON file's fields, the absent ones with the library's default; refusals name file and field."""

    def __init__(self, file, values: dict, defaults: dict):
        """Raises UserError for a field that `defaults` do not have and that is not null."""
        self.file, self.values, self.defaults = file, values, defaults
        for name, value in values.items():
            if name not in defaults and not name.startswith("_") and value is not None:
                raise UserError(
                    f"{file}: {name} is {_shown(value)}, and nothing is known of such a field"
                )

    def __getitem__(self, name: str):
        return self.values.get(name, self.defaults[name])

    def refuse(self, name: str, must_be: str):
        """Raises UserError that says what the field is, and what it must be."""
        absent = "" if name in self.values else " (it is absent, and that the library's default)"
        raise UserError(
            f"{self.file}: {name} is {_shown(self[name])}{absent}; it must be {must_be}"
        )

    def require(self, name: str, value) -> None:
        """Refuses anything but `value`."""
        if self[name] != value:
            self.refuse(name, json.dumps(value))

    def count(self, name: str) -> int:
        """A whole number of at least 1."""
        if not _is_count(self[name]):
            self.refuse(name, "a whole number of at least 1")
        return self[name]

    def counts(self, name: str) -> list[int]:
        """A list of them, not empty."""
        if (
            not isinstance(self[name], list)
            or not self[name]
            or not all(map(_is_count, self[name]))
        ):
            self.refuse(name, "a list of whole numbers of at least 1")
        return self[name]

    def one_of(self, name: str, choices: dict):
        """What `choices` has for the field's value."""
        if not isinstance(self[name], str) or self[name] not in choices:
            self.refuse(name, f"one of {', '.join(choices)}")
        return choices[self[name]]


def read_config(unet: Fields, scheduler: Fields | None) -> Config:
    """The config of a U-Net's and a scheduler's fields; without a scheduler, of the paper's process.

    Raises UserError naming the first field that this package has no equal of.
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
        raise (
            error if str(error).startswith(str(unet.file)) else UserError(f"{unet.file}: {error}")
        ) from None


def write_config(config: Config) -> tuple[dict, dict]:
    """(the U-Net's fields, the scheduler's) of `config`, for UNet2DModel and DDPMScheduler.

    Raises UserError naming the first field that the library has no equal of.
    """
    model, diffusion = config.model, config.diffusion
    if model.channel_multipliers[0] != 1:
        raise UserError(
            f"model.channel_multipliers: the first is {model.channel_multipliers[0]}, and diffusers has only networks "
            "whose first level is as wide as their stem; export as safetensors"
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
    }
    scheduler = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": diffusion.num_timesteps,
        "beta_schedule": _theirs("schedule", diffusion.schedule, SCHEDULES),
        "prediction_type": _theirs("prediction", diffusion.prediction, PREDICTIONS),
        "variance_type": _theirs("variance", diffusion.variance, VARIANCES),
        "clip_sample": diffusion.clip,
    }
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
        fields.refuse("attn_norm_num_groups", "null, or what norm_num_groups is")
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
    )


def _read_attention(fields: Fields, widths: list[int]) -> list[bool]:
    """Whether each level has attention, on the way down and up; its heads must be one."""
    kinds = {"DownBlock2D": False, "AttnDownBlock2D": True}
    down, up = (_block_types(fields, name) for name in ("down_block_types", "up_block_types"))
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
        fields.refuse("attention_head_dim", "null: one head, as wide as its level")
    return attends


def _block_types(fields: Fields, name: str) -> list[str]:
    if not isinstance(fields[name], list) or not all(
        isinstance(kind, str) for kind in fields[name]
    ):
        fields.refuse(name, "a list of names")
    # The library's first versions wrote this prefix, and it still drops it.
    return [kind.removeprefix("UNetRes") for kind in fields[name]]


def _read_size(fields: Fields) -> tuple[int, int]:
    size = fields["sample_size"]
    if _is_count(size):
        return size, size
    if isinstance(size, list) and len(size) == 2 and all(map(_is_count, size)):
        return tuple(size)
    fields.refuse("sample_size", "the images' side, or their height and width in a list")


def _read_image_shape(fields: Fields, outputs: int) -> tuple[int, int, int]:
    channels = fields.count("in_channels")
    if fields["out_channels"] != outputs * channels:
        why = (
            "in_channels"
            if outputs == 1
            else "twice in_channels, for the scheduler's learned_range"
        )
        fields.refuse("out_channels", f"{outputs * channels}: {why}")
    return *_read_size(fields), channels


def _read_diffusion(fields: Fields) -> Diffusion:
    for name, value in {
        "trained_betas": None,
        "thresholding": False,
        "rescale_betas_zero_snr": False,
    }.items():
        fields.require(name, value)
    if "set_alpha_to_one" in fields.defaults:
        fields.require("set_alpha_to_one", True)
    if not isinstance(fields["clip_sample"], bool):
        fields.refuse("clip_sample", "true or false")
    if fields["clip_sample"]:
        fields.require("clip_sample_range", 1)
    schedule = fields.one_of("beta_schedule", SCHEDULES)
    parameters = (
        {}
        if schedule == "cosine"
        else {name: _beta(fields, name) for name in ("beta_start", "beta_end")}
    )
    # DDIM draws with the posterior's variance.
    variance = _read_variance(fields) if "variance_type" in fields.defaults else "fixed_small"
    prediction, T = (
        fields.one_of("prediction_type", PREDICTIONS),
        fields.count("num_train_timesteps"),
    )
    try:
        return Diffusion(
            schedule=schedule,
            num_timesteps=T,
            prediction=prediction,
            variance=variance,
            clip=fields["clip_sample"],
            loss="hybrid" if variance == "learned_range" else "simple",
            **parameters,
        )
    except UserError as error:
        raise UserError(f"{fields.file}: {error}") from None


def _read_variance(fields: Fields) -> str:
    if fields["variance_type"] in list(NO_VARIANCES):
        fields.refuse(
            "variance_type",
            f"one of {', '.join(VARIANCES)}: {NO_VARIANCES[fields['variance_type']]}",
        )
    return fields.one_of("variance_type", VARIANCES)


def _beta(fields: Fields, name: str) -> float | None:
    """None for the default, which is the paper's in both packages."""
    return None if fields[name] == fields.defaults[name] else fields[name]


def _theirs(name: str, ours: str, equals: dict[str, str]) -> str:
    for theirs, known in equals.items():
        if known == ours:
            return theirs
    raise UserError(
        f"diffusion.{name}: diffusers' schedulers have no {ours!r}, only {', '.join(dict.fromkeys(equals.values()))}; "
        "export as safetensors"
    )


def _mirrored(attends: list[bool]) -> list[str]:
    return ["AttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)]


def _shown(value) -> str:
    """As it stands in the JSON; of 1000 betas the first."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
