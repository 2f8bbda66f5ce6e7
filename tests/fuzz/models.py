"""Damaged models: .safetensors of `export`, diffusers folders, InceptionV3's weights."""

import functools
import json
import tempfile
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy

from ddpm_jax.ddpm import DDPM
from ddpm_jax.evaluation import inception_weights
from ddpm_jax.weights.diffusers import write_diffusers
from ddpm_jax.weights.load import load_weights
from ddpm_jax.weights.single_file import write_single_file
from fuzz.arrays import measured, model, npz
from fuzz.edits import edit_bytes
from fuzz.formats import edit_npz, edit_safetensors
from fuzz.json_edits import edit_json
from fuzz.reader import Reader, edit_one, files_of

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 143\n" % 0
WEIGHTS = "diffusion_pytorch_model"


@functools.cache
def _single_file(with_measured=False):
    about = {"weights": "ema", "step": 2, "data_fingerprint": "abc"}
    known = (measured(),) if with_measured else ()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        write_single_file(path, model().ddpm.config, model().params, about, *known)
        return {"model.safetensors": path.read_bytes()}


@functools.cache
def _pipeline():
    with tempfile.TemporaryDirectory() as folder:
        write_diffusers(folder, model().ddpm.config, model().params)
        return files_of(Path(folder))


@functools.cache
def _sharded():
    """The weights in two files, and an index."""
    files = dict(_pipeline())
    tensors = safetensors.numpy.load(files.pop(f"unet/{WEIGHTS}.safetensors"))
    names = sorted(tensors)
    weight_map = {}
    for number, some in enumerate((names[::2], names[1::2]), 1):
        shard = f"{WEIGHTS}-{number:05d}-of-00002.safetensors"
        files[f"unet/{shard}"] = safetensors.numpy.save({name: tensors[name] for name in some})
        weight_map |= dict.fromkeys(some, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    return files | {f"unet/{WEIGHTS}.safetensors.index.json": json.dumps(index).encode()}


def _edit_folder(rng, files):
    """An edit of one file by its format; or a file removed, emptied, swapped, or a pointer."""
    name = rng.choice(sorted(files))
    files = dict(files)
    action = rng.randrange(20)
    if action == 0:
        del files[name]
    elif action == 1:
        files[name] = rng.choice((b"", POINTER))
    elif action == 2:
        other = rng.choice(sorted(files))
        files[name], files[other] = files[other], files[name]
    elif action == 3:
        files[name] = edit_bytes(rng, files[name])
    else:
        edit = edit_json if name.endswith(".json") else edit_safetensors
        files[name] = edit(rng, files[name])
    return files


def _edit_path(rng, files):
    """One damaged file that is or is not of a model, under one of its names."""
    names = ("config.json", "model_index.json", "x.safetensors", "x.bin", "x", "x.ckpt")
    contents = (*files.values(), *_pipeline().values(), POINTER)
    return {rng.choice(names): edit_bytes(rng, rng.choice(contents))}


def read_model(path):
    loaded = load_weights(path)
    shapes = jax.eval_shape(DDPM(loaded.ddpm.config).init, jax.random.key(0))
    expected = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes)
    found = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), loaded.params)
    assert found == expected, "the parameters are not the network's"
    assert loaded.kind in ("ema", "raw", "unknown"), loaded.kind
    assert loaded.step is None or type(loaded.step) is int, loaded.step
    assert loaded.data_fingerprint is None or isinstance(loaded.data_fingerprint, str)
    assert loaded.words and loaded.label
    return "read"


def _read_path(folder, rng):
    (path,) = folder.iterdir()
    whole = path.name == "model.safetensors"
    return read_model(path if whole else rng.choice((folder, path)))


# Two layers of InceptionV3: all of it has 24 million parameters.
LAYERS = ("Conv2d_1a_3x3", "Mixed_5b")


@functools.cache
def _small_inception():
    return {name: ALL_SHAPES()[name] for name in LAYERS}


ALL_SHAPES = inception_weights.inception_shapes


def use_small_inception():
    """For the whole process, which runs nothing else."""
    inception_weights.inception_shapes = _small_inception


@functools.cache
def _state_dict():
    leaves, _ = jax.tree_util.tree_flatten_with_path(_small_inception())
    tensors = {}
    for path, shape in leaves:
        *layer, kind = (key.key for key in path)
        last, axes = inception_weights._UNIT[kind]
        sizes = [shape.shape[axes.index(i)] for i in range(len(axes))]
        tensors[".".join((*layer, last))] = np.zeros(sizes, np.float16)
    return {
        "x.npz": npz(**tensors),
        "x.safetensors": safetensors.numpy.save(tensors),
    }


def _valid_inception(rng):
    name = rng.choice(sorted(_state_dict()))
    return {name: _state_dict()[name]}


def _edit_inception(rng, files):
    edits = {"x.npz": edit_npz, "x.safetensors": edit_safetensors}
    return {name: edits[name](rng, content) for name, content in files.items()}


def _read_inception(folder, rng):
    (path,) = folder.iterdir()
    params = inception_weights.load_inception(path)
    expected = jax.tree.map(lambda leaf: leaf.shape, _small_inception())
    assert jax.tree.map(lambda leaf: leaf.shape, params) == expected
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    return "read"


READERS = [
    Reader(
        "model.safetensors",
        700,
        lambda rng: _single_file(rng.random() < 0.3),
        edit_one(edit_safetensors),
        lambda folder, rng: read_model(folder / "model.safetensors"),
    ),
    Reader(
        "diffusers folder",
        700,
        lambda rng: rng.choice((_pipeline(), _sharded())),
        _edit_folder,
        lambda folder, rng: read_model(folder),
    ),
    Reader(
        "path of a model",
        200,
        lambda rng: _single_file(),
        _edit_path,
        _read_path,
    ),
    Reader("inception weights", 300, _valid_inception, _edit_inception, _read_inception),
]
