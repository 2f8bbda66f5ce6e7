"""The file that holds InceptionV3's weights."""

import io
from pathlib import Path

import jax
import numpy as np

from ddpm_jax.errors import UserError
from ddpm_jax.models import inception_shapes

# Our name of a parameter, and that of a PyTorch file with the order of its axes.
_UNIT = {
    "kernel": ("conv.weight", (2, 3, 1, 0)),
    "scale": ("bn.weight", (0,)),
    "bias": ("bn.bias", (0,)),
    "mean": ("bn.running_mean", (0,)),
    "variance": ("bn.running_var", (0,)),
}
CONVERT = "python scripts/convert_inception.py FILE OUT.safetensors"


def load_inception(path):
    """The parameters for `inception_features`, from a .safetensors or .npz file.

    It has a PyTorch state dict's names and axes, `Mixed_5b.branch1x1.conv.weight` and so on. What the network does not
    use, the last bias and the batch norms' counters, is ignored. Raises UserError naming the tensor that is missing,
    left over or of another shape, and for files of other kinds.
    """
    path = Path(path).expanduser()
    if path.suffix not in (".safetensors", ".npz"):
        raise UserError(
            f"{path}: InceptionV3's weights are read from .safetensors or .npz; a .pth or .pkl file becomes one by "
            f"`{CONVERT}`, which needs torch"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); name InceptionV3's weights"
        ) from error
    try:
        tensors = _READERS[path.suffix](content)
    except Exception as error:
        raise UserError(
            f"{path}: is not a {path.suffix} file of plain arrays ({error}); make it again"
        ) from error
    return from_state_dict(tensors, str(path))


def from_state_dict(tensors: dict[str, np.ndarray], title: str):
    """`load_inception`'s parameters from the tensors themselves; `title` names them in what is raised."""
    shapes, tree = jax.tree_util.tree_flatten_with_path(inception_shapes())
    left = {name: tensor for name, tensor in tensors.items() if not _is_unused(name)}
    params = [_take(left, [key.key for key in keys], shape.shape, title) for keys, shape in shapes]
    if left:
        raise UserError(
            f"{title}: {_some(left)} is not of FID's InceptionV3; other Inceptions give other numbers"
        )
    return jax.tree.unflatten(tree, params)


def _take(left, keys, shape, title):
    """The parameter at `keys`, of `shape`; takes it out of the tensors `left`."""
    if keys == ["fc"]:
        name, axes = "fc.weight", (1, 0)
    else:
        last, axes = _UNIT[keys[-1]]
        name = ".".join([*keys[:-1], last])
    if name not in left:
        raise UserError(
            f"{title}: {name} is missing; it is not FID's InceptionV3, or not all of it"
        )
    tensor = left.pop(name)
    expected = tuple(shape[axes.index(i)] for i in range(len(shape)))
    if tensor.shape != expected or tensor.dtype.kind != "f":
        raise UserError(
            f"{title}: {name} is {tensor.dtype} {list(tensor.shape)}, and FID's InceptionV3 has floats "
            f"{list(expected)} there"
        )
    return np.ascontiguousarray(tensor.transpose(axes), np.float32)


def _is_unused(name: str) -> bool:
    return name == "fc.bias" or name.endswith(".num_batches_tracked")


def _some(names) -> str:
    """The first of the names, and how many more there are."""
    first, *others = names
    return f"{first} (and {len(others)} more)" if others else first


def _read_safetensors(content: bytes):
    from safetensors.numpy import load

    return load(content)


def _read_npz(content: bytes):
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


_READERS = {".safetensors": _read_safetensors, ".npz": _read_npz}
