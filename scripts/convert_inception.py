"""Converts a PyTorch file of FID's InceptionV3 for `ddpm-jax evaluate --inception`. Needs torch.

IN is pytorch-fid's pt_inception-2015-12-05-6726825d.pth, torch-fidelity's
weights-inception-2015-12-05-6726825d.pth, or another state dict with the same names. No code in it
is run. Prints the sha256 of the new file.
"""

import argparse
import hashlib
import sys
import zipfile
from pathlib import Path

import safetensors.numpy

from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.inception_weights import from_state_dict
from ddpm_jax.storage.files import write_file


def read_state_dict(path: Path):
    """The tensors of a state dict as NumPy arrays, by name. Raises UserError for anything else."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    try:
        import torch
    except ImportError:
        raise UserError(
            "torch is not installed; pip install torch, or convert the file on another machine"
        ) from None
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            scripted = any(name.endswith("constants.pkl") for name in archive.namelist())
        if scripted:
            raise UserError(
                f"{path}: is a TorchScript program (like StyleGAN's file) with other tensor names; "
                "use pytorch-fid's pt_inception-2015-12-05-6726825d.pth, which is the same network"
            )
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); fix that or use another file"
        ) from error
    except Exception as error:  # torch raises many kinds for files that are not plain weights.
        words = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{path}: torch cannot read it as plain weights ({words}); use a state dict"
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(tensor, torch.Tensor) for tensor in tensors.values()
    ):
        raise UserError(
            f"{path}: not a state dict, a dict of tensors by name; "
            "save the network with torch.save(network.state_dict(), PATH)"
        )
    return {
        name: tensor.detach().float().contiguous().numpy()
        for name, tensor in tensors.items()
        if not name.endswith(".num_batches_tracked")
    }


def main(source: Path, target: Path) -> None:
    """Reads the file `source`, checks the name and shape of every tensor, and writes `target`."""
    if target.suffix != ".safetensors":
        raise UserError(f"{target}: the output is a safetensors file; name it OUT.safetensors")
    tensors = read_state_dict(source)
    from_state_dict(tensors, str(source))
    content = safetensors.numpy.save({name: tensors[name] for name in sorted(tensors)})
    write_file(target, content)
    print(f"{target}: {len(tensors)} tensors, sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="IN", type=Path)
    parser.add_argument("target", metavar="OUT.safetensors", type=Path)
    try:
        main(**vars(parser.parse_args()))
    except UserError as error:
        print(f"convert_inception: {error}", file=sys.stderr)
        sys.exit(2)
