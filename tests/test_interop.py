"""Weights in and out without the other libraries: names, axes, what is refused, the round trip."""

import dataclasses
import functools
import json
import logging
import re
import runpy
import sys
import types
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import messages, with_
from safetensors.numpy import load_file, save

from ddpm_jax import DDPM, Config, UserError
from ddpm_jax.config import Data, Diffusion, Model
from ddpm_jax.weights import architecture
from ddpm_jax.weights.architecture import SCHEDULERS, Fields, read_config, write_config
from ddpm_jax.weights.diffusers import is_diffusers, read_diffusers, write_diffusers
from ddpm_jax.weights.hub import KINDS, download, is_hub_name
from ddpm_jax.weights.load import load_weights

# The published CIFAR10 model's JSON, narrower: two levels of 4 and 8 channels, attention at 4x4.
UNET = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [4, 8],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 2,
    "out_channels": 3,
    "sample_size": 8,
    "time_embedding_type": "positional",
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.1.1",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "variance_type": "fixed_large",
}
CONFIG = Config(
    model=Model(
        base_channels=4,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        dropout=0.0,
        norm_groups=2,
    ),
    data=Data(source="array", image_shape=(8, 8, 3)),
)
WEIGHTS = "diffusion_pytorch_model.safetensors"
CONVERT_BIN = Path(__file__).parent.parent / "scripts/convert_bin.py"


@pytest.fixture(scope="module")
def params():
    """Parameters of CONFIG, all of them random."""
    shapes = jax.eval_shape(DDPM(CONFIG).init, jax.random.key(0))
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)


@pytest.fixture(scope="module")
def tensors(params):
    """`params` as the library names and lays them out, with attention's new names.

    Written down here by hand.
    """
    found = {}

    def add(name, p):
        axes = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}
        weight = p["scale"] if "scale" in p else p["kernel"]
        found[f"{name}.weight"], found[f"{name}.bias"] = (
            weight.transpose(axes[weight.ndim]).copy(),
            p["bias"],
        )

    def add_block(name, p):
        for theirs, ours in {
            "norm1": "norm_0",
            "conv1": "conv_0",
            "norm2": "norm_1",
            "conv2": "conv_1",
        }.items():
            add(f"{name}.{theirs}", p[ours])
        add(f"{name}.time_emb_proj", p["time"])
        if "shortcut" in p:
            add(f"{name}.conv_shortcut", p["shortcut"])
            found[f"{name}.conv_shortcut.weight"] = found[f"{name}.conv_shortcut.weight"].reshape(
                *found[f"{name}.conv_shortcut.weight"].shape, 1, 1
            )

    def add_attention(name, p):
        theirs = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "out"}
        for layer, ours in theirs.items():
            add(f"{name}.{layer}", p[ours])

    blocks = {"down_blocks.0.resnets.0": "down_0_0", "down_blocks.1.resnets.0": "down_1_0"}
    blocks |= {"mid_block.resnets.0": "mid_0", "mid_block.resnets.1": "mid_1"}
    blocks |= {f"up_blocks.{k}.resnets.{i}": f"up_{1 - k}_{i}" for k in range(2) for i in range(2)}
    for name, ours in blocks.items():
        add_block(name, params[f"{ours}_block"])
    attentions = {"down_blocks.1.attentions.0": "down_1_0", "mid_block.attentions.0": "mid"}
    attentions |= {f"up_blocks.0.attentions.{i}": f"up_1_{i}" for i in range(2)}
    for name, ours in attentions.items():
        add_attention(name, params[f"{ours}_attention"])
    layers = {"conv_in": "stem", "conv_norm_out": "out_norm", "conv_out": "out_conv"}
    layers |= {"time_embedding.linear_1": "time_0", "time_embedding.linear_2": "time_1"}
    layers |= {"down_blocks.0.downsamplers.0.conv": "down_0_downsample"}
    layers |= {"up_blocks.0.upsamplers.0.conv": "up_1_upsample"}
    for name, ours in layers.items():
        add(name, params[ours])
    return found


def write(folder, unet=UNET, scheduler=SCHEDULER, index=None, weights=b""):
    """A flat folder of the library's."""
    folder.mkdir(exist_ok=True, parents=True)
    for name, values in {
        "config": unet,
        "scheduler_config": scheduler,
        "model_index": index,
    }.items():
        if values is not None:
            (folder / f"{name}.json").write_text(json.dumps(values))
    (folder / WEIGHTS).write_bytes(weights)
    return folder


