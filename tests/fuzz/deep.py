"""Damaged deep images and arrays in a folder beside a whole one."""

import functools
import io

import numpy as np
import tifffile

from ddpm_jax.config import Data
from ddpm_jax.data import load_source
from ddpm_jax.data.deep_files import image_file_bytes
from fuzz.formats import edit_npy, edit_npz, edit_png
from fuzz.reader import Reader

GOOD = np.random.default_rng(2).integers(0, 65536, (8, 8, 3), dtype=np.uint16)
EDITS = {"npy": edit_npy, "npz": edit_npz}


def _tiff(values, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, values, metadata=None, **options)
    return file.getvalue()


def _npz(**arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


@functools.cache
def _files():
    large = np.pad(GOOD, ((0, 4), (0, 2), (0, 0)), "wrap")
    floats = large / np.float32(9)
    planes = np.moveaxis(large, 2, 0)
    colours = {"photometric": "rgb"}
    return [
        ("png", image_file_bytes(large, ".png")),
        ("png", image_file_bytes(large[..., :1], ".png")),
        ("floats.tif", image_file_bytes(floats, ".tif")),
        ("tif", _tiff(large, compression="zlib", predictor=2, rowsperstrip=3, **colours)),
        ("tif", _tiff(large, byteorder=">", tile=(16, 16), **colours)),
        ("tif", _tiff(planes, planarconfig="separate", **colours)),
        ("tif", _tiff(planes, photometric="minisblack")),
        ("floats.npy", image_file_bytes(floats, ".npy")),
        ("floats.npz", _npz(image=floats, mask=np.zeros(3))),
    ]


def _valid(rng):
    ending, content = rng.choice(_files())
    return {"good.png": image_file_bytes(GOOD, ".png"), f"other.{ending}": content}


def _edit(rng, files):
    name = max(files)
    edit = EDITS.get(name.rpartition(".")[2], edit_png)
    return files | {name: edit(rng, files[name])}


def _read(folder, rng):
    """The whole image is as it was, the damaged one is there or not, the same at each reading."""
    other = max(path.name for path in folder.iterdir())
    deep = rng.random() < 0.5 and ".floats." not in other
    values = "uint16" if deep else "standardise"
    data = Data(
        source=f"folder:{folder}",
        image_shape=(8, 8, 3),
        values=values,
        skip_unfit=rng.random() < 0.5,
    )
    source = load_source(data)
    images = source.read(np.arange(len(source)))
    assert images.dtype == (np.uint16 if deep else np.float32), images.dtype
    assert images.shape[1:] == (8, 8, 3), images.shape
    assert (images[source.names.index("good.png")] == GOOD).all(), "another image"
    again = load_source(data)
    assert again.names == source.names and again.fingerprint == source.fingerprint
    same = np.array_equal(images, again.read(np.arange(len(source))), equal_nan=not deep)
    assert same, "the same files give other pixels at the second reading"
    return "read" if len(source) == 2 else "left out"


READERS = [Reader("deep image", 400, _valid, _edit, _read)]
