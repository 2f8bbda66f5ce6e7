"""TIFF files at their full depth and with any number of channels, read and written by tifffile."""

import io
import math
import zlib

import numpy as np
import tifffile
from PIL import Image

from ddpm_jax.data.faults import Undecodable, Unfit
from ddpm_jax.data.files import MAX_RATIO, UNPACKED
from ddpm_jax.data.formats import is_tiff
from ddpm_jax.data.quiet import quiet_pillow
from ddpm_jax.data.raw import Raw

MIN_IS_WHITE, MIN_IS_BLACK, RGB = 0, 1, 2
ASSOCIATED = 1
UNASSOCIATED = 2
UNSIGNED = 1

# What turns pixels [H,W,C] as the tag Orientation says: (transposed first, rows, columns reversed).
ORIENTATIONS = {
    2: (False, 1, -1),
    3: (False, -1, -1),
    4: (False, -1, 1),
    5: (True, 1, 1),
    6: (True, 1, -1),
    7: (True, -1, -1),
    8: (True, -1, 1),
}
ORIENTATION = 274


LZMA = 34_925
DEFLATE = (8, 32_946)
DEFLATE_RATIO = 1032
"""Deflate makes at most this many bytes of one."""

MISSING = "parts of its pixels are missing"


class NeedsCodec(Undecodable):
    """The file's compression is one that tifffile leaves to another package."""


def tiff_raw(file: bytes, channels: int) -> Raw | None:
    """The first page of a TIFF; where as many pages of one channel as `channels`, all of them.

    None for an image that Pillow reads whole: one of at most 8 bits, of which 1 or 3 channels are
    asked for. Raises NeedsCodec for a compression that is not known here, Undecodable for pixels
    that are not understood, and tifffile's own errors for damaged files.
    """
    with tifffile.TiffFile(io.BytesIO(file)) as opened:
        pages = _pages(opened, channels)
        first = pages[0]
        if len(pages) == 1 and channels in (1, 3) and _is_shallow(first):
            return None
        values = np.concatenate([_values(page, file, len(pages)) for page in pages], axis=2)
        white = _white(first)
        if first.photometric == MIN_IS_WHITE and white is not None:
            values = white - values
        orientation = first.tags.valueof(ORIENTATION, 1)
    raw = _understood(values, white, first, channels, len(pages))
    return turned(raw, orientation)


def _pages(opened: tifffile.TiffFile, channels: int) -> list[tifffile.TiffPage]:
    first = opened.pages.first
    if channels == 1 or first.samplesperpixel != 1 or len(opened.pages) != channels:
        return [first]
    pages = [opened.pages[i].aspage() for i in range(channels)]
    alike = all((page.shape, page.dtype) == (first.shape, first.dtype) for page in pages)
    return pages if alike else [first]


def _is_shallow(page: tifffile.TiffPage) -> bool:
    # Of floats and signed numbers Pillow makes levels.
    return max(np.atleast_1d(page.bitspersample)) <= 8 and page.sampleformat == UNSIGNED


def _white(page: tifffile.TiffPage) -> int | None:
    bits = max(np.atleast_1d(page.bitspersample))
    return 2 ** int(bits) - 1 if page.sampleformat == UNSIGNED and bits <= 16 else None


def _values(page: tifffile.TiffPage, file: bytes, pages: int) -> np.ndarray:
    """[H,W,C] of a page."""
    _check_page(page, file, pages)
    planes, _, height, width, samples = page.shaped
    values = np.empty((planes, height, width, samples), page.dtype)
    found = 0
    try:
        # Of a part that is cut short tifffile gives the rows that are there.
        for part, (plane, _, top, left, _), _ in page.segments(maxworkers=1):
            if part is not None:
                rows, columns = part.shape[1:3]
                place = values[plane, top : top + rows, left : left + columns]
                place[:] = part[0, : place.shape[0], : place.shape[1]]
                found += place.size
    except (ValueError, NotImplementedError) as error:
        if "imagecodecs" in str(error):
            raise NeedsCodec("pip install imagecodecs opens its compression") from error
        raise
    if found != values.size:
        raise Undecodable(MISSING)
    return np.moveaxis(values, 0, 2).reshape(height, width, planes * samples)


