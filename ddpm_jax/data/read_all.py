"""Reads all images of a folder: takes those that are remembered and decodes the others."""

import contextlib
import dataclasses
import logging
import time

import numpy as np

from ddpm_jax.data.decode_all import decode_all
from ddpm_jax.data.faults import Unfit
from ddpm_jax.data.files import Files
from ddpm_jax.data.image_file import Decoder, Digest, try_decode
from ddpm_jax.data.npz import BadArray
from ddpm_jax.data.remembered import FEW, SLOW, Memory, Remembered

log = logging.getLogger(__name__)

CHECKED = 16
"""Images of those remembered that are decoded at every start, and compared: a few milliseconds."""


@dataclasses.dataclass
class Found:
    """What the files hold."""

    pixels: np.ndarray
    """[N or more,H,W,C]: the images of `digests` in their order; [0,H,W,C] if they are not kept."""
    digests: dict[str, Digest] = dataclasses.field(default_factory=dict)
    """{name: Digest} of the images that can be used."""
    bad: dict[str, Exception] = dataclasses.field(default_factory=dict)
    """The error of each file that cannot be decoded."""
    unfit: dict[str, Unfit] = dataclasses.field(default_factory=dict)
    """The reason of each image that does not fit."""
    remembered: bool = False
    """Whether some come from an earlier start."""


def read_all(
    decoder: Decoder,
    files: Files,
    path: str,
    with_pixels: bool,
    memory: Memory | None,
    believe: bool = True,
) -> Found:
    """All images of `files`, which lie below `path`; remembers them in `memory`.

    Without `believe`, nothing is taken from there. Raises CannotRead.
    """
    if memory is None:
        return _decode(decoder, files.names, path, with_pixels)
    looked = time.time_ns()
    stamps = files.stamps(files.names)
    kept = memory.recall() if believe else None
    found = None
    fresh = len(files.names)
    start = time.monotonic()
    if kept is not None:
        with kept:
            rows = kept.rows(files.names, stamps)
            fresh = int(np.sum(rows < 0))
            found = _with_kept(decoder, files.names, path, with_pixels, kept, rows)
    if found is None:
        fresh = len(files.names)
        found = _decode(decoder, files.names, path, with_pixels)
    fresh -= len(found.bad) + len(found.unfit)  # These are decoded at every start.
    if fresh > FEW * len(files.names) and time.monotonic() - start > SLOW:
        usable = np.array([name in found.digests for name in files.names])
        pixels = found.pixels[: len(found.digests)]
        memory.keep(found.digests, stamps[usable], pixels, looked)
    return found


def _with_kept(
    decoder: Decoder,
    names: list[str],
    path: str,
    with_pixels: bool,
    kept: Remembered,
    rows: np.ndarray,
) -> Found | None:
    """The images, those of rows[i] >= 0 from `kept`; None if that is not to be believed."""
    found = _decode(decoder, names, path, with_pixels, kept, rows)
    try:
        if with_pixels:
            places = np.full(len(kept.names), -1)
            order = {name: place for place, name in enumerate(found.digests)}
            known = rows >= 0
            places[rows[known]] = [
                order[name] for name, is_known in zip(names, known, strict=True) if is_known
            ]
            kept.fill(found.pixels, places)
    except (BadArray, OSError) as error:
        log.info("data: what was remembered is not used (%s); all images are decoded", error)
        return None
    if not _agrees(
        decoder, [name for name, row in zip(names, rows, strict=True) if row >= 0], found
    ):
        log.warning("data: what was remembered is not what the files hold; all are decoded again")
        return None
    found.remembered = bool((rows >= 0).any())
    return found


def _decode(
    decoder: Decoder,
    names: list[str],
    path: str,
    with_pixels: bool,
    kept: Remembered | None = None,
    rows: np.ndarray | None = None,
) -> Found:
    """Decodes the images, apart from those of rows[i] >= 0, of which `kept` has the digests.

    The pixels of these are left empty.
    """
    shape = (len(names) if with_pixels else 0, *decoder.image_shape)
    found = Found(np.empty(shape, decoder.dtype))
    wanted = [-1] * len(names) if rows is None else rows.tolist()
    to_decode = [name for name, row in zip(names, wanted, strict=True) if row < 0]
    results = decode_all(decoder, to_decode, path, with_pixels)
    with contextlib.closing(results):
        for name, row in zip(names, wanted, strict=True):
            if kept is not None and row >= 0:
                found.digests[name] = kept.digests[row]
                continue
            _, result = next(results)
            if isinstance(result, Unfit):
                found.unfit[name] = result
            elif isinstance(result, Exception):
                found.bad[name] = result
            else:
                if with_pixels:
                    found.pixels[len(found.digests)] = result.pixels
                found.digests[name] = result.digest
    return found


def _agrees(decoder: Decoder, names: list[str], found: Found) -> bool:
    """Whether a few of `names`, which are remembered, are what their files hold."""
    if not names:
        return True
    some = {names[i] for i in np.linspace(0, len(names) - 1, CHECKED).astype(int)}
    for place, name in enumerate(found.digests):
        if name not in some:
            continue
        image = try_decode(decoder, name)
        if isinstance(image, Exception) or image.digest != found.digests[name]:
            return False
        if len(found.pixels) and found.pixels[place].tobytes() != image.pixels.tobytes():
            return False
    return True