def refusal(call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert all(
        leaf.dtype == np.float32 and leaf.flags.c_contiguous for leaf in jax.tree.leaves(one)
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_flat_folder_is_read(tmp_path, tensors, params):
    folder = write(tmp_path, index={"_class_name": "DDPMPipeline"}, weights=save(tensors))
    assert is_diffusers(folder)
    config, found = read_diffusers(str(folder))
    assert config == CONFIG
    assert_same(found, params)


def test_a_pipeline_and_its_lone_unet_are_read(tmp_path, tensors, params, caplog):
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "vae": [None, None],
    }
    write(tmp_path / "unet", scheduler=None, weights=save(tensors))
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text(
        json.dumps(SCHEDULER | {"variance_type": "fixed_small"})
    )
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert is_diffusers(tmp_path) and is_diffusers(tmp_path / "unet")
    config, found = read_diffusers(tmp_path)
    assert config.diffusion == Diffusion(variance="fixed_small") and not messages(caplog)
    assert_same(found, params)
    with caplog.at_level(logging.WARNING):
        assert read_diffusers(tmp_path / "unet")[0] == CONFIG
    assert "this U-Net has no scheduler; using the paper's" in messages(caplog)[0]
    (tmp_path / "scheduler/scheduler_config.json").unlink()
    assert "scheduler_config.json: is missing" in refusal(read_diffusers, tmp_path)


def test_what_is_no_folder_of_the_library_is_known(tmp_path):
    assert not is_diffusers(tmp_path) and not is_diffusers(tmp_path / "nothing")
    (tmp_path / "config.json").write_text(json.dumps({"model": {}, "diffusion": {}}))  # A run's.
    assert not is_diffusers(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert not is_diffusers(tmp_path)


def test_the_old_names_and_1x1_convolutions_are_read(tmp_path, tensors, params):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in tensors.items():
        for new_layer, old_layer in old.items():
            name = name.replace(new_layer, old_layer)
        is_linear = "attentions" in name and tensor.ndim == 2
        renamed[name] = tensor[:, :, None, None].copy() if is_linear else tensor
    assert renamed["mid_block.attentions.0.proj_attn.weight"].shape == (8, 8, 1, 1)
    assert_same(read_diffusers(write(tmp_path, weights=save(renamed)))[1], params)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_float32(tmp_path, tensors, params, dtype):
    weights = save({name: tensor.astype(dtype) for name, tensor in tensors.items()})
    rounded = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(np.float32), params)
    assert_same(read_diffusers(write(tmp_path, weights=weights))[1], rounded)


def test_other_numbers_are_refused(tmp_path, tensors):
    folder = write(tmp_path, weights=save(tensors | {"conv_in.bias": np.zeros(4, np.float64)}))
    assert "conv_in.bias is F64; it must be one of F32, F16, BF16" in refusal(
        read_diffusers, folder
    )


def test_shards_are_joined(tmp_path, tensors, params):
    folder, names = write(tmp_path), sorted(tensors)
    (folder / WEIGHTS).unlink()
    files = {
        name: f"diffusion_pytorch_model-0000{i % 3 + 1}-of-00003.safetensors"
        for i, name in enumerate(names)
    }
    for file in set(files.values()):
        (folder / file).write_bytes(
            save({name: tensors[name] for name in names if files[name] == file})
        )
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert_same(read_diffusers(folder)[1], params)
    last = folder / files[names[0]].replace("00001", "00003")
    last.write_bytes(save({names[0]: tensors[names[0]]}))
    assert f"00003.safetensors: {names[0]} is also in another" in refusal(read_diffusers, folder)
    last.unlink()
    assert "00003-of-00003.safetensors: cannot be read as safetensors" in refusal(
        read_diffusers, folder
    )
    index.write_text(json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}}))
    assert "'../elsewhere.safetensors' is not a safetensors file in the same folder" in refusal(
        read_diffusers, folder
    )
    index.write_text(json.dumps({"weights": {}}))
    assert "weight_map must name the file" in refusal(read_diffusers, folder)


