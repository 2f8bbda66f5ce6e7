"""What a start keeps of a folder for the next: the same images, sooner, and never stale ones."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import pickle
import shutil
import threading
import time
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import with_
from PIL import Image

from ddpm_jax import DDPM, UserError
from ddpm_jax.config import Data
from ddpm_jax.data import (
    decode_all,
    decode_process,
    files,
    image_file,
    load_source,
    read_all,
    remembered,
)
from ddpm_jax.data.image_file import Digest
from ddpm_jax.data.remembered import Memory
from ddpm_jax.evaluation.splits import read_split
from ddpm_jax.storage.run import start_run
from ddpm_jax.training.prepare import prepare
from ddpm_jax.weights.load import Loaded

SHAPE = (4, 4, 3)
BEFORE = 10**9
"""A time of change in ns that no file has of itself."""


@pytest.fixture
def images(tmp_path, rng, monkeypatch):
    """A folder of five images of three kinds, remembered however new they are; an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "SETTLED", -(10**12))
    monkeypatch.setattr(read_all, "SLOW", -1)
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "b.png", "c.jpeg", "d.bmp", "e\udce9.png"):
        put(folder / name, rng)
    return folder


def put(file, rng, height=4):
    with open(file, "wb") as opened:
        pixels = rng.integers(0, 256, (height, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(opened, file.suffix[1:])


@pytest.fixture
def decoded(monkeypatch):
    """The names that are decoded, as they are."""
    names = []
    decode = image_file.decode_file

    def counted(file, shape, name, dtype):
        names.append(name)
        return decode(file, shape, name, dtype)

    monkeypatch.setattr(image_file, "decode_file", counted)
    return names


@pytest.fixture
def unchecked(monkeypatch):
    """No image is compared with its file, so nothing but its stamp tells that it has changed."""
    monkeypatch.setattr(read_all, "CHECKED", 0)


def load(place, **options):
    return load_source(Data(source=f"folder:{place}", image_shape=SHAPE, **options))


def stores(tmp_path):
    return sorted((tmp_path / "cache/ddpm_jax/images").glob("*.npz"))


def assert_same(one, other):
    every = np.arange(len(other))
    assert one.names == other.names and one.fingerprint == other.fingerprint
    assert one.streamed == other.streamed and one.dtype == other.dtype
    np.testing.assert_array_equal(one.read(every), other.read(every))
    np.testing.assert_array_equal(one.marks(), other.marks())
    assert one.former == other.former


@pytest.mark.parametrize(
    "options", [{}, {"cache_mb": 0}, {"values": "uint16"}, {"values": "range 0 255"}]
)
def test_a_second_start_decodes_nothing_and_finds_the_same(
    images, unchecked, decoded, tmp_path, options
):
    first = load(images, **options)
    assert sorted(decoded) == first.names and not first.remembered
    decoded.clear()
    second = load(images, **options)
    assert decoded == [] and second.remembered
    assert_same(second, first)
    assert_same(second, load(images, disk_cache_mb=0, **options))
    assert len(stores(tmp_path)) == 1


def test_other_settings_are_remembered_apart(images, unchecked, decoded, tmp_path, monkeypatch):
    def changes():
        yield lambda: load(images)
        yield lambda: load(images, values="uint16")
        yield lambda: load(images, cache_mb=0)
        yield lambda: load_source(Data(source=f"folder:{images}", image_shape=(3, 4, 3)))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
        yield lambda: load(images)
        monkeypatch.setattr(remembered, "_decoder", lambda: "another version")
        yield lambda: load(images)

    for count, again in enumerate(changes(), 1):
        decoded.clear()
        assert not again().remembered and len(set(decoded)) == 5
        assert again().remembered and len(stores(tmp_path)) == count


def test_a_zip_is_remembered_until_it_changes(images, unchecked, decoded, tmp_path):
    path = tmp_path / "images.zip"
    (images / "e\udce9.png").rename(images / "e.png")  # Which a zip cannot be given.
    shutil.make_archive(path.with_suffix(""), "zip", images)
    first = load(path)
    assert_same(load(path), first)
    assert len(decoded) == len(first) == 5
    with zipfile.ZipFile(path, "a") as archive:
        archive.write(images / "a.png", "f.png")
    assert len(load(path)) == 6 and len(decoded) == 11


def changed_in_place(images, rng):
    """Of the same size and inode, at another time."""
    put(images / "d.bmp", rng)
    os.utime(images / "d.bmp", ns=(BEFORE, BEFORE))
    return ["d.bmp"]


def changed_with_its_time_set_back(images, rng):
    """Of the same size, inode and time of change: the system has noted when that was set."""
    file = images / "d.bmp"
    before = file.stat()
    put(file, rng)
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # Until the file system's clock ticks.
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    now = file.stat()
    assert (now.st_size, now.st_ino) == (before.st_size, before.st_ino)
    return ["d.bmp"]


def replaced(images, rng):
    """By a file of the same size and time that has been beside it."""
    other = images.parent / "other.bmp"
    put(other, rng)
    before = (images / "d.bmp").stat()
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, images / "d.bmp")
    return ["d.bmp"]


def exchanged(images, rng):
    """Two names that now mean each other's file."""
    os.rename(images / "a.png", images.parent / "kept.png")
    os.rename(images / "b.png", images / "a.png")
    os.rename(images.parent / "kept.png", images / "b.png")
    return ["a.png", "b.png"]


def added(images, rng):
    put(images / "aa.png", rng)
    return ["aa.png"]


def removed(images, rng):
    (images / "b.png").unlink()
    return []


def damaged(images, rng):
    (images / "b.png").write_bytes(b"no image")
    return ["b.png"]


@pytest.mark.parametrize(
    "change",
    [
        changed_in_place,
        changed_with_its_time_set_back,
        replaced,
        exchanged,
        added,
        removed,
        damaged,
    ],
)
@pytest.mark.parametrize("cache_mb", [0, 1])
def test_a_change_is_noticed_and_nothing_else_decoded(
    images, unchecked, decoded, rng, change, cache_mb
):
    before = load(images, cache_mb=cache_mb)
    decoded.clear()
    now = change(images, rng)
    found = load(images, cache_mb=cache_mb)
    assert sorted(decoded) == now and found.remembered
    assert found.fingerprint != before.fingerprint
    assert_same(found, load(images, cache_mb=cache_mb, disk_cache_mb=0))
    assert_same(load(images, cache_mb=cache_mb), found)


def test_what_does_not_fit_is_said_at_every_start(images, unchecked, decoded, rng, caplog):
    put(images / "small.png", rng, height=3)
    for _ in range(2):
        caplog.clear()
        assert len(load(images, skip_unfit=True)) == 5
        assert (
            "small.png is 5x3 pixels" in caplog.text and "1 images that do not fit" in caplog.text
        )
        with pytest.raises(UserError, match=r"small.png is 5x3 pixels"):
            load(images)
    assert decoded.count("small.png") == 4 and decoded.count("a.png") == 1


def test_files_that_may_change_again_unseen_are_not_kept(images, decoded, tmp_path, monkeypatch):
    monkeypatch.setattr(remembered, "SETTLED", 10**15)
    os.utime(images / "a.png", ns=(BEFORE, BEFORE))  # Its contents may be older, but not its inode.
    load(images)
    assert stores(tmp_path) == []


def test_what_is_quick_to_decode_is_not_kept(images, tmp_path, monkeypatch):
    monkeypatch.setattr(read_all, "SLOW", 10**9)
    load(images)
    assert stores(tmp_path) == []


def test_none_is_kept_and_used_where_the_config_says_so(images, tmp_path):
    load(images, disk_cache_mb=0)
    assert stores(tmp_path) == []
    load(images)
    assert not load(images, disk_cache_mb=0).remembered


@pytest.fixture
def stale(images, rng, monkeypatch):
    """The folder with an image that has changed since it was remembered, and looks as it did."""
    monkeypatch.setattr(files, "_file_stamp", lambda root, name: [1, 2, 3, 4])
    load(images)
    put(images / "b.png", rng)
    return images


def test_a_few_images_are_compared_with_their_files(stale, caplog):
    found = load(stale)
    assert not found.remembered and "is not what the files hold" in caplog.text
    assert_same(found, load(stale, disk_cache_mb=0))
    assert load(stale).remembered  # It has been written again.


@pytest.fixture
def trained(stale, unchecked, tiny, tmp_path):
    """(config, source): a run in tmp_path/run was started on what the files hold now."""
    data = {"source": f"folder:{stale}", "image_shape": SHAPE, "holdout": 0.0}
    config = with_(tiny, data=data)
    real = load_source(dataclasses.replace(config.data, disk_cache_mb=0))
    assert load_source(config.data).fingerprint != real.fingerprint
    with start_run(tmp_path / "run", config, real, "cpu"):
        return config, real


def test_a_run_that_resumes_is_not_refused_for_what_is_remembered(trained, tmp_path):
    config, real = trained
    assert_same(prepare(config, tmp_path / "run").source, real)


def test_a_model_finds_its_images_whatever_is_remembered(trained, tmp_path):
    config, real = trained
    model = Loaded(tmp_path / "run", DDPM(config), {}, "ema", 1, real.fingerprint)
    assert_same(read_split(model, "train").source, real)


def test_damaged_stores_are_not_believed(images, unchecked, decoded, tmp_path, caplog):
    first = load(images)
    (store,) = stores(tmp_path)
    whole = store.read_bytes()
    at = whole.index(first.read(np.array([2])).tobytes())
    objects = io.BytesIO()
    np.savez(objects, about=np.array([Trap()], dtype=object))
    for content in (
        b"",
        b"junk",
        whole[: len(whole) // 2],
        whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],
        pickle.dumps(Trap()),
        objects.getvalue(),
        with_arrays(whole, names=np.frombuffer(b"a.png", np.uint8)),
        with_arrays(whole, hashes=np.zeros(80, np.uint8)),
        with_arrays(whole, stamps=np.zeros((5, 3), np.int64)),
        with_arrays(whole, pixels=np.zeros((5, 4, 4, 1), np.uint8)),
        with_arrays(whole, about=np.zeros(3, np.uint8)),
    ):
        store.write_bytes(content)
        decoded.clear()
        caplog.clear()
        assert_same(load(images), first)
        assert len(decoded) >= 5 and not caplog.records
        decoded.clear()
        assert load(images).remembered and decoded == []
    assert not Trap.sprung


class Trap:
    """What must never be unpickled."""

    sprung = False

    def __reduce__(self):
        return setattr, (Trap, "sprung", True)


def with_arrays(content, **others):
    """The npz file with other arrays of these names."""
    with np.load(io.BytesIO(content)) as arrays:
        changed = {**arrays, **others}
    file = io.BytesIO()
    np.savez(file, **changed)
    return file.getvalue()


def test_a_store_that_goes_away_or_is_written_by_two_is_no_trouble(images, tmp_path, caplog):
    first = load(images)
    shutil.rmtree(tmp_path / "cache")
    with remembered._alone() as is_alone:
        assert is_alone
        assert_same(load(images), first)  # Another process writes: this one leaves it to that.
        assert stores(tmp_path) == []
    left = remembered.folder() / ".0123.host-1.tmp"
    left.write_bytes(b"half of it, by a process that was killed")
    assert_same(load(images), first)
    assert len(stores(tmp_path)) == 1 and not left.exists() and not caplog.records


def no_folder(tmp_path, monkeypatch):
    (tmp_path / "cache").write_bytes(b"")
    return "Not a directory"


def read_only(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(remembered.os, "open", refuse)
    return "Read-only file system"


def full(tmp_path, monkeypatch):
    def fill(file, **_):
        file.write(b"some of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(remembered.np, "savez", fill)
    return "No space left"


def nearly_full(tmp_path, monkeypatch):
    monkeypatch.setattr(remembered.shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    return "No space left"


def of_another(tmp_path, monkeypatch):
    uid = os.getuid() + 1
    monkeypatch.setattr(remembered.os, "getuid", lambda: uid)
    return "it belongs to another user"


@pytest.mark.parametrize("fault", [no_folder, read_only, full, nearly_full, of_another])
def test_a_cache_that_cannot_be_written_costs_one_warning(
    images, tmp_path, monkeypatch, caplog, fault
):
    caplog.set_level("INFO")
    with monkeypatch.context() as patch:
        reason = fault(tmp_path, patch)
        found = load(images)
        (line,) = [record.getMessage() for record in caplog.records]
    assert reason in line and "data.disk_cache_mb to 0" in line and "\n" not in line
    assert_same(found, load(images, disk_cache_mb=0))
    cache = tmp_path / "cache/ddpm_jax/images"
    assert not cache.exists() or [each.name for each in cache.iterdir()] in ([], [".lock"])


def test_only_the_user_may_read_what_is_kept(images, tmp_path):
    load(images)
    (store,) = stores(tmp_path)
    assert store.stat().st_mode & 0o777 == 0o600
    assert store.parent.stat().st_mode & 0o777 == 0o700


def test_the_oldest_go_first(images, tmp_path):
    """Three folders where there is room for two, and one that is larger than the room."""
    pixels = np.zeros((100, *SHAPE), np.uint8)
    digests = {str(i): Digest(f"{i:032x}", False) for i in range(100)}
    stamps = np.ones((100, 4), np.int64)

    def memory(name, most=200_000):
        return Memory(str(tmp_path / name), SHAPE, pixels.dtype, True, most)

    def is_kept(name):
        return memory(name).recall() is not None

    for time_of_use, name in enumerate("ab"):
        memory(name).keep(digests, stamps, pixels, time.time_ns())
        os.utime(memory(name)._file, ns=(BEFORE, BEFORE + time_of_use))
    assert is_kept("a")  # It has now been used after b.
    os.utime(memory("a")._file, ns=(BEFORE, BEFORE + 2))
    memory("c", 92_000).keep(digests, stamps, pixels, time.time_ns())
    assert [is_kept(name) for name in "abc"] == [True, False, True]
    memory("d", 60_000).keep(digests, stamps, pixels, time.time_ns())
    assert [is_kept(name) for name in "abcd"] == [True, False, True, False]
    assert sum(store.stat().st_size for store in stores(tmp_path)) < 92_000


class Threads:
    """Stands for subprocess.Popen: threads in the place of the processes that it would start."""

    def __init__(self, command, pass_fds, **_):
        order = json.loads(command[-1])
        self.threads = [
            threading.Thread(target=self.serve, args=(os.dup(number), order)) for number in pass_fds
        ]
        for each in self.threads:
            each.start()

    def serve(self, number, order):
        with contextlib.suppress(OSError):
            decode_process.serve(number, decode_process.decoder_of(order), order["pixels"])

    def wait(self, timeout=None):
        for each in self.threads:
            each.join()

    def kill(self):
        self.wait()


@pytest.fixture
def in_processes(monkeypatch):
    """Few images are decoded in processes, too, and none before these are there."""
    monkeypatch.setattr(decode_all, "MANY", 1)
    monkeypatch.setattr(decode_all.os, "sched_getaffinity", lambda of: {0, 1})
    monkeypatch.setattr(decode_process.subprocess, "Popen", Threads)
    is_ready = decode_process._Line.is_ready

    def wait(line):
        while not is_ready(line):
            time.sleep(0.001)
        return True

    monkeypatch.setattr(decode_process._Line, "is_ready", wait)


@pytest.fixture
def answers(monkeypatch):
    """The names that were decoded in processes."""
    names = []
    answer = decode_process._answer

    def counted(some, *rest):
        names.extend(some)
        return answer(some, *rest)

    monkeypatch.setattr(decode_process, "_answer", counted)
    return names


@pytest.mark.parametrize("options", [{}, {"cache_mb": 0}, {"values": "uint16"}])
def test_processes_decode_the_same(images, rng, in_processes, answers, caplog, options):
    options |= {"disk_cache_mb": 0, "skip_unfit": True}
    put(images / "small.png", rng, height=3)
    (images / "f.png").write_bytes(b"no image")
    grey = np.array([[0, 40], [0, 40]], np.uint16).repeat(2, 0).repeat(2, 1)
    Image.fromarray(grey).save(images / "g.png", transparency=40)  # Of the changed decoding.
    found = load(images, **options)
    assert sorted(answers) == sorted([*found.names, "f.png", "small.png"])
    said = [record.getMessage() for record in caplog.records]
    caplog.clear()
    decode_all.MANY = 10**9
    other = load(images, **options)
    assert_same(found, other) and len(answers) == 8
    assert said == [record.getMessage() for record in caplog.records] and len(said) == 2
    assert options.get("values") or found.former


def test_processes_that_end_are_done_without(images, in_processes, monkeypatch):
    def die(*_):
        raise OSError

    monkeypatch.setattr(decode_process, "_answer", die)
    found = load(images, disk_cache_mb=0)
    decode_all.MANY = 10**9
    assert_same(found, load(images, disk_cache_mb=0))


def test_processes_that_cannot_start_are_done_without(images, in_processes, monkeypatch):
    def refuse(*_, **__):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(decode_process.subprocess, "Popen", refuse)
    assert len(load(images, disk_cache_mb=0)) == 5
