"""Converts the pickled weights of a diffusers folder to safetensors. Needs torch.

IN is a diffusion_pytorch_model.bin, or a folder that holds one, itself or in its unet/. The new
file, diffusion_pytorch_model.safetensors, is written beside it. torch reads the pickle with
weights_only=True, which runs no code in it.
"""

import argparse
import sys
from pathlib import Path

import safetensors.numpy

from ddpm_jax.errors import UserError, one_line
from ddpm_jax.storage.files import refuse_pointer, write_file
from ddpm_jax.weights.diffusers import PICKLE, WEIGHTS


def pickles_of(path: Path) -> list[Path]:
    """The file `path`, or the files of a folder. Raises UserError if there are none."""
    if path.is_file():
        return [path]
    for folder in (path, path / "unet"):
        if (folder / PICKLE).is_file():
            return [folder / PICKLE]
        shards = sorted(folder.glob(f"{Path(PICKLE).stem}-*-of-*.bin")) if folder.is_dir() else []
        if shards:
            return shards
    raise UserError(f"{path}: no {PICKLE} there; name the file or its folder")


def read_tensors(path: Path) -> dict:
    """The tensors of a pickle as NumPy arrays, by name. Raises UserError for anything else."""
    try:
        import torch
    except ImportError:
        raise UserError(
            "torch is not installed; pip install torch, or convert the file on another machine"
        ) from None
    try:
        with path.open("rb") as file:
            refuse_pointer(file.read(200))
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for files that are not plain weights.
        words = one_line(str(error).strip().partition("\n")[0], 300)
        raise UserError(f"{path}: cannot be read as plain weights ({words})") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(tensor, torch.Tensor) for tensor in tensors.values()
    ):
        raise UserError(f"{path}: not a state dict, a dict of tensors by name; use another file")
    return {name: tensor.detach().float().contiguous().numpy() for name, tensor in tensors.items()}


def main(source: Path) -> None:
    """Reads the weights of `source` and writes them beside it."""
    pickles = pickles_of(source)
    target = pickles[0].with_name(WEIGHTS)
    if target.exists():
        raise UserError(f"{target}: is there already; move it away to convert again")
    tensors: dict = {}
    for pickle in pickles:
        tensors |= read_tensors(pickle)
    write_file(target, safetensors.numpy.save(tensors, {"format": "pt"}))
    print(f"{target}: {len(tensors)} tensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="IN", type=Path)
    try:
        main(**vars(parser.parse_args()))
    except UserError as error:
        print(f"convert_bin: {error}", file=sys.stderr)
        sys.exit(2)
