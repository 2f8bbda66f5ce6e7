"""A folder or a zip of images: found, checked, fingerprinted, decoded."""

import functools
import hashlib
import io
import logging
import math
import os
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from ddpm_jax.config import Data
from ddpm_jax.data.sources import Source
from ddpm_jax.errors import DataLost, UserError

log = logging.getLogger(__name__)

MODES = {1: "L", 3: "RGB"}


def load_folder(path: str, data: Data) -> Source:
    """The images below `path`, a folder or a .zip; the folder that an image lies in is its label.

    Every file with the ending of one of Pillow's formats is decoded once. One that does not decode
    is logged and left out. Raises UserError if none is left, one is smaller than
    `data.image_shape` or too large to be safe, or that has neither 1 nor 3 channels.
    """
    if data.image_shape[2] not in MODES:
        raise UserError(f"data.image_shape: a folder gives 1 (grey) or 3 (RGB) channels, not {data.image_shape[2]}")
    names, read_bytes = _open(path)
    if not names:
        raise UserError(f"data: there is no image file in {path}")
    cached = len(names) * math.prod(data.image_shape) <= data.cache_mb * 2**20
    pixels = np.empty((len(names) if cached else 0, *data.image_shape), np.uint8)
    decode_at = functools.partial(_decode_at, read_bytes, data.image_shape)
    pool = ThreadPoolExecutor(data.workers)
    digests, bad = {}, []
    with warnings.catch_warnings():
        # Above MAX_IMAGE_PIXELS Pillow warns and decodes; here that is an error of its own.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for name, (image, digest) in _try_all(pool, decode_at, names):
            if image is None:
                bad.append(f"{name} ({digest})")
                continue
            if cached:
                pixels[len(digests)] = image
            digests[name] = digest
    if bad:
        log.warning("data: left out %d files that do not decode: %s", len(bad), _some(bad))
    if not digests:
        raise UserError(f"data: none of the {len(names)} image files in {path} decodes")
    usable = list(digests)
    if cached:
        pool.shutdown()
        read = pixels[: len(usable)].__getitem__
    else:
        read = functools.partial(_read, pool, decode_at, digests, usable)
    return Source(usable, read, _labels(usable), _fingerprint(digests, data.image_shape))


def decode(file: bytes, image_shape: tuple[int, int, int], name: str) -> np.ndarray:
    """The image uint8 [H,W,C]: turned as its EXIF says, over white where transparent, resized to
    cover `image_shape`, and cropped in the centre. Raises UserError if it is smaller than that or too
    large to be safe; whatever Pillow raises if it does not decode."""
    height, width, channels = image_shape
    try:
        image = Image.open(io.BytesIO(file), formats=_formats(name))
    except Image.DecompressionBombError as error:
        raise UserError(f"data: {name} is too large to decode safely: {error}; remove it") from error
    with image:
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise UserError(f"data: {name} claims {image.width}x{image.height} pixels, too many to be safe; remove it")
        image = _to_8_bit(ImageOps.exif_transpose(image), MODES[channels])
    if image.width < width or image.height < height:
        raise UserError(
            f"data: {name} is {image.width}x{image.height} pixels, data.image_shape {width}x{height}; "
            "remove it or lower data.image_shape"
        )
    image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(image, np.uint8).reshape(image_shape)


def _to_8_bit(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips 16-bit greys at 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no fixed range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _open(path: str):
    """(names of the image files below `path`, sorted; a function from a name to its bytes)."""
    root = Path(path).expanduser()
    try:
        if root.is_dir():
            return _image_files(_walk(root)), lambda name: (root / name).read_bytes()
        if not root.exists():
            raise UserError(f"data: there is no {root}; name a folder or a zip with --data.source folder:PATH")
        archive = zipfile.ZipFile(root.open("rb"))
        return _image_files(archive.namelist()), functools.partial(_read_member, archive)
    except zipfile.BadZipFile as error:
        raise UserError(f"data: {root} is neither a folder nor a zip") from error
    except OSError as error:
        raise UserError(f"data: cannot read {root}: {error.strerror or error}") from error


def _walk(root: Path):
    """Names of all files below `root`, through links to folders too, each folder once."""

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


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    # No image that is safe to decode takes more than 8 bytes a pixel; a zip bomb does.
    if archive.getinfo(name).file_size > 8 * Image.MAX_IMAGE_PIXELS:
        raise UserError(f"data: {name} unpacks to more bytes than are safe to decode; remove it")
    return archive.read(name)


def _image_files(names) -> list[str]:
    endings = _endings()
    parts_of = {name: name.split("/") for name in names}
    return sorted(
        name
        for name, parts in parts_of.items()
        if not any(part.startswith((".", "__MACOSX")) for part in parts)
        and "." + parts[-1].rpartition(".")[2].lower() in endings
    )


@functools.cache
def _endings() -> dict[str, str]:
    """{".png": "PNG", ...}: what can be opened. Pillow hands PostScript to an interpreter: left out."""
    formats = Image.registered_extensions()
    return {ending: name for ending, name in formats.items() if name in Image.OPEN and name != "EPS"}


@functools.cache
def _formats_after(first: str | None) -> tuple[str, ...]:
    return tuple(sorted(set(_endings().values()), key=lambda name: (name != first, name)))


def _formats(name: str) -> tuple[str, ...]:
    """All formats, the one of the name's ending first: trying them takes longer than decoding a small image."""
    return _formats_after(_endings().get("." + name.rpartition(".")[2].lower()))


def _decode_at(read_bytes, image_shape, name):
    file = read_bytes(name)
    return decode(file, image_shape, name), hashlib.blake2b(file, digest_size=16).hexdigest()


def _try_all(pool, decode_at, names):
    """Yields (name, (image, digest of the file)) in order; (name, (None, why not)) for what does not decode."""

    def try_some(some):
        return [_try_decode(decode_at, name) for name in some]

    # In groups: for small images handing over each one would cost more than decoding it.
    groups = [names[i : i + 64] for i in range(0, len(names), 64)]
    with tqdm(total=len(names), desc="reading images", unit="", disable=None, delay=2, leave=False) as progress:
        for group, results in zip(groups, pool.map(try_some, groups), strict=True):
            yield from zip(group, results, strict=True)
            progress.update(len(group))


def _try_decode(decode_at, name):
    try:
        return decode_at(name)
    except UserError:
        raise
    except Exception as error:  # Pillow raises errors of many kinds.
        return None, type(error).__name__


def _read(pool, decode_at, digests, names, indices):
    def read_one(name):
        try:
            image, digest = decode_at(name)
        except Exception as error:
            raise _lost(name, f"cannot be read now: {error}") from error
        if digest != digests[name]:
            raise _lost(name, "has changed since")
        return image

    return np.stack(list(pool.map(read_one, [names[i] for i in indices])))


def _lost(name: str, why: str) -> DataLost:
    return DataLost(f"data: {name} was there at the start and {why}; put it back and run the same command again")


def _labels(names: list[str]) -> np.ndarray | None:
    folders = [name.split("/")[-2] if "/" in name else None for name in names]
    if None in folders:
        return None
    order = {folder: label for label, folder in enumerate(sorted(set(folders)))}
    return np.array([order[folder] for folder in folders], np.int32)


def _fingerprint(digests: dict[str, str], image_shape) -> str:
    lines = [f"{image_shape}", *(f"{digest} {name}" for name, digest in digests.items())]
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def _some(items: list[str], most: int = 10) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
