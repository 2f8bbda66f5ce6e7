"""Images of npy files: read in blocks, each epoch a permutation, and no larger in memory."""

import dataclasses
import io
import os
import pickle
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from ddpm_jax.config import Data
from ddpm_jax.config.values import parse_values
from ddpm_jax.data import Batches, from_array, load_source, npy, open_batches, split
from ddpm_jax.errors import DataLost, UserError

N, SHAPE = 100, (2, 3, 5)


@pytest.fixture
def images(rng):
    return rng.normal(size=(N, *SHAPE)).astype(np.float32)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 4 images (of 120 bytes), mixed 5 at a time."""
    monkeypatch.setattr(npy, "BLOCK", 500)
    monkeypatch.setattr(npy, "MIXED", 2500)
    monkeypatch.setattr(npy, "KEPT", 5000)


def loaded(path, shape=SHAPE, values="standardise", **options):
    return load_source(Data(source=f"npy:{path}", image_shape=shape, values=values, **options))


def refusal(path, error=UserError, **options):
    with pytest.raises(error) as refused:
        loaded(path, **options)
    line = str(refused.value)
    assert "\n" not in line and (str(path) in line or line.startswith("data: images must be"))
    return line


@pytest.mark.parametrize("cache_mb", [0, 1])
@pytest.mark.parametrize("dtype", ["bool", "<u1", "<u2", ">i2", "<f2", "<f4", ">f4", "<f8", ">f8"])
def test_a_file_is_the_array_that_it_holds(tmp_path, images, dtype, cache_mb):
    x = (images * 50).astype(dtype)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "x.labels.npy", np.arange(N) % 7)
    np.save(tmp_path / "x.conditions.npy", images[:, 0, 0])
    beside = dict(values=parse_values("standardise"), conditions=images[:, 0, 0])
    array = from_array(x, SHAPE, np.arange(N) % 7, **beside)
    source = loaded(tmp_path / "x.npy", values="range -999 999", cache_mb=cache_mb)
    assert source.streamed == (cache_mb == 0) and source.beside == tmp_path
    assert source.dtype == source.read(np.array([3])).dtype == x.dtype.newbyteorder("=")
    for some in (np.arange(N), np.array([99, 3, 3, 50]), np.array([], int)):
        np.testing.assert_array_equal(source.read(some), array.read(some))
    np.testing.assert_array_equal(source.labels, array.labels)
    np.testing.assert_array_equal(source.conditions, images[:, 0, 0])
    assert source.names == array.names
    assert source.fingerprint == array.fingerprint
    np.testing.assert_array_equal(source.marks(), array.marks())


def test_greys_need_no_axis_of_channels(tmp_path, images):
    np.save(tmp_path / "x.npy", images[..., 0])
    for cache_mb in (0, 1):
        source = loaded(tmp_path / "x.npy", shape=(2, 3, 1), cache_mb=cache_mb)
        np.testing.assert_array_equal(source.read(np.array([7, 9])), images[[7, 9], ..., :1])


def test_an_epoch_visits_each_image_once_and_reads_each_block_once(
    tmp_path, images, small_blocks, monkeypatch
):
    np.save(tmp_path / "x.npy", images)
    source = loaded(tmp_path / "x.npy", cache_mb=0)
    assert source.blocks == (4, 5)
    indices, _ = split(source, 0.2)
    n = len(indices)
    read = []
    monkeypatch.setattr(
        npy.BlockReader,
        "_read",
        lambda self, number, plain=npy.BlockReader._read: (
            read.append(number) or plain(self, number)
        ),
    )
    batches = Batches(source, indices, 7, seed=3)
    steps = [batches.batch_at(step).image for step in range(3 * n // 7 + 1)]
    stream = np.concatenate(steps)[: 3 * n]
    order = np.concatenate([batches.indices_at(step) for step in range(3 * n // 7 + 1)])[: 3 * n]
    np.testing.assert_array_equal(stream, images[order])
    epochs = order.reshape(3, n)
    for epoch in epochs:
        assert sorted(epoch) == indices.tolist()
    assert not (epochs[0] == epochs[1]).all()
    blocks = np.unique(indices // 4)
    # A block may be read again where epochs meet in a batch, and otherwise once an epoch.
    assert len(read) <= 3 * len(blocks) + 2 * 5
    assert sorted(read[: len(blocks)]) == blocks.tolist()
    other = np.concatenate([Batches(source, indices, 7, seed=4).indices_at(i) for i in range(9)])
    assert not (other == order[:63]).all()


def test_batches_do_not_depend_on_memory_hosts_or_where_they_begin(tmp_path, images, small_blocks):
    np.save(tmp_path / "x.npy", images)
    streamed, kept = (loaded(tmp_path / "x.npy", cache_mb=mb) for mb in (0, 1))
    indices = np.arange(3, 90)
    whole = Batches(kept, indices, 8, 1)
    stream = open_batches(streamed, indices, 8, 1, Data(workers=3))
    assert stream.workers == 0
    for step in (0, 1, 2, 40, 11, 12):
        np.testing.assert_array_equal(stream.batch_at(step).image, whole.batch_at(step).image)
        parts = [
            Batches(streamed, indices, 8, 1, rows).batch_at(step).image
            for rows in np.split(np.arange(8), 4)
        ]
        np.testing.assert_array_equal(np.concatenate(parts), whole.batch_at(step).image)
    stream.close()


def test_images_of_many_places_are_mixed(tmp_path, small_blocks):
    """In order of their classes, as they often are, a batch still has some of each."""
    np.save(tmp_path / "x.npy", np.repeat(np.arange(10), 200).astype(np.float32)[:, None, None])
    source = loaded(tmp_path / "x.npy", shape=(1, 1, 1), cache_mb=0)
    assert source.blocks == (125, 5)
    means = [Batches(source, np.arange(2000), 125, 0).batch_at(i).image.mean() for i in range(16)]
    firsts = Batches(source, np.arange(2000), 125, 0).batch_at(0).image.ravel()
    assert len(np.unique(firsts)) >= 4 and np.std(means) < 2


def test_where_everything_is_mixed_at_once_it_is_a_plain_permutation(tmp_path, images):
    """Over many epochs, each image stands equally often in each tenth."""
    np.save(tmp_path / "x.npy", images)
    source = loaded(tmp_path / "x.npy")
    batches = Batches(source, np.arange(N), N, 0)
    tenth = np.zeros((N, 10))
    for epoch in range(400):
        tenth[batches.indices_at(epoch), np.arange(N) // 10] += 1
    # 400 draws of probability 0.1: the counts' variance is 36.
    assert abs(tenth.mean() - 40) < 1e-9 and 30 < tenth.var() < 42


def test_blocks_are_fixed_by_the_shape_and_what_is_kept_is_bounded(tmp_path):
    for shape, expected in (
        ((128, 128, 5), (3, 34)),
        ((32, 32, 3), (85, 32)),
        ((512, 512, 1), (1, 32)),
        ((2048, 2048, 3), (1, 1)),
    ):
        header = npy.Header((1000, *shape), np.dtype("float32"))
        assert npy.blocks_of(header) == expected
        images, mixed = npy.blocks_of(header)
        layout = npy.Layout(Path("x"), 128, header, (0, 0, 0))
        most = npy.BlockReader(layout, images)._most
        size = images * header.size // 1000
        assert most * size <= max(npy.KEPT, size)
        assert images == 1 or most >= 2 * mixed - 1


def test_the_last_block_may_be_short_and_few_are_kept(tmp_path, images, small_blocks):
    np.save(tmp_path / "x.npy", images[:99])
    read = loaded(tmp_path / "x.npy", cache_mb=0).read
    for i in [98, *range(0, 98, 3), 98]:
        np.testing.assert_array_equal(read(np.array([i]))[0], images[i])
        assert len(read._kept) <= 10


def memory(key):
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_file_takes_little_memory(tmp_path):
    """200 MB, of which the disk holds nothing: they are zeros. Mapped pages would count."""
    header = npy_bytes((2000, 160, 160, 1), "<f4")
    (tmp_path / "x.npy").write_bytes(header)
    os.truncate(tmp_path / "x.npy", len(header) + 2000 * 160 * 160 * 4)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # The highest is what it is now.
    except OSError as error:
        pytest.skip(f"the highest memory cannot be reset: {error}")
    before = memory("VmRSS")
    source = loaded(tmp_path / "x.npy", shape=(160, 160, 1), cache_mb=100)
    batches = Batches(source, np.arange(2000), 16, 0)
    for step in range(60):
        assert not batches.batch_at(step).image.any()
    assert memory("VmHWM") - before < 130


def test_a_file_that_changes_or_goes_is_lost_data(tmp_path, images):
    path = tmp_path / "x.npy"
    np.save(path, images)
    whole = path.read_bytes()

    def lost(change, words):
        path.write_bytes(whole)
        os.utime(path, (0, 0))
        source = loaded(path, cache_mb=0)
        change()
        with pytest.raises(DataLost) as error:
            source.read(np.arange(3))
        assert words in str(error.value) and "\n" not in str(error.value)
        assert str(path) in str(error.value) and "run the same command again" in str(error.value)

    lost(path.unlink, "No such file")
    lost(lambda: path.write_bytes(whole[:-1] + b"x"), "written to since the start")
    lost(lambda: os.truncate(path, 500), "written to since the start")
    lost(lambda: os.utime(path, (9, 9)), "written to since the start")

    def replace():
        path.unlink()
        path.mkdir()

    lost(replace, "Is a directory")


def test_a_reader_is_sent_without_what_it_keeps(tmp_path, images):
    np.save(tmp_path / "x.npy", images)
    source = loaded(tmp_path / "x.npy", cache_mb=0)
    source.read(np.arange(50))
    sent = pickle.dumps(dataclasses.replace(source, names=[], marks=None))
    assert len(sent) < 3000
    np.testing.assert_array_equal(pickle.loads(sent).read(np.arange(9)), images[:9])


def npy_bytes(shape, descr="<f4", fortran=False, content=b""):
    text = f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (npy_bytes((2**40, *SHAPE)), "the file is too short for float32 [1099511627776, 2, 3, 5]"),
        (npy_bytes((10**30, *SHAPE)), "the file is too short"),
        (npy_bytes((1, *SHAPE), content=bytes(119)), "the file is too short"),
        (npy_bytes((1, *SHAPE), content=bytes(121)), "the file is too long"),
        (npy_bytes((1, *SHAPE), "|O", content=bytes(240)), "Python objects"),
        (npy_bytes((-2, *SHAPE)), "its shape is"),
        (npy_bytes((0, *SHAPE)), "no images found"),
        (npy_bytes((1, *SHAPE), "<i4", content=bytes(120)), "x.astype('float32')"),
        (npy_bytes((1, *SHAPE), "<c8", content=bytes(240)), "real and imaginary"),
        (npy_bytes((30,), content=bytes(120)), "reshape them"),
        (npy_bytes((), content=bytes(4)), "reshape them"),
        (npy_bytes((1, *SHAPE), fortran=True, content=bytes(120)), "numpy.ascontiguousarray(x)"),
        (b"\x93NUMPY\2\0" + struct.pack("<I", 2**32 - 1) + bytes(99), "too long"),
        (b"\x93NUMPY\1\0" + struct.pack("<H", 9_999) + b"(" * 9_999, "too long"),
        (b"\x93NUMPY\1\0" + struct.pack("<H", 999) + b"-" * 999, "not an npy file"),
        (b"\x93NUMPY\1\0", "cut short"),
        (b"\x93NUM", "does not begin as"),
        (b"", "does not begin as"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"PK\3\4" + bytes(99), "name it npz:"),
        (None, "No such file"),
    ],
    ids=[f"{number:02}" for number in range(21)],
)
def test_what_is_no_such_array_is_refused_in_one_line(tmp_path, content, words):
    if content is not None:
        (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(UserError) as error:
        loaded(tmp_path / "x.npy")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_pipes_and_folders_are_refused(tmp_path):
    os.mkfifo(tmp_path / "x.npy")
    assert "not a regular file" in refusal(tmp_path / "x.npy")
    assert "not a regular file" in refusal(tmp_path)


def test_8_bit_images_and_16_bit_images_are_asked_for(tmp_path, images):
    np.save(tmp_path / "x.npy", images)
    line = refusal(tmp_path / "x.npy", values="uint8")
    assert "--data.values range LOW HIGH, quantiles LOW HIGH or standardise" in line
    np.save(tmp_path / "x.npy", np.uint16(images))
    assert "--data.values uint16" in refusal(tmp_path / "x.npy", values="uint8")


refused_beside = [
    ("labels", np.zeros(N - 1, int), "labels must be 100 integers"),
    ("labels", np.zeros((N, 2), int), "labels must be 100 integers"),
    ("labels", np.zeros(N), "labels must be 100 integers"),
    ("labels", np.full(N, "a"), "it holds <U1, not numbers"),
    ("labels", np.full(N, ""), "not numbers"),
    ("conditions", np.zeros(N), "give conditions[:, None]"),
    ("conditions", np.full((N, 2), np.nan), "of image 0, and of 99 more, are NaN"),
]


@pytest.mark.parametrize(("name", "array", "words"), refused_beside)
def test_what_stands_beside_is_checked_and_named(tmp_path, images, name, array, words):
    np.save(tmp_path / "x.npy", images)
    np.save(tmp_path / f"x.{name}.npy", array)
    with pytest.raises(UserError) as error:
        loaded(tmp_path / "x.npy")
    assert words in str(error.value) and f"x.{name}.npy" in str(error.value)


def test_damaged_headers_are_refused_or_give_the_numbers_that_numpy_reads(tmp_path, images):
    """150 files with a few other bytes in their beginning."""
    file = io.BytesIO()
    np.save(file, images[:4])
    whole = file.getvalue()
    rng = np.random.default_rng(0)
    read = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for at in rng.integers(0, 80, rng.integers(1, 3)):
            damaged[at] = rng.choice([rng.integers(256), *b"9-(>, f8"])
        (tmp_path / "x.npy").write_bytes(damaged)
        try:
            source = loaded(tmp_path / "x.npy", cache_mb=0)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        read += 1
        numbers = np.load(tmp_path / "x.npy", allow_pickle=False).reshape(4, *SHAPE)
        np.testing.assert_array_equal(source.read(np.arange(4)), numbers)
    assert 2 <= read < 140
