"""Checks, fingerprints and decodes the images of a folder or a zip."""

import functools
import logging
import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ddpm_jax.config import Data
from ddpm_jax.data.decode import DECODING, MODES, check_channels, read_dtype
from ddpm_jax.data.faults import CannotRead, Undecodable, Unfit, reason_of
from ddpm_jax.data.files import open_files
from ddpm_jax.data.image_file import Decoder, Digest, fingerprint
from ddpm_jax.data.names import shown, some
from ddpm_jax.data.read_all import read_all
from ddpm_jax.data.remembered import Memory
from ddpm_jax.data.sources import Source
from ddpm_jax.errors import DataLost, UserError

log = logging.getLogger(__name__)


def load_folder(path: str, data: Data, believe: bool = True) -> Source:
    """The images below `path`, a folder or a .zip. An image's class is the folder it is in.

    The labels number these in alphabetical order.

    Every file with the ending of one of Pillow's formats is read and decoded once, and what came of
    it is remembered up to data.disk_cache_mb (see remembered.py); without `believe` what an earlier
    start remembered is not used. Files that were read whole and cannot be decoded are logged and
    skipped, and with data.skip_unfit also images that do not fit: too small, too large, of other
    channels or of numbers that data.values does not name. Folders of runs and samples are left out.

    Images are in the type that `read_dtype` gives. Files .npy and .npz are images of one array
    each, except where data.values is uint8 and other images are there too: there they are not read,
    since they hold features, labels and the like.

    Raises UserError if there are no images, a file cannot be read, an image does not fit, or none
    of the files can have the channels of `data.image_shape`.
    """
    dtype = read_dtype(data.value_kind)
    files = open_files(path, arrays=dtype != np.uint8 or data.image_shape[2] not in MODES)
    names = files.names
    check_channels(data.image_shape, names)
    cached = len(names) * math.prod(data.image_shape) * dtype.itemsize <= data.cache_mb * 2**20
    memory = None
    if data.disk_cache_mb:
        memory = Memory(path, data.image_shape, dtype, cached, data.disk_cache_mb * 2**20)
    decoder = Decoder(files.read, data.image_shape, dtype)
    found = read_all(decoder, files, path, cached, memory, believe)
    digests = found.digests
    if found.bad:
        bad = [f"{shown(name)} ({_why(error)})" for name, error in found.bad.items()]
        log.warning("data: skipped %d files that cannot be decoded: %s", len(bad), some(bad))
    _check_fit(found.unfit, data.skip_unfit)
    if not digests:
        raise UserError(
            f"data: none of the {len(names)} image files in {shown(path)} can be "
            f"{'used' if found.unfit else 'decoded'}; replace them or name another folder or zip"
        )
    usable = list(digests)
    own = [str(digest) for digest in digests.values()]
    read: Callable[[np.ndarray], np.ndarray] = _Reader(decoder, usable, own)
    if cached:
        read = found.pixels[: len(usable)].__getitem__
    labels, class_names = _classes(usable)
    return Source(
        usable,
        read,
        labels,
        fingerprint(dict(zip(usable, own, strict=True)), data.image_shape, dtype),
        streamed=not cached,
        beside=Path(path).expanduser().absolute().parent,
        marks=functools.partial(_marks, own),
        former=_former(digests, files.former, data.image_shape, dtype),
        class_names=class_names,
        dtype=dtype,
        remembered=found.remembered,
    )


def _why(error: Exception) -> str:
    """The kind of an error of Pillow, and the reason where this program has found it itself."""
    return str(error) if isinstance(error, Undecodable) else type(error).__name__


def _check_fit(unfit: dict[str, Unfit], skip: bool) -> None:
    """Logs the images that do not fit, or raises UserError unless to `skip`."""
    if not unfit:
        return
    first, *others = [f"{shown(name)} {why}" for name, why in unfit.items()]
    remedies = list(dict.fromkeys(why.remedy for why in unfit.values()))
    of_size = remedies == [Unfit("").remedy]
    words = "are too small or too large" if of_size else "do not fit"
    named = first
    if others:
        more = some([shown(name) for name in list(unfit)[1:]])
        named += f", and {len(others)} more images {words}: {more}"
    if skip:
        log.warning("data: skipped %d images that do not fit: %s", len(unfit), named)
        return
    raise UserError(
        f"data: {named}; remove them, {remedies[0]}, or leave them out with --data.skip-unfit"
    )


class _Reader:
    """Reads images by their index, as long as they are those of the start."""

    def __init__(self, decoder: Decoder, names: list[str], digests: list[str]):
        self.decoder = decoder
        self.names = names
        self.digests = digests

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        try:
            return np.stack([self._read(index) for index in indices])
        except MemoryError as error:
            raise DataLost(
                "data: out of memory while images are read; lower data.workers or "
                "train.batch_size and run the same command again"
            ) from error

    def _read(self, index) -> np.ndarray:
        name = self.names[index]
        try:
            image = self.decoder(name)
        except CannotRead as error:
            raise _lost(name, f"can no longer be read ({error.reason})", error.remedy) from error
        except Unfit as error:
            raise _lost(name, str(error)) from error
        except Exception as error:  # Pillow raises many kinds of errors.
            raise _lost(name, f"can no longer be decoded ({reason_of(error)})") from error
        if str(image.digest) != self.digests[index]:
            raise _lost(name, "has changed since the start")
        return image.pixels


def _lost(name: str, why: str, remedy: str = "restore it") -> DataLost:
    return DataLost(f"data: {shown(name)} {why}; {remedy}, then run the same command again")


def _classes(names: list[str]) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """(labels, class names), or (None, None) if an image lies in no folder."""
    folders = [name.split("/")[-2] for name in names if "/" in name]
    if len(folders) < len(names):
        return None, None
    class_names = tuple(sorted(set(folders)))
    order = {folder: label for label, folder in enumerate(class_names)}
    return np.array([order[folder] for folder in folders], np.int32), class_names


def _former(
    digests: dict[str, Digest], names: Mapping[str, str], image_shape, dtype: np.dtype
) -> dict[str, str]:
    """{fingerprint that an older version gave to these files: what has changed since}."""
    former = {}
    anew = [name for name, digest in digests.items() if digest.anew]
    if anew:
        was = {name: digest.file for name, digest in digests.items()}
        former[fingerprint(was, image_shape, dtype)] = (
            f"{shown(anew[0])} and {len(anew) - 1} more are decoded otherwise since then "
            f"(version {DECODING}: greys that are inverted, transparent or of 12 bits)"
        )
    called = [name for name in digests if name in names]
    if called:
        was = {names.get(name, name): digest.file for name, digest in digests.items()}
        former[fingerprint(dict(sorted(was.items())), image_shape, dtype)] = (
            f"{shown(called[0])} was called {shown(names[called[0]])} then, as "
            f"{len(called) - 1} more had other names"
        )
    return former


def _marks(digests: list[str]) -> np.ndarray:
    return np.array([zlib.crc32(digest.encode()) for digest in digests], np.uint32)
