"""Features of images, from FID's InceptionV3 or the proxy, computed once and cached in files."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ddpm_jax.config import Data
from ddpm_jax.data import Source
from ddpm_jax.devices.ahead import made_beside, one_ahead
from ddpm_jax.devices.mesh import fetch, place, replicate
from ddpm_jax.devices.processes import agreed, wait_for_all
from ddpm_jax.devices.progress import progress_bar
from ddpm_jax.devices.rows import full_batches
from ddpm_jax.devices.runtime import user_cache
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.inception_weights import load_inception
from ddpm_jax.evaluation.metrics import Statistics, statistics
from ddpm_jax.evaluation.proxy import classifier_shapes, train_classifier
from ddpm_jax.models import classifier_features, inception_features
from ddpm_jax.storage.files import npz, path_of, write_file
from ddpm_jax.storage.kept import Kept, read_kept
from ddpm_jax.weights.names import flat_params, nested_params

PART = 1024
"""Images per file."""

BATCH = 64
"""Images per device at a time. Fixed, because the last bits of features may depend on it."""

COMPARED = 10_000
"""At most this many real images are kept with their features for KID, precision and recall."""

VERSION = 1
"""Version of the cache. Change it if the proxy, its training or the files' contents change."""


Tag = TypeVar("Tag")


class Extractor(NamedTuple):
    """A network that computes the features that images are compared by."""

    kind: Literal["inception", "proxy"]
    apply: Callable
    """(params, images [B,H,W,C]) -> (features [B,D], logits [B,K]), jitted."""
    params: Any
    mesh: Mesh
    """The devices that hold params."""
    sha256: str
    """Hash of the weights file, or of the proxy's parameters."""
    about: dict[str, Any]
    """More facts about the network, to be recorded with every result."""


def inception(path: epath.PathLike, mesh: Mesh) -> Extractor:
    """FID's InceptionV3, with weights from the file `path`.

    Raises UserError if the file does not hold that network's weights.
    """
    params = replicate(load_inception(path), mesh)
    sha256 = hashlib.sha256(path_of(path).read_bytes()).hexdigest()
    about = {
        "resize": "to 299x299, bilinear without half-pixel centres or antialiasing, as TensorFlow 1"
    }
    return Extractor("inception", inception_features, params, mesh, sha256, about)


def check_inception(data: Data, option: str = "inception") -> None:
    """Raises UserError, which begins with `option`, for images that it was not made for."""
    if data.value_kind.kind == "uint8" and data.image_shape[2] in (1, 3):
        return
    raise UserError(
        f"{option}: FID's network was made for 8-bit greys and colours, and these images have "
        f"{data.image_shape[2]} channels of values {data.values}; leave it out to use the proxy"
    )


def proxy(source: Source, indices: np.ndarray, root: epath.Path, mesh: Mesh) -> Extractor:
    """A classifier of the images `indices` of `source`, trained once on their labels.

    It is cached in `root`. Raises UserError if the images cannot train one.
    """
    file = _folder(root, source, indices, "proxy") / "classifier.npz"
    if not agreed(file.exists()):
        trained = train_classifier(source, indices)
        arrays = flat_params(trained.params)
        arrays["accuracy"] = np.array(trained.accuracy)
        write_file(file, npz(arrays))
    wait_for_all("proxy")
    shapes = flat_params(classifier_shapes(source, indices))
    wanted = {name: Kept(str(leaf.dtype), leaf.shape) for name, leaf in shapes.items()}
    arrays = read_kept(file, {**wanted, "accuracy": Kept("float64", ())})
    accuracy = float(arrays.pop("accuracy"))
    hashed = hashlib.sha256()
    for array in arrays.values():
        hashed.update(np.ascontiguousarray(array))
    params = replicate(nested_params(arrays), mesh)
    about = {
        "accuracy": accuracy,
        "trained_on": {"data_fingerprint": source.fingerprint, "images": len(indices)},
    }
    return Extractor("proxy", classifier_features, params, mesh, hashed.hexdigest(), about)


def extractor_of(
    file: epath.PathLike | None,
    data: Data,
    source: Source,
    indices: np.ndarray,
    root: epath.Path,
    mesh: Mesh,
) -> Extractor:
    """FID's InceptionV3 with the weights of `file`, or for None the proxy of the images `indices`.

    Raises UserError as `check_inception`, `inception` and `proxy` do.
    """
    if file:
        check_inception(data)
        return inception(file, mesh)
    return proxy(source, indices, root, mesh)


def cache_root(source: Source, shared: epath.Path) -> epath.Path:
    """The folder that caches features of a source's images.

    It lies beside the images if that place is writable, else in the user's cache. Several
    processes use `shared`, a folder that all of them can see.
    """
    if jax.process_count() > 1:
        return shared
    if source.beside is not None and os.access(source.beside, os.W_OK):
        return epath.Path(source.beside) / "ddpm_jax-features"
    return epath.Path(user_cache()) / "features"


class Features(NamedTuple):
    """The features of a set of images, in its order."""

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
    """The features of images 0, ..., `count` - 1; files that `folder` already holds are reused.

    `read` maps indices to images [B,H,W,C], as a Source's. `tag` maps indices to a word for file
    names, which must change if the images at these indices change.
    """
    files = _make_parts(extractor, read, count, folder, Features._fields, tag)
    parts = list(_read_parts(files, count, Features._fields))
    return Features(
        features=np.concatenate([part["features"] for part in parts]),
        logits=np.concatenate([part["logits"] for part in parts]),
    )


class Reference(NamedTuple):
    """The real images that samples are compared with."""

    statistics: Statistics
    """Of all the images."""
    features: np.ndarray
    """[N,D] float32 of at most COMPARED of them, chosen at random with a fixed key."""