def test_tensors_that_do_not_fit_are_named(tmp_path, tensors):
    folder = write(tmp_path)

    def says(**changes):
        changed = {
            name: tensor for name, tensor in (tensors | changes).items() if tensor is not None
        }
        (folder / WEIGHTS).write_bytes(save(changed))
        return refusal(read_diffusers, folder).removeprefix(f"{folder}: ")

    again = "; download the whole folder again"
    assert says(**{"conv_in.bias": None}) == f"conv_in.bias is missing{again}"
    assert (
        says(**{"conv_in.bias": None, "conv_out.bias": None})
        == f"conv_in.bias, conv_out.bias are missing{again}"
    )
    assert says(**dict.fromkeys(list(tensors)[:9])).endswith(f" and 6 more are missing{again}")
    left_over = "class_embedding.weight"
    assert (
        says(**{left_over: np.ones(1, np.float32)})
        == f"{left_over} is not in the network that its JSON describes{again}"
    )
    for name, shape in {
        "conv_in.weight": [4, 3, 1, 1],
        "conv_in.bias": [5],
        "mid_block.attentions.0.to_q.weight": [8],
        "time_embedding.linear_1.weight": [4, 16],
    }.items():
        must_be = f"must be {list(tensors[name].shape)} by its JSON"
        expected = f"{name} has shape {shape}, but {must_be}{again}"
        assert says(**{name: np.ones(shape, np.float32)}) == expected


def test_a_pickle_alone_is_not_read(tmp_path):
    folder = write(tmp_path)
    (folder / WEIGHTS).unlink()
    assert refusal(read_diffusers, folder).endswith(
        f"{WEIGHTS}: is missing; download the whole folder"
    )
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"\x80")
    said = refusal(read_diffusers, folder)
    assert f"`python scripts/convert_bin.py FILE` (needs torch), where FILE is {folder}" in said
    (folder / "diffusion_pytorch_model.bin").unlink()
    (folder / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"")
    assert "rename diffusion_pytorch_model.fp16.safetensors" in refusal(read_diffusers, folder)
    (folder / WEIGHTS).write_bytes(b"not tensors")
    assert "cannot be read as safetensors" in refusal(read_diffusers, folder)


