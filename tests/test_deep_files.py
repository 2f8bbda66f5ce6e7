"""Folders keep deep images deep: compared with tifffile, NumPy and files written by hand."""

import io
import pickle
import struct
import zipfile
import zlib
from fractions import Fraction
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from PIL import Image
from test_data import folder
from test_data_pixels import (
    GREY,
    MIN_IS_BLACK,
    RGB,
    chunk,
    packed,
    plain_fingerprint,
    png,
    tiff,
)

from ddpm_jax import UserError
from ddpm_jax.config import Data
from ddpm_jax.data.decode import decode_file
from ddpm_jax.data.deep_files import check_kind, image_file_bytes, is_file_of
from ddpm_jax.data.given import given_images
from ddpm_jax.figures.interpolate import read_image

FLOATS = "standardise"
DAMAGED = (ValueError, OSError, struct.error, zlib.error, tifffile.TiffFileError)
LUMA = np.array([19595, 38470, 7471]) / 65536
"""Pillow's weights of red, green and blue."""


def read(path, shape, values="uint16", **options):
    """All images of a folder, [N,H,W,C]."""
    source = folder(path, image_shape=shape, values=values, **options)
    return source.read(np.arange(len(source)))


def decoded(file, shape, name=".tif", dtype=np.uint16):
    return decode_file(file, shape, name, dtype).pixels


def tif(values, **options):
    """A TIFF by tifffile."""
    options.setdefault("metadata", None)
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def grey(rng):
    """16-bit levels [6,5], the extremes among them."""
    levels = rng.integers(0, 2**16, (6, 5), dtype=np.uint16)
    levels[0, :3] = 0, 2**16 - 1, 2**15
    return levels


@pytest.fixture
def rgb(rng):
    return rng.integers(0, 2**16, (6, 5, 3), dtype=np.uint16)


def deep_png(levels, colour, interlaced=False):
    """A PNG of 16-bit samples [H,W,S], none of them filtered."""
    height, width = levels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, interlaced)
    rows = [levels]
    if interlaced:
        starts = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2)]
        starts += [(0, 1, 2, 2), (1, 0, 2, 1)]
        rows = [levels[y::down, x::right] for y, x, down, right in starts]
    body = b"".join(
        b"\0" + row.astype(">u2").tobytes() for part in rows if part.size for row in part
    )
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("interlaced", [False, True])
def test_png_keeps_16_bits_of_greys_and_colours(tmp_path, grey, rgb, interlaced):
    (tmp_path / "a.png").write_bytes(deep_png(grey[..., None], GREY, interlaced))
    (tmp_path / "b.png").write_bytes(deep_png(rgb, RGB, interlaced))
    source = read(tmp_path, (6, 5, 3))
    assert source.dtype == np.uint16
    np.testing.assert_array_equal(source, [np.repeat(grey[..., None], 3, 2), rgb])
    np.testing.assert_array_equal(read(tmp_path, (6, 5, 3), FLOATS), source.astype(np.float32))
    one = read(tmp_path, (6, 5, 1))[..., 0]
    np.testing.assert_array_equal(one[0], grey)
    assert np.abs(one[1] - rgb @ LUMA).max() <= 0.5


