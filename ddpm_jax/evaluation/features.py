"""Features of images, by FID's InceptionV3 or by the proxy; computed once and kept in files."""

import hashlib
import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ddpm_jax.data import Source
from ddpm_jax.devices.mesh import fetch, place, replicate
from ddpm_jax.devices.processes import agreed, wait_for_all
from ddpm_jax.devices.progress import progress_bar
from ddpm_jax.devices.rows import full_batches
from ddpm_jax.devices.runtime import user_cache
from ddpm_jax.evaluation.inception_weights import load_inception
from ddpm_jax.evaluation.metrics import Statistics, statistics
from ddpm_jax.evaluation.proxy import train_classifier
from ddpm_jax.models import classifier_features, inception_features
from ddpm_jax.storage.files import npz, path_of, read_npz, write_file
from ddpm_jax.weights.names import flat_params, nested_params

PART = 1024
"""Images a file."""

BATCH = 64
"""Images a device at a time: the last bits of features may depend on it, so it is always the same."""

COMPARED = 10_000
"""Real images whose features are kept together, for what compares images one by one, at most."""

VERSION = 1
"""Of what is kept: another number where the proxy, its training or the files' contents are others."""


class Extractor(NamedTuple):
    """A network whose features images are compared by."""

    kind: Literal["inception", "proxy"]
    apply: Callable
    """(params, uint8 [B,H,W,C]) -> (features [B,D], logits [B,K]), jitted."""
    params: Any
    mesh: Mesh
    """What params lie on."""
    sha256: str
    """Of the file of the weights, or of the proxy's own."""
    about: dict[str, Any]
    """What else a result must say of it."""


def inception(path: epath.PathLike, mesh: Mesh) -> Extractor:
    """FID's InceptionV3 with the weights of the file `path`. Raises UserError if it is not one of its weights."""
    params = replicate(load_inception(path), mesh)
    sha256 = hashlib.sha256(path_of(path).read_bytes()).hexdigest()
    about = {
        "resize": "to 299x299, bilinear without half-pixel centres or antialiasing, as TensorFlow 1"
    }
    return Extractor("inception", inception_features, params, mesh, sha256, about)


def proxy(source: Source, indices: np.ndarray, root: epath.Path, mesh: Mesh) -> Extractor:
    """A classifier of the images `indices` of `source`, trained on their labels once and kept in `root`.

    Raises UserError if they have none.
    """
    file = _folder(root, source, indices, "proxy") / "classifier.npz"
    if not agreed(file.exists()):
        trained = train_classifier(source, indices)
        write_file(
            file, npz({**flat_params(trained.params), "accuracy": np.array(trained.accuracy)})
        )
    wait_for_all("proxy")
    arrays = read_npz(file)
    accuracy, hashed = float(arrays.pop("accuracy")), hashlib.sha256()
    for array in arrays.values():
        hashed.update(np.ascontiguousarray(array))
    params = replicate(nested_params(arrays), mesh)
    about = {
        "accuracy": accuracy,
        "trained_on": {"data_fingerprint": source.fingerprint, "images": len(indices)},
    }
    return Extractor("proxy", classifier_features, params, mesh, hashed.hexdigest(), about)


def cache_root(source: Source, shared: epath.Path) -> epath.Path:
    """Where what is computed of a source's images is kept: beside its files, or else in the user's cache.

    Of several processes in `shared`, a folder that all of them see.
    """
    if jax.process_count() > 1:
        return shared
    if source.beside is not None and os.access(source.beside, os.W_OK):
        return epath.Path(source.beside) / "ddpm_jax-features"
    return epath.Path(user_cache()) / "features"


class Features(NamedTuple):
    """Of a set of images, in its order."""

    features: np.ndarray
    """[N,D] float32."""
    logits: np.ndarray
    """[N,K] float32."""