ABSENT = object()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"_class_name": "UNet2DConditionModel"},
            '_class_name is "UNet2DConditionModel"; it must be UNet2DModel',
        ),
        ({"act_fn": "gelu"}, 'act_fn is "gelu"; it must be "silu"'),
        ({"norm_eps": 1e-5}, "norm_eps is 1e-05; it must be 1e-06"),
        (
            {"norm_eps": ABSENT},
            "norm_eps is 1e-05 (absent; this is diffusers' default); it must be 1e-06",
        ),
        (
            {"freq_shift": ABSENT},
            "freq_shift is 0 (absent; this is diffusers' default); it must be 1",
        ),
        ({"flip_sin_to_cos": True}, "flip_sin_to_cos is true; it must be false"),
        ({"downsample_padding": 1}, "downsample_padding is 1; it must be 0"),
        (
            {"attention_head_dim": 4},
            "attention_head_dim is 4; it must be null, for a single head as wide as its level",
        ),
        (
            {"attention_head_dim": ABSENT, "block_out_channels": [8, 16]},
            "attention_head_dim is 8 (absent",
        ),
        ({"attention_head_dim": [8]}, "attention_head_dim is [8]; it must be null"),
        (
            {
                "attention_head_dim": 8,
                "down_block_types": ["AttnDownBlock2D"] * 2,
                "up_block_types": ["AttnUpBlock2D"] * 2,
            },
            "attention_head_dim is 8; it must be null",
        ),
        (
            {"time_embedding_type": "fourier"},
            'time_embedding_type is "fourier"; it must be "positional"',
        ),
        ({"time_embedding_dim": 4}, "time_embedding_dim is 4; it must be null or 16"),
        (
            {"resnet_time_scale_shift": "scale_shift"},
            'resnet_time_scale_shift is "scale_shift"; it must be "default"',
        ),
        ({"class_embed_type": "timestep"}, 'class_embed_type is "timestep"; it must be null'),
        ({"class_embed_type": "identity"}, 'class_embed_type is "identity"; it must be null'),
        ({"num_class_embeds": 0}, "num_class_embeds is 0; it must be a whole number of at least 1"),
        ({"num_class_embeds": 1.5}, "num_class_embeds is 1.5; it must be a whole number of at"),
        ({"num_class_embeds": 70_000}, "model.num_classes: must be at least 1 and at most 65536"),
        (
            {"num_class_embeds": 1, "no_class_row": True},
            "num_class_embeds is 1; it must be at least 2, as no_class_row is true",
        ),
        (
            {"num_class_embeds": 4, "no_class_row": "yes"},
            'no_class_row is "yes"; it must be true or false',
        ),
        (
            {"no_class_row": True},
            "no_class_row is true; it must be false, as num_class_embeds is null",
        ),
        ({"mid_block_scale_factor": 1.4}, "mid_block_scale_factor is 1.4; it must be 1"),
        ({"mid_block_type": None}, 'mid_block_type is null; it must be "UNetMidBlock2D"'),
        ({"center_input_sample": True}, "center_input_sample is true; it must be false"),
        ({"add_attention": False}, "add_attention is false; it must be true"),
        ({"downsample_type": "resnet"}, 'downsample_type is "resnet"; it must be "conv"'),
        ({"upsample_type": "resnet"}, 'upsample_type is "resnet"; it must be "conv"'),
        (
            {"attn_norm_num_groups": 4},
            "attn_norm_num_groups is 4; it must be null or the same as norm_num_groups",
        ),
        (
            {"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]},
            "it must be DownBlock2D or AttnDownBlock2D for each",
        ),
        (
            {"down_block_types": ["DownBlock2D"]},
            "it must be DownBlock2D or AttnDownBlock2D for each of the 2 levels",
        ),
        ({"down_block_types": "DownBlock2D"}, "it must be a list of names"),
        (
            {"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]},
            'it must be ["AttnUpBlock2D", "UpBlock2D"], the mirror of down_block_types',
        ),
        (
            {"block_out_channels": [4, 6]},
            "block_out_channels is [4, 6]; it must be whole multiples of the first, 4",
        ),
        (
            {"block_out_channels": []},
            "block_out_channels is []; it must be a list of whole numbers of at least 1",
        ),
        (
            {"sample_size": None},
            "sample_size is null; it must be the image size, or a list of height and width",
        ),
        ({"sample_size": ABSENT}, "sample_size is null (absent"),
        ({"sample_size": 7}, "data.image_shape: 7x7 is not divisible by 2"),
        ({"norm_num_groups": 3}, "model.norm_groups: 3 does not divide the 4 channels of a level"),
        (
            {"norm_num_groups": None},
            "norm_num_groups is null; it must be a whole number of at least 1",
        ),
        ({"layers_per_block": 0}, "layers_per_block is 0; it must be a whole number of at least 1"),
        ({"dropout": 1}, "model.dropout: must be at least 0 and below 1, got 1"),
        ({"out_channels": 6}, "out_channels is 6; it must be 3, like in_channels"),
        (
            {"only_cross_attention": False},
            "unknown field only_cross_attention, which is false",
        ),
    ],
)
def test_networks_that_this_one_cannot_be_are_refused(tmp_path, change, message):
    unet = {name: value for name, value in (UNET | change).items() if value is not ABSENT}
    said = refusal(read_diffusers, write(tmp_path, unet=unet))
    assert said.startswith(f"{tmp_path}/config.json: ") and message in said, said


