"""Converts the tensors of a diffusers U-Net to this package's tree of parameters, and back.

Names and axes differ: diffusers has `down_blocks.0.resnets.1.conv1.weight` and torch's axes
[O,I,H,W] and [O,I]; this package has `down_0_1_block`, `conv_0`, `kernel` and [H,W,I,O] and [I,O].
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from etils import epath

from ddpm_jax.errors import UserError
from ddpm_jax.shapes import PyTree
from ddpm_jax.storage.files import refuse_pointer

MODULES = {
    "stem": "conv_in",
    "time_0": "time_embedding.linear_1",
    "time_1": "time_embedding.linear_2",
    "class_embedding": "class_embedding",
    "mid_0_block": "mid_block.resnets.0",
    "mid_attention": "mid_block.attentions.0",
    "mid_1_block": "mid_block.resnets.1",
    "out_norm": "conv_norm_out",
    "out_conv": "conv_out",
}
"""Our names and diffusers', for the modules outside the levels of the way down and up."""

LAYERS = {
    "norm_0": "norm1",
    "conv_0": "conv1",
    "time": "time_emb_proj",
    "norm_1": "norm2",
    "conv_1": "conv2",
    "shortcut": "conv_shortcut",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "out": "to_out.0",
}
"""Our names and diffusers', within a residual block or an attention."""

OLD_LAYERS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""The names of attention's layers in early versions of the library, and the current ones."""

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}

TO_OUR_AXES = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}
"""How to transpose a tensor of 1, 2 or 4 axes from diffusers' order to ours."""

TO_THEIR_AXES = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}
"""How to transpose an array of 1, 2 or 4 axes from our order to diffusers'."""

EMBEDDING = "class_embedding.weight"
"""The library's name of the one matrix that is not transposed: [classes, width] in both."""


def read_tensors(file: epath.Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, as float32.

    Raises UserError if the file is of another kind or its tensors are not floats.
    """
    try:
        content = file.read_bytes()
        refuse_pointer(content)
        stored = safetensors.deserialize(content)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{file}: cannot be read as safetensors ({error}); download it again"
        ) from error
    tensors = {}
    for name, tensor in stored:
        if tensor["dtype"] not in DTYPES:
            raise UserError(
                f"{file}: {name} is {tensor['dtype']}; it must be one of {', '.join(DTYPES)}"
            )
        array = np.frombuffer(tensor["data"], DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
        tensors[name] = array.astype(np.float32, copy=False)
    return tensors


def to_params(tensors: dict[str, np.ndarray], shapes: PyTree, source: object) -> PyTree:
    """The tree of `tensors`, which have the library's names, in the form of the tree `shapes`.

    Raises UserError naming the tensors that are missing, unexpected or of another shape, and
    `source`, where they come from.
    """
    tensors = {_new_name(name): tensor for name, tensor in tensors.items()}
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    names = [_name(_keys(path), _levels(shapes)) for path, _ in leaves]
    _refuse(source, "is missing", "are missing", [name for name in names if name not in tensors])
    left_over = list(tensors.keys() - set(names))
    _refuse(
        source,
        "is not in the network that its JSON describes",
        "are not in the network that its JSON describes",
        left_over,
    )
    params = [
        _to_ours(tensors[name], leaf.shape, name, source)
        for name, (_, leaf) in zip(names, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, params)


def from_params(params: PyTree) -> dict[str, np.ndarray]:
    """The tensors of a tree of parameters, as float32 with the library's names."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {
        _name(_keys(path), _levels(params)): _to_theirs(np.asarray(leaf), _keys(path))
        for path, leaf in leaves
    }


def _keys(path) -> tuple[str, ...]:
    return tuple(key.key for key in path)


def _levels(tree) -> int:
    return 1 + max(int(module.split("_")[1]) for module in tree if module.startswith("down_"))


def _name(keys: tuple[str, ...], levels: int) -> str:
    """down_blocks.0.resnets.1.conv1.weight for (down_0_1_block, conv_0, kernel)."""
    module, *layer, leaf = keys
    names = [
        _module_name(module, levels),
        *(LAYERS[name] for name in layer),
        "bias" if leaf == "bias" else "weight",
    ]
    return ".".join(names)


def _module_name(module: str, levels: int) -> str:
    if module in MODULES:
        return MODULES[module]
    way, level, rest = module.split("_", 2)
    # On the way up, diffusers counts the levels from the coarsest.
    number = int(level) if way == "down" else levels - 1 - int(level)
    if rest in ("downsample", "upsample"):
        return f"{way}_blocks.{number}.{rest}rs.0.conv"
    index, kind = rest.split("_")
    kinds = {"block": "resnets", "attention": "attentions"}
    return f"{way}_blocks.{number}.{kinds[kind]}.{index}"


def _new_name(name: str) -> str:
    old = "|".join(OLD_LAYERS)
    return re.sub(
        rf"(attentions\.\d+)\.({old})\.", lambda match: f"{match[1]}.{OLD_LAYERS[match[2]]}.", name
    )


def _to_ours(tensor: np.ndarray, shape: tuple[int, ...], name: str, source) -> np.ndarray:
    """`tensor` with our axes: [H,W,I,O] for [O,I,H,W], and [I,O] for [O,I] or [O,I,1,1].

    Vectors stay as they are. [O,I,1,1] is a 1x1 convolution.
    """
    found = tensor.shape
    if len(shape) == 2 and tensor.shape[2:] == (1, 1):
        tensor = tensor[:, :, 0, 0]
    if tensor.ndim == len(shape) and name != EMBEDDING:
        tensor = tensor.transpose(TO_OUR_AXES[len(shape)])
    if tensor.shape != shape:
        axes = range(2) if name == EMBEDDING else TO_THEIR_AXES[len(shape)]
        expected = [shape[axis] for axis in axes]
        raise UserError(
            f"{source}: {name} has shape {list(found)}, but must be {expected} by its JSON; "
            "download the whole folder again"
        )
    return np.ascontiguousarray(tensor)


def _to_theirs(array: np.ndarray, keys: tuple[str, ...]) -> np.ndarray:
    if keys[-1] != "embedding":
        array = array.transpose(TO_THEIR_AXES[array.ndim])
    if keys[-2:] == ("shortcut", "kernel"):
        array = array[:, :, None, None]
    return np.ascontiguousarray(array, np.float32)


def _refuse(source, one: str, several: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        problem = one if len(names) == 1 else several
        raise UserError(
            f"{source}: {', '.join(sorted(names)[:3])}{more} {problem}; "
            "download the whole folder again"
        )