def reference_of(
    extractor: Extractor, source: Source, indices: np.ndarray, root: epath.Path
) -> Reference:
    """The Reference of the images `indices` of `source`, cached in `root` by their fingerprint."""
    folder = _folder(root, source, indices, extractor.sha256)
    file = folder / "statistics.npz"
    if not agreed(file.exists()):
        files = _reference_parts(extractor, source, indices, folder)
        parts = _read_parts(files, len(indices), ("features",))
        kept = statistics(part["features"] for part in parts)._asdict()
        chosen = compared(len(indices))
        rows = []
        parts = _read_parts(files, len(indices), ("features",))
        for start, part in zip(range(0, len(indices), PART), parts, strict=True):
            inside = chosen[(chosen >= start) & (chosen < start + PART)]
            rows.append(part["features"][inside - start])
        kept["features"] = np.concatenate(rows)
        write_file(file, npz(kept))
    wait_for_all("statistics")
    kept = _read_statistics(file, len(indices))
    return Reference(Statistics(kept["mean"], kept["covariance"], len(indices)), kept["features"])


def compared(count: int) -> np.ndarray:
    """The places, ascending, of those of `count` real images whose features a Reference has."""
    bits = np.random.Philox(key=[0, count]).random_raw(count)
    return np.sort(np.argsort(bits, kind="stable")[:COMPARED])


def all_features(
    extractor: Extractor, source: Source, indices: np.ndarray, root: epath.Path
) -> np.ndarray:
    """Features [N,D] of the images `indices` of `source`; uses the same cache as `reference_of`."""
    folder = _folder(root, source, indices, extractor.sha256)
    files = _reference_parts(extractor, source, indices, folder)
    parts = _read_parts(files, len(indices), ("features",))
    return np.concatenate([part["features"] for part in parts])


def extract(extractor: Extractor, images: np.ndarray) -> Features:
    """The features of images [N,H,W,C], as a Source reads them."""
    ((_, features),) = _extract_each(extractor, [(None, images)])
    return features


def _extract_each(
    extractor: Extractor, sets: Iterable[tuple[Tag, np.ndarray]]
) -> Iterator[tuple[Tag, Features]]:
    """Yields (tag, the features) of each of the `sets` (tag, images).

    A batch is dispatched before the batch before it is fetched.
    """

    def dispatched():
        for tag, images in sets:
            for rows, count in full_batches(len(images), BATCH * extractor.mesh.size):
                batch = place(images[rows], extractor.mesh)
                is_last = rows[count - 1] == len(images) - 1
                yield tag, count, is_last, extractor.apply(extractor.params, batch)

    parts = []
    for tag, count, is_last, result in one_ahead(dispatched()):
        parts.append([array[:count] for array in fetch(result)])
        if is_last:
            yield tag, Features(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
            parts = []


def _reference_parts(extractor, source, indices, folder) -> list[epath.Path]:
    def read(places):
        return source.read(indices[places])

    def tag(places):
        return "all"  # The folder's name already has the images' fingerprint.

    return _make_parts(extractor, read, len(indices), folder, ("features",), tag)


def _make_parts(extractor, read, count, folder, fields, tag) -> list[epath.Path]:
    """The files of PART images each; makes those that are missing.

    Images are read and tagged in a thread, beside the device.
    """

    def look(indices):
        """(the file of these images, the images if it is not there)."""
        file = folder / f"{indices[0]:08d}-{len(indices):04d}-{tag(indices)}.npz"
        return file, None if file.exists() else read(indices)

    def missing():
        for indices, (file, images) in zip(parts, made_beside(look, parts), strict=True):
            files.append(file)
            if agreed(file.exists()):
                progress.update(len(indices))
                continue
            yield file, read(indices) if images is None else images

    parts = [np.arange(start, min(start + PART, count)) for start in range(0, count, PART)]
    files: list[epath.Path] = []
    with progress_bar(total=count, desc=f"{extractor.kind} features", unit="image") as progress:
        for file, made in _extract_each(extractor, missing()):
            write_file(file, npz({field: getattr(made, field) for field in fields}))
            progress.update(len(made.features))
    wait_for_all("features")
    return files


def _read_parts(files, count: int, fields) -> Iterator[dict[str, np.ndarray]]:
    """Yields the arrays of each file, which are as wide as those of the first."""
    width: dict[str, int | None] = dict.fromkeys(fields)
    for start, file in zip(range(0, count, PART), files, strict=True):
        rows = min(PART, count - start)
        part = read_kept(file, {name: Kept("float32", (rows, width[name])) for name in fields})
        width = {name: part[name].shape[1] for name in fields}
        yield part


def _read_statistics(file: epath.Path, count: int) -> dict[str, np.ndarray]:
    """The arrays of a Reference of `count` images."""
    wanted = {
        "mean": Kept("float64", (None,)),
        "covariance": Kept("float64", (None, None)),
        "count": Kept("int64", ()),
        "features": Kept("float32", (min(count, COMPARED), None)),
    }
    D = len(read_kept(file, wanted)["mean"])
    wanted["covariance"] = Kept("float64", (D, D))
    wanted["features"] = Kept("float32", (min(count, COMPARED), D))
    return read_kept(file, wanted)


def _folder(root: epath.Path, source: Source, indices: np.ndarray, what: str) -> epath.Path:
    """The cache folder for results computed from these images; `what` names the results."""
    images = " ".join([source.fingerprint, source.units]).rstrip()
    hashed = hashlib.blake2b(f"{images} {what} {VERSION}".encode(), digest_size=8)
    hashed.update(np.asarray(indices, np.int64).tobytes())
    return root / hashed.hexdigest()