def test_an_unknown_field_that_is_null_is_nothing(tmp_path, tensors):
    unet = UNET | {
        "new_feature": None,
        "_name_or_path": "there",
        "attention_head_dim": 8,
        "act_fn": "swish",
    }
    unet |= {
        "down_block_types": ["UNetResDownBlock2D", "UNetResAttnDownBlock2D"],
        "sample_size": [8, 8],
    }
    assert read_diffusers(write(tmp_path, unet=unet, weights=save(tensors)))[0] == CONFIG


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"_class_name": "PNDMScheduler"},
            '_class_name is "PNDMScheduler"; it must be DDPMScheduler or DDIMScheduler',
        ),
        ({"_class_name": ABSENT}, "_class_name is null; it must be DDPMScheduler or DDIMScheduler"),
        (
            {"beta_schedule": "sigmoid"},
            'beta_schedule is "sigmoid"; it must be one of linear, scaled_linear, sq',
        ),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas is [0.1, 0.2]; it must be null"),
        (
            {"trained_betas": [0.25] * 99},
            "trained_betas is [0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.",
        ),
        (
            {"prediction_type": "flow"},
            'prediction_type is "flow"; it must be one of epsilon, sample, v_prediction',
        ),
        ({"variance_type": "learned"}, "diffusers takes the output as the variance there"),
        (
            {"variance_type": "fixed_large_log"},
            "diffusers takes the square root of log beta there, which is NaN",
        ),
        (
            {"variance_type": "small"},
            'variance_type is "small"; it must be one of fixed_small, fixed_small_log, fixed',
        ),
        ({"variance_type": None}, "variance_type is null; it must be one of fixed_small"),
        ({"thresholding": None}, "thresholding is null; it must be true or false"),
        (
            {"thresholding": True, "sample_max_value": 1.5},
            "sample_max_value is 1.5; it must be 1, which only clips, or at least 1e+06",
        ),
        (
            {"thresholding": True, "sample_max_value": 1e9, "dynamic_thresholding_ratio": 0.9},
            "dynamic_thresholding_ratio is 0.9; it must be 0.995",
        ),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is true; it must be false"),
        ({"clip_sample_range": 2.0}, "clip_sample_range is 2.0; it must be 1"),
        ({"clip_sample": None}, "clip_sample is null; it must be true or false"),
        (
            {"num_train_timesteps": 0},
            "num_train_timesteps is 0; it must be a whole number of at least 1",
        ),
        ({"beta_start": 0}, "diffusion.beta_start: must be at least 1e-11 and at most 1"),
        (
            {"_class_name": "DDIMScheduler", "variance_type": ABSENT, "set_alpha_to_one": False},
            "set_alpha_to_one is false; it must be true",
        ),
    ],
)
def test_processes_that_this_one_cannot_be_are_refused(tmp_path, change, message):
    scheduler = {name: value for name, value in (SCHEDULER | change).items() if value is not ABSENT}
    said = refusal(read_diffusers, write(tmp_path, scheduler=scheduler))
    assert said.startswith(f"{tmp_path}/scheduler_config.json: ") and message in said, said


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {}),
        ({"variance_type": ABSENT}, {"variance": "fixed_small"}),
        ({"variance_type": "fixed_small_log"}, {"variance": "fixed_small"}),
        (
            {"beta_schedule": "scaled_linear", "beta_end": 0.01},
            {"schedule": "quad", "beta_end": 0.01},
        ),
        ({"beta_schedule": "squaredcos_cap_v2", "beta_end": 0.01}, {"schedule": "cosine"}),
        (
            {"num_train_timesteps": 50, "beta_start": 0.002},
            {"num_timesteps": 50, "beta_start": 0.002},
        ),
        ({"prediction_type": "sample"}, {"prediction": "x_0"}),
        ({"prediction_type": "v_prediction"}, {"prediction": "v"}),
        ({"clip_sample": False, "clip_sample_range": 2.0}, {"clip": False}),
        ({"clip_sample": False, "thresholding": True, "clip_sample_range": 2.0}, {"clip": True}),
        (
            {"clip_sample": False, "thresholding": True, "sample_max_value": 1e6},
            {"clip": "dynamic"},
        ),
        ({"timestep_spacing": "trailing", "steps_offset": 1, "sample_max_value": 3.0}, {}),
        ({"_class_name": "DDIMScheduler", "variance_type": ABSENT}, {"variance": "fixed_small"}),
    ],
)
def test_what_the_schedulers_fields_stand_for(change, expected):
    scheduler = {name: value for name, value in (SCHEDULER | change).items() if value is not ABSENT}
    scheduler = Fields("scheduler", scheduler, SCHEDULERS[scheduler["_class_name"]])
    config = read_config(Fields("unet", UNET, architecture.UNET), scheduler)
    assert config == dataclasses.replace(CONFIG, diffusion=Diffusion(**expected))


