"""Features of images, by FID's InceptionV3 or by the proxy; computed once and kept in files."""

import hashlib
import logging
import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from etils import epath
from jax.sharding import Mesh

from ddpm_jax.data import Source
from ddpm_jax.files import npz, path_of, read_npz, write_file
from ddpm_jax.interop import flat_params, nested_params
from ddpm_jax.metrics import Statistics, statistics
from ddpm_jax.models import classifier_features, inception_features, load_inception
from ddpm_jax.parallel import fetch, place, replicate
from ddpm_jax.processes import agreed, wait_for_all
from ddpm_jax.progress import progress_bar
from ddpm_jax.proxy import train_classifier

log = logging.getLogger(__name__)

PART = 1024
"""Images a file: the same whatever batches they are made in."""


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
    about = {"resize": "to 299x299, bilinear without half-pixel centres or antialiasing, as TensorFlow 1"}
    return Extractor("inception", inception_features, params, mesh, sha256, about)


def proxy(source: Source, indices: np.ndarray, mesh: Mesh) -> Extractor:
    """A classifier of the images `indices` of `source`, trained on their labels once and kept beside them.

    Raises UserError if they have none.
    """
    file = _kept(source, indices, "proxy") / "classifier.npz"
    if not agreed(file.exists()):
        trained = train_classifier(source, indices)
        write_file(file, npz({**flat_params(trained.params), "accuracy": np.array(trained.accuracy)}))
    wait_for_all("proxy")
    arrays = read_npz(file)
    accuracy, hashed = float(arrays.pop("accuracy")), hashlib.sha256()
    for array in arrays.values():
        hashed.update(np.ascontiguousarray(array))
    about = {"accuracy": accuracy, "trained_on": {"data_fingerprint": source.fingerprint, "images": len(indices)}}
    return Extractor(
        "proxy", classifier_features, replicate(nested_params(arrays), mesh), mesh, hashed.hexdigest(), about
    )


class Features(NamedTuple):
    """Of a set of images, in its order."""

    features: np.ndarray
    """[N,D] float32."""
    logits: np.ndarray
    """[N,K] float32."""


def features_of(extractor: Extractor, read: Callable, count: int, folder: epath.Path, batch_size: int) -> Features:
    """Of the images 0, ..., `count` - 1 that `read` gives as uint8 [B,H,W,C]; those that lie in `folder` are reused.

    All images count: a last batch is filled up with images that do not.
    """
    starts = range(0, count, PART)
    files = [folder / f"{start:08d}-{min(PART, count - start):04d}.npz" for start in starts]
    with progress_bar(total=count, desc=f"{extractor.kind} features", unit="image") as progress:
        for start, file in zip(starts, files, strict=True):
            indices = np.arange(start, min(start + PART, count))
            if not agreed(file.exists()):
                write_file(file, npz(extract(extractor, read(indices), batch_size)._asdict()))
            progress.update(len(indices))
    wait_for_all("features")
    parts = [read_npz(file) for file in files]
    return Features(*(np.concatenate([part[name] for part in parts]) for name in Features._fields))


class Reference(NamedTuple):
    """What samples are compared with."""

    features: np.ndarray
    """[N,D] float32."""
    statistics: Statistics


def reference_of(extractor: Extractor, source: Source, indices: np.ndarray, batch_size: int) -> Reference:
    """Of the images `indices` of `source`, kept beside them under their fingerprint."""
    folder = _kept(source, indices, extractor.sha256)
    features = features_of(extractor, lambda some: source.read(indices[some]), len(indices), folder, batch_size)
    file = folder / "statistics.npz"
    if not agreed(file.exists()):
        write_file(file, npz(statistics(features.features)._asdict()))
    wait_for_all("statistics")
    kept = read_npz(file)
    return Reference(features.features, Statistics(kept["mean"], kept["covariance"], int(kept["count"])))


def extract(extractor: Extractor, images: np.ndarray, batch_size: int) -> Features:
    """Of uint8 images [N,H,W,C], `batch_size` at a time, a multiple of the devices."""
    parts = []
    for start in range(0, len(images), batch_size):
        some = np.arange(start, start + batch_size)
        result = extractor.apply(extractor.params, place(images[np.minimum(some, len(images) - 1)], extractor.mesh))
        parts.append([array[: len(images) - start] for array in fetch(result)])
    return Features(*map(np.concatenate, zip(*parts, strict=True)))


def _kept(source: Source, indices: np.ndarray, what: str) -> epath.Path:
    """The folder for what is computed of these images: beside their files, or else in the user's cache."""
    hashed = hashlib.blake2b(f"{source.fingerprint} {what}".encode(), digest_size=8)
    hashed.update(np.asarray(indices, np.int64).tobytes())
    if source.beside is not None and os.access(source.beside, os.W_OK):
        return epath.Path(source.beside) / "ddpm_jax-features" / hashed.hexdigest()
    return path_of(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "ddpm_jax/features" / hashed.hexdigest()
