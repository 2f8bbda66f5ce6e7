"""Every kind of pixel keeps its meaning, in files that are written by hand here."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from test_data import folder, only

from ddpm_jax import UserError

GREY, RGB = 0, 2
MIN_IS_WHITE, MIN_IS_BLACK = 0, 1
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
NONE, DEFLATE = 1, 8


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def packed(levels, depth):
    """Levels [H, W or W * 3] of `depth` bits, high bits and bytes first."""
    if depth == 16:
        return levels.astype(">u2").view(np.uint8)
    bits = levels[..., None] >> np.arange(depth - 1, -1, -1) & 1
    return np.packbits(bits.reshape(len(levels), -1).astype(np.uint8), axis=1)


def png(levels, depth, colour=GREY, transparent=None):
    """A PNG of levels [H, W] or [H, W, 3], one of which may be transparent."""
    height, width = levels.shape[:2]
    rows = packed(levels.reshape(height, -1), depth)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    hidden = b""
    if transparent is not None:
        hidden = chunk(b"tRNS", np.array(transparent, ">u2").tobytes())
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + hidden
    return start + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def tiff(body, size, bits, photometric, order="<", kind=UNSIGNED, compression=NONE):
    """A TIFF of one channel, whose pixels are the bytes `body`."""
    width, height = size
    body = zlib.compress(body) if compression == DEFLATE else body
    tags = {
        256: width,
        257: height,
        258: bits,
        259: compression,
        262: photometric,
        273: 8,
        277: 1,
        278: height,
        279: len(body),
        339: kind,
    }
    directory = struct.pack(f"{order}H", len(tags))
    for tag, value in tags.items():
        directory += struct.pack(f"{order}HHII", tag, 4, 1, value)
    directory += struct.pack(f"{order}I", 0)
    body += bytes(len(body) % 2)
    mark = b"II" if order == "<" else b"MM"
    return mark + struct.pack(f"{order}HI", 42, 8 + len(body)) + body + directory


@pytest.fixture
def read(tmp_path):
    """Maps the bytes of a file to its pixels [H, W, 3]; checks that those in grey agree."""

    def read(file, name):
        for old in tmp_path.iterdir():
            old.unlink()
        (tmp_path / name).write_bytes(file)
        image = only(tmp_path, image_shape=(4, 4, 3))
        grey = only(tmp_path, image_shape=(4, 4, 1))[..., 0]
        if (image == image[..., :1]).all():
            np.testing.assert_array_equal(image[..., 0], grey)
        return image

    return read


@pytest.fixture
def deep(rng):
    """16-bit levels [4, 4], the extremes among them."""
    levels = rng.integers(0, 2**16, (4, 4))
    levels[0, :3] = 0, 2**16 - 1, 2**15
    return levels


@pytest.mark.parametrize("compression", [NONE, DEFLATE])
@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_tiff_keeps_its_upper_byte_also_inverted(read, deep, order, compression):
    body = deep.astype(f"{order}u2").tobytes()
    for photometric, levels in ((MIN_IS_BLACK, deep), (MIN_IS_WHITE, 65535 - deep)):
        file = tiff(body, (4, 4), 16, photometric, order, compression=compression)
        np.testing.assert_array_equal(read(file, "x.tif")[..., 0], levels // 256)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_shallow_tiff_is_scaled_also_inverted(read, rng, order, bits):
    levels = rng.integers(0, 2**bits, (4, 4))
    body = packed(levels, bits).tobytes()
    for photometric, meant in ((MIN_IS_BLACK, levels), (MIN_IS_WHITE, 2**bits - 1 - levels)):
        image = read(tiff(body, (4, 4), bits, photometric, order), "x.tif")
        np.testing.assert_array_equal(image[..., 0], meant * 255 // (2**bits - 1))


def test_12_bit_tiff_is_scaled(read, rng):
    levels = rng.integers(0, 2**12, (4, 4))
    image = read(tiff(packed(levels, 12).tobytes(), (4, 4), 12, MIN_IS_BLACK), "x.tif")
    np.testing.assert_array_equal(image[..., 0], levels // 16)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("dtype", "kind"), [("u4", UNSIGNED), ("i4", SIGNED), ("i2", SIGNED), ("f4", FLOAT)]
)
def test_pixels_without_a_range_are_left_out_with_the_reason(tmp_path, caplog, order, dtype, kind):
    body = np.ones((4, 4), f"{order}{dtype}").tobytes()
    bits = 8 * int(dtype[1])
    (tmp_path / "x.tif").write_bytes(tiff(body, (4, 4), bits, MIN_IS_BLACK, order, kind))
    Image.new("L", (4, 4)).save(tmp_path / "y.png")
    assert folder(tmp_path, image_shape=(4, 4, 1)).names == ["y.png"]
    assert "skipped 1 files" in caplog.text
    if (order, dtype) != (">", "u4"):  # Which Pillow does not open at all.
        assert "in TIFF have no fixed range" in caplog.text


def test_fits_are_measurements(tmp_path):
    cards = ("SIMPLE  = T", "BITPIX  = 16", "NAXIS   = 2", "NAXIS1  = 4", "NAXIS2  = 4", "END")
    header = "".join(f"{card:80}" for card in cards).encode().ljust(2880)
    (tmp_path / "x.fits").write_bytes(header + bytes(2880))
    with pytest.raises(UserError, match="none of the 1 image files"):
        folder(tmp_path, image_shape=(4, 4, 1))


@pytest.mark.parametrize("most", [256, 1023, 4095, 65535])
@pytest.mark.parametrize("plain", [False, True])
def test_deep_pgm_and_ppm_are_scaled_by_their_own_maximum(read, rng, most, plain):
    grey = rng.integers(0, most + 1, (4, 4))
    grey[0, :2] = 0, most
    rgb = rng.integers(0, most + 1, (4, 4, 3))
    for levels, kinds, name in ((grey, "P2P5", "x.pgm"), (rgb, "P3P6", "x.ppm")):
        body = " ".join(map(str, levels.ravel())).encode() if plain else None
        body = body or levels.astype(">u2").tobytes()
        kind = kinds[:2] if plain else kinds[2:]
        image = read(f"{kind} 4 4 {most}\n".encode() + body, name)
        # Halves are rounded either way.
        exact = np.broadcast_to(levels.reshape(4, 4, -1) * 255 / most, (4, 4, 3))
        assert np.abs(image - exact).max() < 0.505


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_png_with_a_transparent_grey(read, rng, depth):
    levels = rng.permutation(16).reshape(4, 4) % 2**depth
    levels = levels * 4097 if depth == 16 else levels
    meant = levels // 256 if depth == 16 else levels * 255 // (2**depth - 1)
    for key in np.unique(levels):
        expected = np.where(levels == key, 255, meant)
        image = read(png(levels, depth, transparent=[key]), "x.png")
        np.testing.assert_array_equal(image[..., 0], expected)
    np.testing.assert_array_equal(read(png(levels, depth), "x.png")[..., 0], meant)


@pytest.mark.parametrize("depth", [8, 16])
def test_png_with_a_transparent_colour(read, rng, depth):
    levels = rng.integers(0, 2**depth, (4, 4, 3))
    key = levels[1, 2]
    levels[3, 3] = key
    levels[0, 0] = [*key[:2], key[2] ^ 1]  # Another colour, in its lowest bit.
    meant = (levels // 256 if depth == 16 else levels).copy()
    meant[1, 2] = meant[3, 3] = 255
    np.testing.assert_array_equal(read(png(levels, depth, RGB, key), "x.png"), meant)
    # In 16 bits, a colour is not transparent for its upper bytes alone.
    levels[1, 2] = 1, 2, 3
    np.testing.assert_array_equal(
        read(png(levels, depth, RGB, [0, 0, 0]), "x.png"), levels // (256 if depth == 16 else 1)
    )


def test_an_orientation_turns_deep_pixels(read, deep, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(deep.astype(np.uint16)).save(tmp_path / "made.png", exif=exif)
    image = read((tmp_path / "made.png").read_bytes(), "x.png")
    np.testing.assert_array_equal(image[..., 0], np.rot90(deep // 256, k=-1))


def saved(tmp_path, image, name, **options):
    image.save(tmp_path / f"made{name}", **options)
    return (tmp_path / f"made{name}").read_bytes()


def test_ink_palettes_and_alpha(read, rng, tmp_path):
    ink = rng.integers(0, 256, (4, 4, 4), dtype=np.uint8)
    cmyk = read(saved(tmp_path, Image.fromarray(ink, "CMYK"), ".tif"), "x.tif")
    rest = 255 - ink.astype(float)
    np.testing.assert_allclose(cmyk, rest[..., :3] * rest[..., 3:] / 255, atol=1)

    grey, alpha = rng.integers(0, 256, (2, 4, 4), dtype=np.uint8)
    both = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    share = alpha / 255
    for name in (".png", ".tif"):
        image = read(saved(tmp_path, both, name), f"x{name}")
        np.testing.assert_allclose(image[..., 0], grey * share + 255 * (1 - share), atol=1)

    palette = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4), "P")
    colours = rng.integers(0, 256, (16, 3), dtype=np.uint8)
    palette.putpalette(colours.ravel().tolist())
    alphas = rng.integers(0, 256, 16, dtype=np.uint8)
    share = alphas[:, None] / 255
    flat = (colours * share + 255 * (1 - share)).reshape(4, 4, 3)
    image = read(saved(tmp_path, palette, ".png", transparency=alphas.tobytes()), "x.png")
    np.testing.assert_allclose(image, flat, atol=1)


def test_only_images_that_come_out_otherwise_change_the_fingerprint(tmp_path, deep):
    """The fingerprint of all others is that of the files and names alone, as it ever was."""
    changed = {
        "tiff": ("a.tif", tiff(deep.astype("<u2").tobytes(), (4, 4), 16, MIN_IS_WHITE)),
        "grey": ("a.png", png(deep, 16, transparent=[deep[0, 0]])),
        "shallow": ("a.png", png(deep // 4096, 4, transparent=[15])),
        "colour": ("a.png", png(np.repeat(deep[..., None], 3, 2), 16, RGB, [deep[0, 1]] * 3)),
    }
    same = {
        "tiff": ("a.tif", tiff(deep.astype("<u2").tobytes(), (4, 4), 16, MIN_IS_BLACK)),
        "grey": ("a.png", png(deep, 16)),
        "unused": ("a.png", png(deep | 1, 16, transparent=[2])),
        "colour": ("a.png", png(np.repeat(deep[..., None] // 256, 3, 2), 8, RGB, [1, 2, 3])),
    }
    for files, differs in ((changed, True), (same, False)):
        for kind, (name, file) in files.items():
            (tmp_path / kind / str(differs)).mkdir(parents=True)
            (tmp_path / kind / str(differs) / name).write_bytes(file)
            plain = plain_fingerprint(file, name)
            assert (folder(tmp_path / kind / str(differs)).fingerprint != plain) == differs, kind


def plain_fingerprint(file, name):
    """Of a folder of one file, as versions before decoding had one computed it."""
    from hashlib import blake2b

    digest = blake2b(file, digest_size=16).hexdigest()
    return blake2b(f"(4, 4, 3)\n{digest} {name}".encode(), digest_size=16).hexdigest()