def test_folders_that_are_not_whole_are_named(tmp_path):
    assert (
        refusal(read_diffusers, tmp_path / "x")
        == f"{tmp_path}/x/config.json: is missing; download the whole folder"
    )
    folder = write(
        tmp_path, index={"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}
    )
    assert refusal(read_diffusers, folder).startswith(
        f"{folder}/model_index.json: vqvae is not supported"
    )
    (folder / "model_index.json").write_text("[]")
    assert (
        refusal(read_diffusers, folder)
        == f"{folder}/model_index.json: must be a JSON object; download it again"
    )
    (folder / "model_index.json").write_text("{")
    assert "model_index.json: cannot be read (" in refusal(read_diffusers, folder)


PROCESSES = {
    "dynamic": {"clip": "dynamic"},
    "learned": {"variance": "learned_range", "loss": "hybrid"},
    "cosine": {"schedule": "cosine", "prediction": "v", "variance": "fixed_small", "clip": False},
    "quad": {
        "schedule": "quad",
        "prediction": "x_0",
        "num_timesteps": 20,
        "beta_start": 0.01,
        "beta_end": 0.5,
    },
}


@pytest.mark.parametrize("fields", PROCESSES.values(), ids=PROCESSES)
def test_what_is_written_of_a_config_comes_back(fields):
    config = dataclasses.replace(CONFIG, diffusion=Diffusion(**fields))
    unet, scheduler = write_config(config)
    scheduler = Fields("scheduler", scheduler, SCHEDULERS[scheduler["_class_name"]])
    assert read_config(Fields("unet", unet, architecture.UNET), scheduler) == config


def test_what_is_written_comes_back_to_the_bit(tmp_path, params):
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, dropout=0.3),
        diffusion=Diffusion(**PROCESSES["learned"]),
        data=dataclasses.replace(CONFIG.data, image_shape=(8, 16, 3)),
    )
    params = params | {
        "out_conv": {"kernel": np.ones((3, 3, 4, 6), np.float32), "bias": np.ones(6, np.float32)}
    }
    for _ in range(2):  # A second time over the first.
        write_diffusers(tmp_path / "out", config, params)
    assert is_diffusers(tmp_path / "out")
    again, found = read_diffusers(tmp_path / "out")
    assert again == config
    assert_same(found, params)


def test_bfloat16_models_are_written_as_float32(tmp_path, params):
    config = dataclasses.replace(
        CONFIG, model=dataclasses.replace(CONFIG.model, dtype="bfloat16", remat=(0,))
    )
    write_diffusers(tmp_path, config, params)
    again, found = read_diffusers(tmp_path)
    assert again == CONFIG
    assert_same(found, params)


def with_rows(params, rows):
    """The parameters with a class embedding."""
    table = np.random.default_rng(4).standard_normal((rows, 16), np.float32)
    return {**params, "class_embedding": {"embedding": table}}


@pytest.mark.parametrize("no_class", [True, False])
def test_a_folder_with_classes_comes_back(tmp_path, params, no_class, caplog):
    """With 16 rows of 16 numbers: turned over, the embedding would fit, too."""
    config = with_(CONFIG, model={"num_classes": 16 - no_class, "no_class": no_class})
    params = with_rows(params, 16)
    with caplog.at_level(logging.WARNING):
        write_diffusers(tmp_path, config, params)
    rows = "0 to 14, or 15 for no class" if no_class else "0 to 15"
    (said,) = messages(caplog)
    assert said.endswith(f"gives the U-Net no labels; call its unet with class_labels={rows}")
    unet = json.loads((tmp_path / "unet/config.json").read_text())
    assert unet["num_class_embeds"] == 16
    assert {name for name in unet if name not in architecture.UNET} == {"_class_name"} | (
        {"no_class_row"} if no_class else set()
    )
    tensor = load_file(tmp_path / "unet" / WEIGHTS)["class_embedding.weight"]
    np.testing.assert_array_equal(tensor, params["class_embedding"]["embedding"])
    again, found = read_diffusers(tmp_path)
    assert again == config
    assert_same(found, params)


@pytest.mark.parametrize("marker", [{}, {"no_class_row": False}, {"no_class_row": None}])
def test_without_the_marker_every_row_is_a_class(tmp_path, tensors, params, marker):
    params = with_rows(params, 3)
    weights = save(tensors | {"class_embedding.weight": params["class_embedding"]["embedding"]})
    folder = write(tmp_path, unet=UNET | {"num_class_embeds": 3} | marker, weights=weights)
    loaded = load_weights(folder)
    model = loaded.ddpm.config.model
    assert (model.num_classes, model.no_class) == (3, False)
    assert_same(jax.tree.map(np.asarray, loaded.params), params)
    key = jax.random.key(0)
    for options, words in [
        ({"labels": 1, "guidance": 2}, "guidance: needs a model that knows images without a class"),
        ({"labels": 3}, "labels: must be from 0 to 2, got 3"),
        ({}, "labels: this model knows no images without a class; give labels from 0 to 2"),
    ]:
        sample = functools.partial(loaded.ddpm.sample, **options)
        said = refusal(sample, loaded.params, key, 2)
        assert said.startswith(words)