def features_of(
    extractor: Extractor,
    read: Callable,
    count: int,
    folder: epath.Path,
    tag: Callable[[np.ndarray], str],
) -> Features:
    """Of the images 0, ..., `count` - 1 that `read` gives as uint8 [B,H,W,C]; those that lie in `folder` are reused.

    `tag` maps indices to a word that tells their images from others that may take their places.
    """
    parts = [
        read_npz(file)
        for file in _make_parts(extractor, read, count, folder, Features._fields, tag)
    ]
    return Features(*(np.concatenate([part[name] for part in parts]) for name in Features._fields))


class Reference(NamedTuple):
    """What samples are compared with."""

    statistics: Statistics
    """Of all images."""
    features: np.ndarray
    """[N,D] float32 of at most COMPARED of them, chosen whatever their order is."""


def reference_of(
    extractor: Extractor, source: Source, indices: np.ndarray, root: epath.Path
) -> Reference:
    """Of the images `indices` of `source`, kept in `root` under their fingerprint."""
    folder = _folder(root, source, indices, extractor.sha256)
    file = folder / "statistics.npz"
    if not agreed(file.exists()):
        files = _reference_parts(extractor, source, indices, folder)
        kept = statistics(read_npz(part)["features"] for part in files)._asdict()
        order = np.argsort(
            np.random.Philox(key=[0, len(indices)]).random_raw(len(indices)), kind="stable"
        )
        some = np.sort(order[:COMPARED])
        rows = [
            read_npz(part)["features"][some[(some >= start) & (some < start + PART)] - start]
            for start, part in zip(range(0, len(indices), PART), files, strict=True)
        ]
        write_file(file, npz({**kept, "features": np.concatenate(rows)}))
    wait_for_all("statistics")
    kept = read_npz(file)
    return Reference(
        Statistics(kept["mean"], kept["covariance"], int(kept["count"])), kept["features"]
    )


def all_features(
    extractor: Extractor, source: Source, indices: np.ndarray, root: epath.Path
) -> np.ndarray:
    """[N,D] of all the images `indices` of `source`, kept in `root` as those of `reference_of` are."""
    files = _reference_parts(
        extractor, source, indices, _folder(root, source, indices, extractor.sha256)
    )
    return np.concatenate([read_npz(file)["features"] for file in files])


def extract(extractor: Extractor, images: np.ndarray) -> Features:
    """Of uint8 images [N,H,W,C]: all count, a last batch is filled up with images that do not."""
    parts = []
    for rows, count in full_batches(len(images), BATCH * extractor.mesh.size):
        result = extractor.apply(extractor.params, place(images[rows], extractor.mesh))
        parts.append([array[:count] for array in fetch(result)])
    return Features(*map(np.concatenate, zip(*parts, strict=True)))


def _reference_parts(extractor, source, indices, folder) -> list[epath.Path]:
    def read(some):
        return source.read(indices[some])

    return _make_parts(extractor, read, len(indices), folder, ("features",), lambda _: "all")


def _make_parts(extractor, read, count, folder, fields, tag) -> list[epath.Path]:
    """The files of PART images each, those that are missing made."""
    files = []
    with progress_bar(total=count, desc=f"{extractor.kind} features", unit="image") as progress:
        for start in range(0, count, PART):
            indices = np.arange(start, min(start + PART, count))
            files.append(folder / f"{start:08d}-{len(indices):04d}-{tag(indices)}.npz")
            if not agreed(files[-1].exists()):
                made = extract(extractor, read(indices))
                write_file(files[-1], npz({field: getattr(made, field) for field in fields}))
            progress.update(len(indices))
    wait_for_all("features")
    return files


def _folder(root: epath.Path, source: Source, indices: np.ndarray, what: str) -> epath.Path:
    """For what is computed of these images."""
    hashed = hashlib.blake2b(f"{source.fingerprint} {what} {VERSION}".encode(), digest_size=8)
    hashed.update(np.asarray(indices, np.int64).tobytes())
    return root / hashed.hexdigest()
