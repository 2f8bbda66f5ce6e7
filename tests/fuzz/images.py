"""Damaged images in a folder beside a whole one, in a zip, and while a run reads them."""

import functools
import io

import numpy as np
from PIL import Image, TiffImagePlugin

from ddpm_jax.config import Data
from ddpm_jax.data import load_source
from ddpm_jax.errors import DataLost
from ddpm_jax.figures.interpolate import read_image
from fuzz.arrays import model
from fuzz.edits import edit_bytes
from fuzz.formats import edit_png, edit_zip, make_zip
from fuzz.reader import Reader

SIZE = (12, 10)
LATER = "later"
"""A file that says that an image is to be damaged after the start."""
GOOD = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)


def _save(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@functools.cache
def _modes():
    noise = np.random.default_rng(1).integers(0, 256, (SIZE[1], SIZE[0], 4), dtype=np.uint8)
    rgba = Image.fromarray(noise)
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    modes = {mode: rgba.convert(mode) for mode in ("RGB", "L", "LA", "1", "CMYK", "P")}
    return modes | {"RGBA": rgba, "I;16": deep}


def _jpegs(modes):
    exif = Image.Exif()
    exif[0x0112] = 6  # Rotated by 90 degrees.
    return [
        _save(modes["RGB"], "JPEG"),
        _save(modes["L"], "JPEG", progressive=True),
        _save(modes["CMYK"], "JPEG"),
        _save(modes["RGB"], "JPEG", exif=exif, subsampling=0),
    ]


def _pngs(modes):
    kinds = [_save(modes[mode], "PNG") for mode in ("RGB", "RGBA", "L", "LA", "1", "P", "I;16")]
    moving = _save(modes["RGB"], "PNG", save_all=True, append_images=[modes["L"].convert("RGB")])
    return [*kinds, _save(modes["P"], "PNG", transparency=3), moving]


def _gifs(modes):
    moving = {"save_all": True, "append_images": [modes["L"], modes["P"]], "duration": 50}
    return [
        _save(modes["P"], "GIF"),
        _save(modes["L"], "GIF", transparency=7),
        _save(modes["RGB"], "GIF", **moving),
    ]


def _tiffs(modes):
    big_endian = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"MM")
    kinds = [_save(modes[mode], "TIFF") for mode in ("RGB", "RGBA", "L", "1", "P", "CMYK", "I;16")]
    packed = [
        _save(modes["RGB"], "TIFF", compression=compression)
        for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
    ]
    return [*kinds, *packed, _save(modes["RGB"], "TIFF", tiffinfo=big_endian)]


def _pnms(modes):
    pixels = "\n".join(map(str, range(SIZE[0] * SIZE[1])))
    return [
        *(_save(modes[mode], "PPM") for mode in ("RGB", "L", "1", "I;16")),
        f"P2\n# grey\n{SIZE[0]} {SIZE[1]}\n255\n{pixels}\n".encode(),
    ]


def _all_of(kind, *names):
    return lambda modes: [_save(modes[name], kind) for name in names]


def _others(modes):
    """Formats that few people use and Pillow opens, too."""
    kinds = ("TGA", "ICO", "PCX", "SGI", "DDS", "JPEG2000")
    colours = [_save(modes["RGB"], kind) for kind in kinds]
    return [*colours, _save(modes["RGBA"], "TGA", rle=True), _save(modes["1"], "XBM")]


KINDS = {
    "png": (400, _pngs),
    "jpg": (400, _jpegs),
    "gif": (300, _gifs),
    "bmp": (300, _all_of("BMP", "RGB", "RGBA", "L", "1", "P")),
    "tiff": (500, _tiffs),
    "ppm": (300, _pnms),
    "webp": (200, _all_of("WEBP", "RGB", "RGBA")),
    "tga": (300, _others),
}
"""Ending: (cases, function that makes the valid files)."""


@functools.cache
def _files_of(ending):
    return KINDS[ending][1](_modes())