def test_a_class_embedding_that_does_not_fit_is_named(tmp_path, tensors):
    folder = write(tmp_path, unet=UNET | {"num_class_embeds": 3}, weights=save(tensors))
    assert "class_embedding.weight is missing" in refusal(read_diffusers, folder)
    rows = np.ones((16, 3), np.float32)
    (folder / WEIGHTS).write_bytes(save(tensors | {"class_embedding.weight": rows}))
    said = refusal(read_diffusers, folder)
    assert "class_embedding.weight has shape [16, 3], but must be [3, 16] by its JSON" in said


@pytest.mark.parametrize(
    ("group", "fields", "message"),
    [
        (
            "diffusion",
            {"prediction": "mean"},
            "diffusion.prediction: diffusers' schedulers have no 'mean', only eps",
        ),
        (
            "diffusion",
            {"variance": "learned", "loss": "hybrid"},
            "diffusion.variance: diffusers' schedulers have no",
        ),
        (
            "diffusion",
            {"schedule": "jsd"},
            "diffusion.schedule: diffusers' schedulers have no 'jsd', only linear",
        ),
        (
            "model",
            {"channel_multipliers": (2, 2)},
            "model.channel_multipliers: the first is 2, but must be 1 for diffusers",
        ),
    ],
)
def test_what_the_library_cannot_be_told_is_refused(tmp_path, params, group, fields, message):
    changed = dataclasses.replace(getattr(CONFIG, group), **fields)
    said = refusal(
        write_diffusers, tmp_path / "out", dataclasses.replace(CONFIG, **{group: changed}), params
    )
    assert said.startswith(message) and not (tmp_path / "out").exists()


def test_a_name_on_the_hub_is_downloaded_without_pickles(tmp_path, monkeypatch, tensors, params):
    """A stub of its client serves a flat folder's files, those that the patterns allow."""
    from fnmatch import fnmatch

    remote = write(
        tmp_path / "remote", index={"_class_name": "DDPMPipeline"}, weights=save(tensors)
    )
    (remote / "diffusion_pytorch_model.bin").write_bytes(b"\x80")
    (remote / "README.md").write_text("A model.")

    def snapshot_download(name, *, allow_patterns):
        if name != "google/ddpm-cifar10-32":
            raise RuntimeError("404 Client Error.\n\nRepository Not Found")
        folder = tmp_path / "cache"
        folder.mkdir()
        for file in remote.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                (folder / file.name).write_bytes(file.read_bytes())
        return str(folder)

    stub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", stub)
    folder = download("google/ddpm-cifar10-32")
    names = {"config.json", "scheduler_config.json", "model_index.json", WEIGHTS}
    assert {file.name for file in folder.iterdir()} == names
    config, found = read_diffusers(folder)
    assert config == CONFIG
    assert_same(found, params)
    said = refusal(download, "google/nothing")
    assert "huggingface.co (404 Client Error. Repository Not Found); check the name" in said
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert refusal(download, "google/ddpm-cifar10-32").endswith("pip install 'ddpm-jax[hub]'")


def test_names_on_the_hub_are_told_from_most_paths():
    assert is_hub_name("google/ddpm-cifar10-32") and is_hub_name("runs/digits")
    assert not any(
        map(is_hub_name, ["digits", "/a/b", "a/b/c", "./a", "../a", "gs://a/b", "~/a", "a/"])
    )


