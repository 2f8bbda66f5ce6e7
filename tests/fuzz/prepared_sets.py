"""Damaged data sets that tensorflow_datasets has prepared: its JSON and its records."""

import contextlib
import functools
import sys
import tempfile
from pathlib import Path

import numpy as np
import prepared

from ddpm_jax.config import Data
from ddpm_jax.data import load_source, tfds
from fuzz.edits import edit_bytes
from fuzz.json_edits import edit_json
from fuzz.reader import Reader, files_of


@functools.cache
def _prepared():
    sys.meta_path.insert(0, prepared.NoTensorFlow())  # Damaged files must not start a download.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        prepared.prepare(folder)
        return files_of(Path(folder))


def _edit(rng, files):
    """A file edited, removed or emptied, in a folder that no case before has used."""
    files = dict(files)
    name = rng.choice(sorted(files))
    action = rng.randrange(10)
    if action == 0:
        del files[name]
    elif action == 1:
        files[name] = b""
    elif name.endswith(".json"):
        files[name] = edit_json(rng, files[name])
    else:
        files[name] = edit_bytes(rng, files[name])
    place = str(rng.random())
    return {f"{place}/{name}": content for name, content in files.items()}


def _read(folder, rng):
    whole = (folder / "own_pictures").exists()
    place = folder if whole else next(folder.iterdir())
    data = Data(source="tfds:own_pictures", dir=str(place), image_shape=(6, 5, 3), flip=False)
    try:
        source = load_source(data)
        images = source.read(np.arange(len(source)))
    finally:
        tfds._open.cache_clear()
    assert images.dtype == np.uint8 and images.shape == (len(source), 6, 5, 3)
    assert source.labels is None or len(source.labels) == len(source)
    return "read"


READERS = [Reader("tfds folder", 150, lambda rng: _prepared(), _edit, _read, keeps=False)]
