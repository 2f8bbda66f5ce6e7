"""Finds, checks, fingerprints and decodes the images of a folder or a zip."""

import functools
import hashlib
import logging
import math
import os
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ddpm_jax.config import Data
from ddpm_jax.data.decode import check_channels, decode, image_files
from ddpm_jax.data.sources import Source
from ddpm_jax.errors import DataLost, UserError

log = logging.getLogger(__name__)


def load_folder(path: str, data: Data) -> Source:
    """The images below `path`, a folder or a .zip. An image's label is the folder it is in.

    Every file with the ending of one of Pillow's formats is decoded once. Files that cannot be
    decoded are logged and skipped.

    Raises UserError if there are no images, an image is smaller than `data.image_shape` or too
    large to decode safely, or `data.image_shape` has neither 1 nor 3 channels.
    """
    check_channels(data.image_shape)
    names, read_bytes = _open(path)
    if not names:
        raise UserError(f"data: no images found in {path}; name a folder or a zip with image files")
    cached = len(names) * math.prod(data.image_shape) <= data.cache_mb * 2**20
    pixels = np.empty((len(names) if cached else 0, *data.image_shape), np.uint8)
    decode_at = functools.partial(_decode_at, read_bytes, data.image_shape)
    digests: dict[str, str] = {}
    bad = []
    with warnings.catch_warnings():
        # Pillow only warns about images above MAX_IMAGE_PIXELS; `decode` refuses them.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for name, (image, digest) in _try_all(decode_at, names):
            if image is None:
                bad.append(f"{name} ({digest})")
                continue
            if cached:
                pixels[len(digests)] = image
            digests[name] = digest
    if bad:
        log.warning("data: skipped %d files that cannot be decoded: %s", len(bad), _some(bad))
    if not digests:
        raise UserError(
            f"data: none of the {len(names)} image files in {path} can be decoded; "
            "replace them or name another folder or zip"
        )
    usable = list(digests)
    read: Callable[[np.ndarray], np.ndarray]
    read = functools.partial(_read, decode_at, usable, list(digests.values()))
    if cached:
        read = pixels[: len(usable)].__getitem__
    return Source(
        usable,
        read,
        _labels(usable),
        _fingerprint(digests, data.image_shape),
        streamed=not cached,
        beside=Path(path).expanduser().absolute().parent,
    )


def _open(path: str):
    """(sorted names of the image files below `path`, function from a name to the file's bytes).

    The function can be pickled.
    """
    root = Path(path).expanduser()
    try:
        if root.is_dir():
            return image_files(_walk(root)), functools.partial(_read_file, root)
        if not root.exists():
            raise UserError(
                f"data: {root} does not exist; name a folder or a zip with --data.source "
                "folder:PATH (--data in commands other than train)"
            )
        archive = _Zip(root)
        return image_files(archive.file.namelist()), archive
    except zipfile.BadZipFile as error:
        raise UserError(f"data: {root} is neither a folder nor a zip; name one of these") from error
    except OSError as error:
        raise UserError(
            f"data: cannot read {root} ({error.strerror or error}); fix that or name another folder"
        ) from error


def _walk(root: Path):
    """Names of all files below `root`. Follows links to folders, but lists each folder once."""

    def stop(error):
        raise error

    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=stop):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if os.path.realpath(folder) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        yield from (Path(folder, name).relative_to(root).as_posix() for name in files)


def _read_file(root: Path, name: str) -> bytes:
    return (root / name).read_bytes()


class _Zip:
    """Maps the name of a zip's member to its bytes. Each process opens the zip for itself."""

    def __init__(self, path: Path):
        self.path = path
        self.file = zipfile.ZipFile(path.open("rb"))

    def __reduce__(self):
        return _Zip, (self.path,)

    def __call__(self, name: str) -> bytes:
        # An image that is safe to decode has at most 8 bytes per pixel; a zip bomb has more.
        most = Image.MAX_IMAGE_PIXELS
        if most is not None and self.file.getinfo(name).file_size > 8 * most:
            raise UserError(f"data: {name} is too large to unpack and decode safely; remove it")
        return self.file.read(name)


def _decode_at(read_bytes, image_shape, name):
    file = read_bytes(name)
    return decode(file, image_shape, name), hashlib.blake2b(file, digest_size=16).hexdigest()


def _try_all(decode_at, names):
    """Yields (name, (image, digest of the file)) in order.

    If a file cannot be decoded, it yields (name, (None, reason)).
    """

    def try_some(some):
        return [_try_decode(decode_at, name) for name in some]

    # In groups, since passing small images to the threads one by one costs more than decoding them.
    groups = [names[i : i + 64] for i in range(0, len(names), 64)]
    progress = tqdm(
        total=len(names), desc="reading images", unit="", disable=None, delay=2, leave=False
    )
    with ThreadPoolExecutor() as pool, progress:
        for group, results in zip(groups, pool.map(try_some, groups), strict=True):
            yield from zip(group, results, strict=True)
            progress.update(len(group))


def _try_decode(decode_at, name):
    try:
        return decode_at(name)
    except UserError:
        raise
    except Exception as error:  # Pillow raises many kinds of errors, without a common base class.
        return None, type(error).__name__


def _read(decode_at, names, digests, indices):
    def read_one(index):
        name = names[index]
        try:
            image, digest = decode_at(name)
        except Exception as error:  # From the disk, the zip, or Pillow, which raises many kinds.
            raise _lost(name, f"can no longer be read ({error})") from error
        if digest != digests[index]:
            raise _lost(name, "has changed since the start")
        return image

    return np.stack([read_one(index) for index in indices])


def _lost(name: str, why: str) -> DataLost:
    return DataLost(f"data: {name} {why}; restore it and run the same command again")


def _labels(names: list[str]) -> np.ndarray | None:
    folders = [name.split("/")[-2] for name in names if "/" in name]
    if len(folders) < len(names):
        return None
    order = {folder: label for label, folder in enumerate(sorted(set(folders)))}
    return np.array([order[folder] for folder in folders], np.int32)


def _fingerprint(digests: dict[str, str], image_shape) -> str:
    lines = [f"{image_shape}", *(f"{digest} {name}" for name, digest in digests.items())]
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def _some(items: list[str], most: int = 10) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