def _check_page(page: tifffile.TiffPage, file: bytes, pages: int) -> None:
    """Raises Undecodable or Unfit for a page that cannot be read, before memory is taken."""
    kind = page.dtype
    if kind is None or kind.kind not in "buif" or kind.itemsize > 8:
        raise Undecodable("its pixels are of a type that is not read")
    if page.shaped[1] != 1:
        raise Undecodable("it is a volume, not an image")
    if len(page.dataoffsets) < math.prod(page.chunked):
        raise Undecodable(MISSING)
    size = math.prod(page.shaped) * kind.itemsize * pages
    most = Image.MAX_IMAGE_PIXELS
    pixels = page.imagelength * page.imagewidth
    if most is not None and (pixels > most or size > 8 * most):  # As in files.py.
        raise Unfit(f"has {page.imagewidth}x{page.imagelength} pixels, too many to decode safely")
    if size > max(UNPACKED, MAX_RATIO * len(file)) or _is_flood(page, file, size):
        raise Unfit("unpacks to too many bytes for an image")


def _is_flood(page: tifffile.TiffPage, file: bytes, size: int) -> bool:
    """Whether a part unpacks to more than `size` bytes, for which tifffile would take memory."""
    if page.compression == LZMA:
        raise Undecodable("its compression LZMA is not read; convert it")
    if page.compression not in DEFLATE:
        return False
    parts = zip(page.dataoffsets, page.databytecounts, strict=True)
    large = [file[at : at + count] for at, count in parts if count * DEFLATE_RATIO > UNPACKED]
    return any(len(zlib.decompressobj().decompress(part, size + 1)) > size for part in large)


def _understood(values, white, page, channels: int, pages: int) -> Raw:
    """With its colours and transparency named."""
    own = values.shape[2]
    if own == channels and (own not in (1, 3) or pages > 1):
        return Raw(values, white, picture=False)
    if page.photometric not in (MIN_IS_WHITE, MIN_IS_BLACK, RGB):
        raise Undecodable(f"its pixels are {page.photometric!s}; convert them to RGB")
    colours = 3 if page.photometric == RGB else 1
    extra = [int(kind) for kind in page.extrasamples]
    # A fourth sample without a name is transparency to Pillow, too.
    has_alpha = own == colours + 1 and extra in ([ASSOCIATED], [UNASSOCIATED], [])
    if not has_alpha or white is None:
        return Raw(values, white, picture=own == colours)
    alpha = values[..., -1] / white
    values = values[..., :-1]
    if extra == [ASSOCIATED]:  # Its colours are those on black.
        values = values / np.where(alpha == 0, 1, alpha)[..., None]
    return Raw(values, white, alpha)


def turned(raw: Raw, orientation: int) -> Raw:
    """The image as it is meant to be seen, by the number of TIFF's and EXIF's Orientation."""
    transposed, rows, columns = ORIENTATIONS.get(orientation, (False, 1, 1))

    def turn(values: np.ndarray) -> np.ndarray:
        values = values.swapaxes(0, 1) if transposed else values
        return values[::rows, ::columns]

    alpha = None if raw.alpha is None else turn(raw.alpha)
    return raw._replace(values=turn(raw.values), alpha=alpha)


def tiff(image: np.ndarray) -> bytes:
    """A TIFF file of one image [H,W,C], without compression: the same image, the same bytes.

    Truth values are written as 0 and 1 of uint8.
    """
    image = image.astype(np.uint8) if image.dtype == np.bool_ else image
    channels = image.shape[2]
    is_colour = channels == 3
    file = io.BytesIO()
    tifffile.imwrite(
        file,
        image if channels > 1 else image[..., 0],
        byteorder="<",
        photometric="rgb" if is_colour else "minisblack",
        planarconfig="contig" if channels > 1 else None,
        extrasamples=None if is_colour or channels == 1 else (0,) * (channels - 1),
        metadata=None,
        software=False,
    )
    return file.getvalue()


def is_tiff_of(content: bytes, image_shape: tuple[int, int, int], dtype: np.dtype) -> bool:
    """Whether `content` is a whole TIFF file, as `tiff` makes it of an image [H,W,C] of `dtype`."""
    if not is_tiff(content):
        return False
    stored = np.dtype(np.uint8) if dtype == np.bool_ else np.dtype(dtype)
    try:
        with quiet_pillow(), tifffile.TiffFile(io.BytesIO(content)) as opened:
            page = opened.pages.first
            shaped = (*page.shaped[2:4], page.shaped[0] * page.shaped[4])
            if (shaped, page.dtype) != (tuple(image_shape), stored):
                return False
            _values(page, content, 1)
            return True
    except MemoryError:
        raise
    except Exception:  # tifffile raises errors of many kinds.
        return False