def test_patterns_take_shards_and_no_variants():
    """As huggingface.co's client matches them, with fnmatch on the path in the repository."""
    from fnmatch import translate

    from ddpm_jax.weights.hub import FILES, FOLDERS

    patterns = [re.compile(translate(folder + file)) for folder in FOLDERS for file in FILES]
    taken = (
        "unet/config.json",
        f"unet/{WEIGHTS}.index.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    )
    left = (
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/config.json",
    )
    for name in taken + left:
        assert any(pattern.match(name) for pattern in patterns) == (name in taken), name


def test_fields_that_the_scheduler_does_not_take_are_ignored_as_the_library_does(
    tmp_path, tensors, params, caplog
):
    """Schedulers' files carry those of others: of DDIM, a solver, or a newer version."""
    others = {"variance_type": "fixed_large", "solver_order": 2, "final_sigmas_type": "zero"}
    scheduler = SCHEDULER | {"_class_name": "DDIMScheduler"} | others
    folder = write(tmp_path, scheduler=scheduler, weights=save(tensors))
    config, found = read_diffusers(folder)
    assert config.diffusion.variance == "fixed_small"  # DDIM's, whatever the file says.
    assert_same(found, params)
    (message,) = [record.getMessage() for record in caplog.records]
    said = "DDIMScheduler does not take variance_type, solver_order, final_sigmas_type; ignored"
    assert said in message


def test_fields_that_the_scheduler_does_take_are_still_refused(tmp_path, tensors):
    folder = write(tmp_path, scheduler=SCHEDULER | {"trained_betas": [0.1]}, weights=save(tensors))
    assert "trained_betas is [0.1]; it must be null" in refusal(read_diffusers, folder)


@pytest.mark.parametrize("name", [WEIGHTS, f"{WEIGHTS}.index.json", "config.json"])
def test_a_pointer_of_git_lfs_gets_the_command(tmp_path, tensors, name):
    folder = write(tmp_path, index={"_class_name": "DDPMPipeline"}, weights=save(tensors))
    if name.startswith(WEIGHTS):
        (folder / WEIGHTS).unlink()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    said = refusal(read_diffusers, folder)
    assert name in said and "run `git lfs pull` in its folder" in said


@pytest.mark.parametrize("name", [*KINDS, "google/ddpm-cat-256"])
def test_known_names_are_raw_or_averaged_and_others_unknown(tmp_path, tensors, monkeypatch, name):
    folder = write(tmp_path, index={"_class_name": "DDPMPipeline"}, weights=save(tensors))
    monkeypatch.setattr("ddpm_jax.weights.load.download", lambda _: folder)
    monkeypatch.chdir(tmp_path)
    kind = {"google/ddpm-cifar10-32": "raw", "google/ddpm-cat-256": "unknown"}.get(name, "ema")
    assert load_weights(name).kind == kind
    other = {"raw": "ema", "ema": "raw", "unknown": "raw"}[kind]
    said = refusal(lambda _: load_weights(name, weights=other), None)
    only = "does not say whether" if kind == "unknown" else f"holds only {kind} weights"
    assert only in said
    if kind != "unknown":
        assert load_weights(name, weights=kind).kind == kind
    assert load_weights(folder).kind == "unknown"  # A folder does not say whose it is.


@pytest.mark.parametrize("place", ["", "unet"])
def test_a_pickle_is_converted_by_the_script_that_the_refusal_names(
    tmp_path, tensors, params, monkeypatch, place
):
    """With a stub of torch; the real one reads a real pickle in tests/test_diffusers.py."""
    main = runpy.run_path(str(CONVERT_BIN))["main"]
    folder = write(tmp_path / place, index={"_class_name": "DDPMPipeline"})
    (folder / WEIGHTS).unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"\x80")

    class Tensor(np.ndarray):
        detach = float = contiguous = lambda self: self

        def numpy(self):
            return np.asarray(self)

    calls = []

    def read(path, *, map_location, weights_only):
        calls.append((path, weights_only))
        return {name: tensor.view(Tensor) for name, tensor in tensors.items()}

    stub = types.SimpleNamespace(Tensor=Tensor, load=read)
    monkeypatch.setitem(sys.modules, "torch", stub)
    main(tmp_path)
    assert calls == [(folder / "diffusion_pytorch_model.bin", True)]
    assert_same(read_diffusers(folder)[1], params)
    assert "is there already" in refusal(main, tmp_path)
    (folder / WEIGHTS).unlink()
    stub.load = lambda *_, **__: {"a": object()}
    assert "not a state dict" in refusal(main, tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install torch" in refusal(main, tmp_path)
    assert "no diffusion_pytorch_model.bin there" in refusal(main, tmp_path / "nowhere")
