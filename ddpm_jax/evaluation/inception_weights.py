"""Reads the file of InceptionV3's weights."""

from pathlib import Path

import jax
import numpy as np
from etils import epath

from ddpm_jax.errors import UserError, one_line
from ddpm_jax.models import inception_shapes
from ddpm_jax.shapes import PyTree
from ddpm_jax.storage.files import parse_npz, refuse_pointer

# Our name of a parameter: (its name in a PyTorch file, the order of its axes there).
_UNIT = {
    "kernel": ("conv.weight", (2, 3, 1, 0)),
    "scale": ("bn.weight", (0,)),
    "bias": ("bn.bias", (0,)),
    "mean": ("bn.running_mean", (0,)),
    "variance": ("bn.running_var", (0,)),
}
CONVERT = "python scripts/convert_inception.py FILE OUT.safetensors"


def load_inception(path: epath.PathLike) -> PyTree:
    """The parameters for `inception_features`, from a .safetensors or .npz file.

    Names and axes are those of a PyTorch state dict, such as `Mixed_5b.branch1x1.conv.weight`. The
    last bias and the counters of the batch norms are ignored; the network does not use them.
    Raises UserError for files of other kinds, and for a tensor that is missing, unexpected or of
    another shape; the error names the tensor.
    """
    path = Path(path).expanduser()
    if path.suffix not in (".safetensors", ".npz"):
        raise UserError(
            f"{path}: must be .safetensors or .npz; convert a .pth or .pkl file with `{CONVERT}` "
            "(needs torch)"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); "
            "pass the file of InceptionV3's weights"
        ) from error
    try:
        refuse_pointer(content)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    try:
        tensors = _READERS[path.suffix](content)
    except MemoryError:
        raise
    except Exception as error:  # A damaged file raises errors of many kinds.
        raise UserError(
            f"{path}: is not a {path.suffix} file of plain arrays ({one_line(str(error), 200)}); "
            f"write it again with `{CONVERT}`"
        ) from error
    return from_state_dict(tensors, str(path))


def from_state_dict(tensors: dict[str, np.ndarray], title: str) -> PyTree:
    """The parameters for `inception_features` from the tensors; `title` names them in errors."""
    shapes, tree = jax.tree_util.tree_flatten_with_path(inception_shapes())
    left = {name: tensor for name, tensor in tensors.items() if not _is_unused(name)}
    params = [_take(left, [key.key for key in keys], shape.shape, title) for keys, shape in shapes]
    if left:
        raise UserError(
            f"{title}: {_some(left)} is not part of FID's InceptionV3; use the weights of that "
            "network, since others give other scores"
        )
    return jax.tree.unflatten(tree, params)


def _take(left, keys, shape, title):
    """Takes the parameter at `keys`, of `shape`, out of the tensors `left`."""
    if keys == ["fc"]:
        name = "fc.weight"
        axes: tuple[int, ...] = (1, 0)
    else:
        last, axes = _UNIT[keys[-1]]
        name = ".".join([*keys[:-1], last])
    if name not in left:
        raise UserError(
            f"{title}: {name} is missing; use a complete file of FID's InceptionV3 weights"
        )
    tensor = left.pop(name)
    expected = tuple(shape[axes.index(i)] for i in range(len(shape)))
    if tensor.shape != expected or tensor.dtype.kind != "f":
        raise UserError(
            f"{title}: {name} is {tensor.dtype} {list(tensor.shape)}; "
            f"FID's InceptionV3 needs floats {list(expected)}"
        )
    return np.ascontiguousarray(tensor.transpose(axes), np.float32)


def _is_unused(name: str) -> bool:
    return name == "fc.bias" or name.endswith(".num_batches_tracked")


def _some(names) -> str:
    """The first of the names, and the number of the others."""
    first, *others = names
    return f"{one_line(first, 200)} (and {len(others)} more)" if others else one_line(first, 200)


def _read_safetensors(content: bytes):
    from safetensors.numpy import load

    return load(content)


_READERS = {".safetensors": _read_safetensors, ".npz": parse_npz}