@functools.cache
def _good():
    return _save(Image.fromarray(GOOD), "PNG")


def _valid_folder(ending, rng):
    return {"good.png": _good(), f"other.{ending}": rng.choice(_files_of(ending))}


def _edit_image(rng, files):
    name = max(files)
    damaged = edit_png(rng, files[name])
    files = {other: content for other, content in files.items() if other != name}
    ending = rng.choice((name.partition(".")[2],) * 8 + tuple(KINDS))
    return files | {f"other.{ending}": damaged}


def _read_named(folder, rng):
    """An image file that a user names, of a figure that interpolates."""
    path = max(folder.iterdir())
    image = read_image(model(), str(path))
    assert image.dtype == np.uint8 and image.shape == model().ddpm.image_shape
    return "read"


def _data(path, rng, **options):
    shape = (8, 8, rng.choice((1, 3)))
    return Data(source=f"folder:{path}", image_shape=shape, flip=False, **options)


def _read_folder(folder, rng):
    """The whole image is as it was, the damaged one is there or not, the same at each reading."""
    data = _data(folder, rng)
    source = load_source(data)
    images = source.read(np.arange(len(source)))
    assert images.dtype == np.uint8 and images.shape[1:] == data.image_shape, images.shape
    assert (images[source.names.index("good.png")] == GOOD[..., None]).all(), "another image"
    again = load_source(data)
    assert again.names == source.names and again.fingerprint == source.fingerprint
    same = np.array_equal(images, again.read(np.arange(len(source))))
    assert same, "the same files give other pixels at the second reading"
    return "read" if len(source) == 2 else "left out"


def _read_streamed(folder, rng):
    """Files damaged behind the back of a run that streams them: as before, or DataLost."""
    source = load_source(_data(folder, rng, cache_mb=0, workers=0))
    before = source.read(np.arange(len(source)))
    name = rng.choice(source.names)
    content = (folder / name).read_bytes()
    damaged = edit_bytes(rng, content) if (folder / LATER).exists() else content
    (folder / name).write_bytes(damaged)
    try:
        after = source.read(np.arange(len(source)))
    except DataLost as error:
        assert name in str(error), error
        raise
    assert damaged == content and np.array_equal(before, after), "other pixels without a word"
    return "read"


@functools.cache
def _zips():
    members = [
        ("a/good.png", _good()),
        ("b/1.jpg", _files_of("jpg")[0]),
        ("b/2.gif", _files_of("gif")[0]),
        ("notes.txt", b"no image"),
    ]
    return [make_zip(members, method) for method in (0, 8)]


def _read_zip(folder, rng):
    streamed = rng.random() < 0.5
    options = {"cache_mb": 0, "workers": 0} if streamed else {}
    data = _data(folder / "images.zip", rng, **options)
    source = load_source(data)
    images = source.read(np.arange(len(source)))
    assert len(source) and images.shape == (len(source), *data.image_shape), images.shape
    assert images.dtype == np.uint8 and len(set(source.names)) == len(source), source.names
    assert source.labels is None or source.labels.shape == (len(source),)
    return "read" if len(source) == 3 else "left out"


READERS = [
    *(
        Reader(
            f"image.{ending}",
            cases,
            functools.partial(_valid_folder, ending),
            _edit_image,
            _read_folder,
        )
        for ending, (cases, _) in KINDS.items()
    ),
    Reader(
        "image that changes",
        200,
        lambda rng: _valid_folder(rng.choice(list(KINDS)), rng),
        lambda rng, files: files | {LATER: b""},
        _read_streamed,
        keeps=False,
    ),
    Reader(
        "image that a user names",
        200,
        lambda rng: _valid_folder(rng.choice(list(KINDS)), rng),
        _edit_image,
        _read_named,
    ),
    Reader(
        "zip of images",
        600,
        lambda rng: {"images.zip": rng.choice(_zips())},
        lambda rng, files: {"images.zip": edit_zip(rng, files["images.zip"], edit_png)},
        _read_zip,
    ),
]