def test_streamed_and_cached_images_and_a_zip_of_them_are_the_same(tmp_path, rgb):
    (tmp_path / "x/cat").mkdir(parents=True)
    for name in ("a", "b"):
        (tmp_path / f"x/cat/{name}.png").write_bytes(deep_png(rgb, RGB))
    np.save(tmp_path / "x/cat/c.npy", rgb)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for file in (tmp_path / "x").rglob("*.*"):
            archive.write(file, file.relative_to(tmp_path / "x"))
    sources = [
        folder(tmp_path / name, image_shape=(6, 5, 3), values="uint16", cache_mb=mb)
        for name, mb in (("x", 1), ("x", 0), ("x.zip", 0))
    ]
    assert [source.streamed for source in sources] == [False, True, True]
    assert len({source.fingerprint for source in sources}) == 1
    for source in sources:
        assert source.labels.tolist() == [0, 0, 0]
        again = pickle.loads(pickle.dumps(source.read)) if source.streamed else source.read
        for read_some in (source.read, again):  # Also as in a process that reads ahead.
            np.testing.assert_array_equal(read_some(np.arange(3)), [rgb] * 3)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_shallow_levels_are_stretched_to_16_bits(rng, depth):
    most = 2**depth - 1
    levels = rng.integers(0, most + 1, (6, 8))
    file = png(levels, depth)
    deep = decoded(file, (6, 8, 1), ".png")
    np.testing.assert_array_equal(deep[..., 0], levels * (65535 // most))
    own = decoded(file, (6, 8, 1), ".png", np.float32)
    np.testing.assert_array_equal(own[..., 0], levels * (255 // most))
    for key in (0, most):
        deep = decoded(png(levels, depth, transparent=[key]), (6, 8, 1), ".png")
        expected = np.where(levels == key, 65535, levels * (65535 // most))
        np.testing.assert_array_equal(deep[..., 0], expected)


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "CMYK", "YCbCr", "1", "LA", "RGBA"])
def test_8_bit_images_are_those_of_the_8_bit_path(rng, mode):
    image = Image.fromarray(rng.integers(0, 256, (6, 5, 4), dtype=np.uint8), "RGBA")
    image = image.convert("RGB").convert(mode) if mode == "P" else image.convert(mode)
    file = saved(image, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
    for channels in (1, 3):
        shallow = decoded(file, (6, 5, channels), ".png", np.uint8)
        deep = decoded(file, (6, 5, channels), ".png")
        # Where they are mixed, the 8-bit path rounds each step to a level of 257.
        atol = 0 if channels == 3 and not mode.endswith("A") else 257 * 1.01
        np.testing.assert_allclose(deep, shallow * 257.0, atol=atol)
        if mode != "RGBA" and mode != "LA":
            own = decoded(file, (6, 5, channels), ".png", np.float32)
            np.testing.assert_allclose(own, shallow, atol=atol / 257)


def test_alpha_is_put_on_white_at_full_depth(rng, grey, rgb):
    alpha = rng.integers(0, 2**16, (6, 5), dtype=np.uint16)
    alpha[0, :2] = 0, 65535
    share = alpha[..., None] / 65535
    for colours, kind, channels in ((grey[..., None], 4, 1), (rgb, 6, 3)):
        flat = colours * share + 65535 * (1 - share)
        both = np.concatenate([colours, alpha[..., None]], axis=2)
        file = deep_png(both, kind)
        assert np.abs(decoded(file, flat.shape, ".png") - flat).max() <= 0.5
        named = "rgb" if channels == 3 else "minisblack"
        options = dict(photometric=named, planarconfig="contig")
        for order in "<>":
            file = tif(both, extrasamples=["unassalpha"], byteorder=order, **options)
            assert np.abs(decoded(file, flat.shape) - flat).max() <= 0.5
        dark = np.concatenate([np.rint(colours * share), alpha[..., None]], axis=2)
        file = tif(dark.astype(np.uint16), extrasamples=["assocalpha"], **options)
        assert np.abs(decoded(file, flat.shape) - flat).max() <= 1
        with pytest.raises(UserError, match="is transparent in places, which no number stands"):
            decoded(file, flat.shape, dtype=np.float32)
        both[..., -1] = 65535
        opaque = decoded(deep_png(both, kind), flat.shape, ".png", np.float32)
        np.testing.assert_array_equal(opaque, colours)


def test_a_colour_of_png_is_transparent_in_all_its_bits(rgb, grey):
    key = rgb[1, 2].copy()
    rgb[0, 0] = [*key[:2], key[2] ^ 1]
    expected = rgb.copy()
    expected[1, 2] = 65535
    np.testing.assert_array_equal(
        decoded(png(rgb.astype(int), 16, RGB, key), rgb.shape, ".png"), expected
    )
    grey[2, 2] = grey[1, 1]
    expected = np.where(grey == grey[1, 1], 65535, grey)
    file = png(grey.astype(int), 16, GREY, [grey[1, 1]])
    np.testing.assert_array_equal(decoded(file, (6, 5, 1), ".png")[..., 0], expected)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("rows", [None, 2])
def test_tiff_keeps_16_bits_however_they_lie(grey, rgb, order, compression, rows):
    options = dict(byteorder=order, compression=compression, rowsperstrip=rows)
    options["predictor"] = 2 if compression else None
    planes = np.moveaxis(rgb, 2, 0)
    for file, expected in (
        (tif(grey, photometric="minisblack", **options), grey[..., None]),
        (tif(grey, photometric="miniswhite", **options), 65535 - grey[..., None]),
        (tif(rgb, photometric="rgb", **options), rgb),
        (tif(planes, photometric="rgb", planarconfig="separate", **options), rgb),
        (tif(grey, photometric="minisblack", bigtiff=True, **options), grey[..., None]),
    ):
        np.testing.assert_array_equal(decoded(file, expected.shape), expected)
        for cut in (len(file) - 1, len(file) * 3 // 4):
            with pytest.raises(DAMAGED):
                decoded(file[:cut], expected.shape)


def test_tiff_in_tiles_is_read(rng):
    levels = rng.integers(0, 2**16, (40, 24, 3), dtype=np.uint16)
    for options in ({}, {"compression": "zlib"}):
        file = tif(levels, photometric="rgb", tile=(16, 16), **options)
        np.testing.assert_array_equal(decoded(file, levels.shape), levels)


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate"])
def test_compressions_that_pillow_knows(grey, rgb, compression):
    """tifffile alone does not know LZW."""
    file = saved(Image.fromarray(grey), "TIFF", compression=compression)
    np.testing.assert_array_equal(decoded(file, (6, 5, 1))[..., 0], grey)
    floats = np.float32(grey) / 7
    file = saved(Image.fromarray(floats), "TIFF", compression=compression)
    np.testing.assert_array_equal(decoded(file, (6, 5, 1), dtype=np.float32)[..., 0], floats)
    shallow = np.uint8(rgb >> 8)
    file = saved(Image.fromarray(shallow), "TIFF", compression=compression)
    np.testing.assert_array_equal(decoded(file, rgb.shape), shallow * np.uint16(257))


def lzw(data):
    """The bytes as LZW, in codes of 9 bits that stand for a byte each."""
    codes = []
    for start in range(0, len(data), 200):
        codes += [256, *data[start : start + 200]]
    bits = "".join(f"{code:09b}" for code in [*codes, 257])
    bits += "0" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("samples", [1, 3, 4])
def test_lzw_of_16_bits(rng, order, samples):
    levels = rng.integers(0, 2**16, (6, 5, samples), dtype=np.uint16)
    body = lzw(levels.astype(f"{order}u2").tobytes())
    alpha = [(338, 2)] if samples == 4 else []
    colours = 1 if samples == 1 else 3
    tags = [(256, 5), (257, 6), (258, 16), (259, 5), (262, colours - colours // 2), (273, 0)]
    tags += [(277, samples), (278, 6), (279, len(body)), *alpha]
    start = 8 + 2 + 12 * len(tags) + 4
    directory = struct.pack(f"{order}H", len(tags))
    for tag, value in tags:
        if tag == 258 and samples > 1:
            directory += struct.pack(f"{order}HHII", tag, 3, samples, start)
        elif tag == 258:
            directory += struct.pack(f"{order}HHIHH", tag, 3, 1, 16, 0)
        else:
            value = start + 2 * samples if tag == 273 else value
            directory += struct.pack(f"{order}HHII", tag, 4, 1, value)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    bits = struct.pack(f"{order}{samples}H", *[16] * samples)
    share = levels[..., 3:] / 65535 if samples == 4 else 1
    expected = levels[..., :3] * share + 65535 * (1 - share)
    found = decoded(head + directory + bytes(4) + bits + body, (6, 5, colours))
    assert np.abs(found - expected).max() <= 0.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_turns_all_of_a_tiff_as_pillow_does(grey, rgb, orientation):
    tag = [(274, "H", 1, orientation, True)]
    exif = Image.Exif()
    exif[274] = orientation
    turned = np.asarray(
        Image.fromarray(grey).transpose(TURNS[orientation]) if orientation > 1 else grey
    )
    shape = (*turned.shape, 1)
    file = tif(grey, photometric="minisblack", extratags=tag)
    np.testing.assert_array_equal(decoded(file, shape)[..., 0], turned)
    file = saved(Image.fromarray(grey), "PNG", exif=exif)
    np.testing.assert_array_equal(decoded(file, shape, ".png")[..., 0], turned)
    colours = tif(np.repeat(grey[..., None], 3, 2), photometric="rgb", extratags=tag)
    np.testing.assert_array_equal(decoded(colours, (*turned.shape, 3))[..., 2], turned)


# What EXIF's numbers mean, as Pillow names it.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def test_12_bit_greys_are_stretched(rng):
    levels = rng.integers(0, 2**12, (4, 4))
    levels[0, :2] = 0, 4095
    file = tiff(packed(levels, 12).tobytes(), (4, 4), 12, MIN_IS_BLACK)
    exact = levels * Fraction(65535, 4095)
    found = decoded(file, (4, 4, 1))[..., 0]
    assert np.abs(found - exact.astype(float)).max() < 1 and found[0, :2].tolist() == [0, 65535]
    np.testing.assert_array_equal(decoded(file, (4, 4, 1), dtype=np.float32)[..., 0], levels)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i1", "i2", "i4", "u4"])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_tiff_of_any_numbers_and_channels(rng, order, dtype, channels):
    values = rng.integers(0, 100, (6, 5, channels)).astype(dtype)
    options = dict(byteorder=order, photometric="minisblack")
    if channels == 1:
        file = tif(values[..., 0], **options)
    else:
        extra = (0,) * (channels - 1)
        file = tif(values, planarconfig="contig", extrasamples=extra, **options)
    found = decoded(file, values.shape, dtype=np.float32)
    np.testing.assert_array_equal(found, values.astype(np.float32))
    with pytest.raises(UserError, match="numbers, which have no fixed range"):
        decoded(file, values.shape)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_pages_are_channels_where_there_are_as_many(rng, dtype):
    values = rng.integers(0, 200, (4, 6, 5)).astype(dtype)
    file = tif(values, photometric="minisblack")
    wanted = np.dtype(dtype)
    found = decoded(file, (6, 5, 4), dtype=wanted)
    np.testing.assert_array_equal(found, np.moveaxis(values, 0, 2))
    first = decoded(file, (6, 5, 1), dtype=wanted)
    np.testing.assert_array_equal(first[..., 0], values[0])


def test_whole_numbers_that_float32_cannot_hold_are_named(rng):
    for dtype in (np.int32, np.uint32, np.int64):
        values = np.full((4, 4), 2**24 + 1, dtype)
        with pytest.raises(UserError, match="not all of which float32 can hold"):
            decoded(image_file_bytes(values[..., None], ".npy"), (4, 4, 1), ".npy", np.float32)
        values[:] = 2**25
        file = image_file_bytes(values[..., None], ".npy")
        assert (decoded(file, (4, 4, 1), ".npy", np.float32) == 2.0**25).all()
    file = image_file_bytes(np.full((4, 4, 1), 1e300), ".npy")
    with pytest.raises(UserError, match="too large for float32"):
        decoded(file, (4, 4, 1), ".npy", np.float32)


@pytest.mark.parametrize("most", [300, 65535])
@pytest.mark.parametrize("plain", [False, True])
def test_deep_ppm_is_stretched_from_its_own_maximum(rng, most, plain):
    levels = rng.integers(0, most + 1, (6, 5, 3))
    levels[0, 0] = 0, most, 1
    body = levels.astype(">u2").tobytes()
    if plain:
        body = " ".join(map(str, levels.ravel())).encode()
    file = f"P{3 if plain else 6} 5 6 {most}\n".encode() + body
    found = decoded(file, (6, 5, 3), ".ppm")
    assert np.abs(found - levels * 65535 / most).max() <= 0.5
    body = levels[..., 0].astype(">u2").tobytes()
    found = decoded(f"P5 5 6 {most}\n".encode() + body, (6, 5, 1), ".pgm")
    assert np.abs(found - levels[..., :1] * 65535 / most).max() <= 0.5


def fits(values, bits, **cards):
    """A FITS file of values [H,W] or [C,H,W]."""
    named = {"SIMPLE": "T", "BITPIX": bits, "NAXIS": values.ndim}
    named |= {f"NAXIS{i + 1}": size for i, size in enumerate(values.shape[::-1])}
    lines = [f"{name:8}= {value:>20} / a comment" for name, value in (named | cards).items()]
    header = "".join(f"{line:80}" for line in [*lines, "COMMENT = no value", "END"])
    body = values.tobytes()
    length = -(-len(body) // 2880) * 2880
    return header.encode().ljust(-(-len(header) // 2880) * 2880) + body.ljust(length, b"\0")


def test_fits_holds_measurements_with_the_last_row_on_top(rng):
    values = rng.integers(-(2**15), 2**15, (6, 5))
    values[1, 1] = 77
    up = values[::-1, :, None]
    stored = values.astype(">i2")
    own = dict(dtype=np.float32, name=".fits")
    np.testing.assert_array_equal(decoded(fits(stored, 16), (6, 5, 1), **own), up)
    unsigned = decoded(fits(stored, 16, BZERO="32768.0", BSCALE="1.0"), (6, 5, 1), **own)
    np.testing.assert_array_equal(unsigned, up + 32768)
    scaled = decoded(fits(stored, 16, BZERO="1.5D0", BSCALE="0.25", BLANK=77), (6, 5, 1), **own)
    expected = np.where(up == 77, np.nan, up * 0.25 + 1.5)
    np.testing.assert_array_equal(scaled, expected)
    for bits, dtype in ((-32, ">f4"), (-64, ">f8"), (32, ">i4"), (64, ">i8")):
        many = rng.integers(0, 99, (4, 6, 5)).astype(dtype)
        found = decoded(fits(many, bits), (6, 5, 4), **own)
        np.testing.assert_array_equal(found, np.moveaxis(many, 0, 2)[::-1])
    bytes_ = rng.integers(0, 256, (6, 5), dtype=np.uint8)
    file = fits(bytes_, 8)
    shallow = decoded(file, (6, 5, 1), ".fits", np.uint8)
    np.testing.assert_array_equal(decoded(file, (6, 5, 1), ".fits"), shallow * np.uint16(257))
    with pytest.raises(UserError, match="holds int16 numbers, which have no fixed range"):
        decoded(fits(stored, 16), (6, 5, 1), ".fits")
    for file, words in (
        (fits(stored, 16)[:2900], "parts of its pixels are missing"),
        (fits(np.zeros(0, ">i2"), 16, NAXIS=0), "its first part holds no image"),
        (fits(stored, 16)[:240], "its header has no end"),
    ):
        with pytest.raises(ValueError, match=words):
            decoded(file, (6, 5, 1), **own)


def test_a_tiff_that_unpacks_to_a_flood_takes_no_memory(monkeypatch):
    monkeypatch.setattr("ddpm_jax.data.tiff.UNPACKED", 2**16)
    big = tif(np.zeros((400, 400), np.uint16), photometric="minisblack", compression="zlib")
    assert len(big) < 2**11
    with pytest.raises(UserError, match="unpacks to too many bytes"):
        decoded(big, (4, 4, 1))
    # A part of a small image that unpacks to more than the image.
    small = tif(np.zeros((16, 16), np.uint16), photometric="minisblack", compression="zlib")
    flood = zlib.compress(bytes(2**17))
    file = tagged(tagged(small + flood, 273, len(small)), 279, len(flood))
    with pytest.raises(UserError, match="unpacks to too many bytes"):
        decoded(file, (16, 16, 1))


def tagged(file, tag, number):
    """The TIFF with another number in a tag that holds one."""
    with tifffile.TiffFile(io.BytesIO(file)) as opened:
        found = opened.pages[0].tags[tag]
    whole = bytearray(file)
    whole[found.offset + 2 : found.offset + 12] = struct.pack("<HII", 4, 1, number)
    return bytes(whole)


def test_a_tiff_of_which_parts_are_missing_is_left_out(tmp_path, grey, caplog):
    options = dict(photometric="minisblack", compression="zlib")
    whole = tif(grey, **options)
    short = zlib.compress(grey[:4].tobytes())
    moved = tagged(tagged(whole + short, 273, len(whole)), 279, len(short))
    plain = tif(grey, photometric="minisblack")
    for name, file in (
        ("rows", moved),
        ("strips", tagged(tagged(whole, 257, 600), 278, 6)),
        ("bytes", tagged(plain, 257, 600)),
        ("empty", tagged(whole, 279, 0)),
    ):
        (tmp_path / f"{name}.tif").write_bytes(file)
        with pytest.raises(ValueError, match=r"parts of its pixels are missing|be reshaped"):
            decoded(file, (6, 5, 1))
    (tmp_path / "good.tif").write_bytes(whole)
    assert folder(tmp_path, image_shape=(6, 5, 1), values="uint16").names == ["good.tif"]
    assert "skipped 4 files that cannot be decoded" in caplog.text
    assert "strips.tif (parts of its pixels are missing)" in caplog.text


@pytest.mark.skipif(find_spec("imagecodecs") is not None, reason="imagecodecs is installed")
def test_a_compression_that_another_package_opens_is_named(tmp_path, rgb, caplog):
    (tmp_path / "x.tif").write_bytes(tagged(tif(rgb, photometric="rgb"), 259, 33005))
    with pytest.raises(UserError, match="none of the 1 image files"):
        folder(tmp_path, image_shape=(6, 5, 3), values="uint16")
    assert "x.tif (pip install imagecodecs opens its compression)" in caplog.text


def test_formats_of_which_pillow_loses_bits_are_left_out(rng, grey):
    file = saved(Image.fromarray(grey), "JPEG2000")  # Greys are whole.
    np.testing.assert_array_equal(decoded(file, (6, 5, 1), ".jp2")[..., 0], grey)
    deep = bytearray(saved(Image.fromarray(np.zeros((6, 5, 3), np.uint8)), "JPEG2000"))
    assert (decoded(bytes(deep), (6, 5, 3), ".jp2") == 0).all()
    at = deep.index(b"\xff\x4f\xff\x51") + 42
    deep[at : at + 9 : 3] = bytes([15] * 3)
    with pytest.raises(ValueError, match="Pillow reads 8 bits of its deeper JPEG2000; convert"):
        decoded(bytes(deep), (6, 5, 3), ".jp2")
    sgi = bytearray(saved(Image.fromarray(np.zeros((6, 5, 3), np.uint8)), "SGI", bpc=2))
    with pytest.raises(ValueError, match="Pillow reads 8 bits of its deeper SGI"):
        decoded(bytes(sgi), (6, 5, 3), ".sgi")


def test_larger_images_are_resized_at_full_depth(rng):
    """A ramp stays a ramp of ten thousand levels, which 8 bits would have in steps of 257."""
    ramp = np.linspace(0, 60000, 64)[:, None].repeat(32, 1)
    file = image_file_bytes(np.rint(ramp)[..., None].astype(np.uint16), ".png")
    small = decoded(file, (32, 16, 1), ".png")[2:-2, :, 0]
    np.testing.assert_allclose(small, ramp.reshape(32, 2, 16, 2).mean((1, 3))[2:-2], atol=1)
    # A step overshoots no further than the numbers of the image, and of levels than the type.
    step = np.where(np.arange(64) < 30, -1.5, 2.5).astype(np.float32)[:, None].repeat(64, 1)
    small = decoded(image_file_bytes(step[..., None], ".tif"), (9, 9, 1), dtype=np.float32)
    assert small.min() == -1.5 and small.max() == 2.5
    # In 8 bits the same pixels come out as from a PNG.
    pixels = rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    as_array = decoded(image_file_bytes(pixels, ".npy"), (4, 4, 3), ".npy", np.uint8)
    as_image = decoded(image_file_bytes(pixels, ".png"), (4, 4, 3), ".png", np.uint8)
    np.testing.assert_array_equal(as_array, as_image)


def test_nans_stay_where_they_are(rng):
    values = rng.standard_normal((6, 5, 2)).astype(np.float32)
    values[1, 2, 0], values[3, 3, 1] = np.nan, np.inf
    for kind in (".tif", ".npy"):
        file = image_file_bytes(values, kind)
        np.testing.assert_array_equal(decoded(file, (6, 5, 2), kind, np.float32), values)
        with pytest.raises(UserError, match="has NaNs or infinities, which resizing its 5x6"):
            decoded(file, (4, 4, 2), kind, np.float32)


@pytest.mark.parametrize("dtype", ["bool", "u1", "<u2", ">u2", ">f4", "f2", "f8", "i8"])
@pytest.mark.parametrize("kind", ["npy", "npz", "packed"])
def test_arrays_are_images(tmp_path, rng, dtype, kind):
    values = rng.integers(0, 2, (2, 6, 5, 4)).astype(dtype)
    for i, image in enumerate(values):
        if kind == "npy":
            np.save(tmp_path / f"{i}.npy", np.asfortranarray(image))
        elif kind == "npz":
            np.savez(tmp_path / f"{i}.npz", anything=image)
        else:
            np.savez_compressed(tmp_path / f"{i}.npz", image=image, mask=np.zeros(3))
    found = read(tmp_path, (6, 5, 4), FLOATS)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, values)
    if dtype == "u1":
        np.testing.assert_array_equal(read(tmp_path, (6, 5, 4), "uint8"), values)
        np.testing.assert_array_equal(read(tmp_path, (6, 5, 4)), values * np.uint16(257))
    elif "u2" in dtype:
        np.testing.assert_array_equal(read(tmp_path, (6, 5, 4)), values)
    else:
        with pytest.raises(UserError, match=r"0\.np. holds \w+ numbers, which have no fixed range"):
            read(tmp_path, (6, 5, 4))


def test_arrays_that_are_no_images_give_one_line_each(tmp_path, rng, caplog):
    np.save(tmp_path / "good.npy", np.zeros((4, 4)))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.save(tmp_path / "vector.npy", np.zeros(3))
    np.save(tmp_path / "complex.npy", np.zeros((4, 4), complex))
    np.savez(tmp_path / "two.npz", a=np.zeros((4, 4)), b=np.zeros((4, 4)))
    whole = (tmp_path / "good.npy").read_bytes()
    (tmp_path / "short.npy").write_bytes(whole[:-1])
    (tmp_path / "huge.npy").write_bytes(whole.replace(b"(4, 4)", b"(9999999, 99999999)"[:6]))
    (tmp_path / "text.npy").write_bytes(b"hello")
    (tmp_path / "text.npz").write_bytes(b"hello")
    (tmp_path / "lfs.npy").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    source = folder(tmp_path, image_shape=(4, 4, 1), values=FLOATS)
    assert source.names == ["good.npy"]
    line = next(m for m in caplog.messages if "skipped" in m)
    for words in (
        "objects.npy (it holds Python objects",
        "vector.npy (it is float64 [3], not numbers [H, W] or [H, W, C])",
        "complex.npy (it is complex128 [4, 4]",
        "two.npz (it holds a, b; name the array of the image image)",
        "short.npy (its length is not that of float64 [4, 4])",
        "text.npy (it does not begin as a plain array does)",
        "lfs.npy (it is a git-lfs pointer",
    ):
        assert words in line, words
    assert "\n" not in line


def test_images_that_do_not_fit_are_named_with_the_remedy(tmp_path, rng):
    def refusal(shape=(4, 4, 1), values=FLOATS, **options):
        with pytest.raises(UserError) as error:
            read(tmp_path, shape, values, **options)
        return str(error.value)

    np.save(tmp_path / "a.npy", rng.standard_normal((4, 4, 2)))
    assert (
        "a.npy has 2 channels, not the 1 of data.image_shape; remove them, pass --data.image"
        in refusal()
    )
    assert "a.npy holds float64 numbers, not the uint8 of data.values" in refusal(values="uint8")
    assert "is 4x4 pixels, smaller than data.image_shape 9x9" in refusal((9, 9, 2))
    np.save(tmp_path / "b.npy", rng.standard_normal((4, 4)))
    assert len(read(tmp_path, (4, 4, 1), FLOATS, skip_unfit=True)) == 1
    Image.new("RGB", (4, 4)).save(tmp_path / "c.png")
    line = refusal((4, 4, 2))
    assert "b.npy has 1 channel, not the 2" in line and "1 more images do not fit: c.png" in line
    for name in ("a.npy", "b.npy"):
        (tmp_path / name).unlink()
    line = refusal((4, 4, 2))
    assert "got 2; TIFF, FITS, .npy and .npz files may have others" in line


def test_arrays_beside_8_bit_images_are_left_alone(tmp_path, rng):
    """They may hold features or labels, as they did before arrays could be images."""
    pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = image_file_bytes(pixels, ".png")
    (tmp_path / "a.png").write_bytes(file)
    np.save(tmp_path / "labels.npy", np.arange(9))
    np.save(tmp_path / "pixels.npy", pixels)
    source = folder(tmp_path)
    assert source.names == ["a.png"] and source.fingerprint == plain_fingerprint(file, "a.png")
    deep = folder(tmp_path, values="uint16")
    assert deep.names == ["a.png", "pixels.npy"]
    (tmp_path / "labels.npy").unlink()
    assert folder(tmp_path, values=FLOATS).fingerprint != deep.fingerprint
    assert deep.fingerprint == folder(tmp_path, values="uint16").fingerprint
    (tmp_path / "a.png").unlink()
    assert folder(tmp_path).names == ["pixels.npy"]


def test_given_images_are_in_the_data_s_numbers(tmp_path, rng, rgb):
    (tmp_path / "x.tif").write_bytes(tif(rgb, photometric="rgb"))
    np.save(tmp_path / "x.npy", rgb.astype(np.float32) / 7)
    given = given_images(str(tmp_path / "x.tif"), (6, 5, 3), dtype=np.uint16)
    assert given.names == ["x.tif"]
    np.testing.assert_array_equal(given.images, [rgb])
    given = given_images(str(tmp_path / "x.npy"), (6, 5, 3), dtype=np.float32)
    np.testing.assert_array_equal(given.images, [rgb.astype(np.float32) / 7])
    given = given_images(str(tmp_path), (6, 5, 3), dtype=np.float32)
    assert given.names == ["x.npy", "x.tif"]
    for shape, words in (
        ((9, 9, 3), "image: x.npy is 5x6 pixels, smaller than the 9x9 that this takes; choose"),
        ((6, 5, 1), "image: x.npy has 3 channels, not the 1 of data.image_shape; choose"),
    ):
        with pytest.raises(UserError) as error:
            given_images(str(tmp_path / "x.npy"), shape, dtype=np.float32)
        assert words in str(error.value)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16", "int16", "float16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_what_is_written_is_read_again(rng, dtype, channels):
    image = (rng.standard_normal((6, 5, channels)) * 100).astype(dtype)
    with_png = dtype in ("uint8", "uint16") and channels in (1, 3)
    for kind in (".tif", ".npy", ".png")[: 3 if with_png else 2]:
        file = image_file_bytes(image, kind)
        assert file == image_file_bytes(image, kind)
        assert is_file_of(file, kind, image.shape, image.dtype)
        for other in (file[:-1], file[: len(file) // 2], b"", b"hello"):
            assert not is_file_of(other, kind, image.shape, image.dtype)
        assert not is_file_of(file, kind, (5, 6, channels), image.dtype)
        assert not is_file_of(file, kind, image.shape, np.dtype("float64"))
        found = decoded(file, image.shape, kind, np.float32)
        np.testing.assert_array_equal(found, image.astype(np.float32))
        if dtype == "uint16":
            np.testing.assert_array_equal(decoded(file, image.shape, kind), image)
        if kind == ".tif":
            np.testing.assert_array_equal(
                tifffile.imread(io.BytesIO(file)).reshape(image.shape), image
            )


def test_a_written_png_is_what_other_readers_see(rng):
    image = rng.integers(0, 2**16, (6, 5, 3), dtype=np.uint16)
    file = image_file_bytes(image, ".png")
    with Image.open(io.BytesIO(file)) as opened:
        np.testing.assert_array_equal(np.asarray(opened), image >> 8)
    with Image.open(io.BytesIO(image_file_bytes(image[..., :1], ".png"))) as opened:
        np.testing.assert_array_equal(np.asarray(opened), image[..., 0])
    damaged = bytearray(file)
    damaged[60] ^= 1
    assert not is_file_of(bytes(damaged), ".png", image.shape, np.uint16)


@pytest.mark.parametrize(
    ("kind", "channels", "dtype", "words"),
    [
        (".png", 2, "uint16", "a PNG has 1 or 3 channels, not 2; choose .tif or .npy"),
        (".png", 3, "float32", "a PNG holds uint8 or uint16, not float32; choose .tif or .npy"),
        (".bmp", 3, "uint8", "an image is written as .png, .tif, .npy, not '.bmp'"),
    ],
)
def test_what_cannot_be_written_is_refused(kind, channels, dtype, words):
    with pytest.raises(UserError) as error:
        check_kind(kind, channels, np.dtype(dtype))
    assert words in str(error.value)


def test_images_to_interpolate_are_read_as_in_training(tmp_path, rgb):
    (tmp_path / "x.tif").write_bytes(tif(rgb, photometric="rgb"))
    np.save(tmp_path / "x.npy", np.linspace(2, 4, 30).reshape(6, 5, 1))

    def image(name, shape, values):
        config = SimpleNamespace(data=Data(source="array", image_shape=shape, values=values))
        ddpm = SimpleNamespace(image_shape=shape, config=config)
        return read_image(SimpleNamespace(ddpm=ddpm), str(tmp_path / name))

    np.testing.assert_array_equal(image("x.tif", (6, 5, 3), "uint16"), rgb)
    expected = np.linspace(-1, 1, 30).reshape(6, 5, 1)
    np.testing.assert_allclose(image("x.npy", (6, 5, 1), "range 2 4"), expected, atol=1e-6)
    with pytest.raises(UserError, match=r"between: x.tif has 3 channels, not the 2 of data.image"):
        image("x.tif", (6, 5, 2), "uint16")
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(UserError, match=r"x.npy cannot be read: it is float64 \[3\], not numbers"):
        image("x.npy", (6, 5, 1), "range 2 4")
