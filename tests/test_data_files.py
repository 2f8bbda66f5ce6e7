"""Files of a folder or a zip: found, read whole or refused, whatever they are called."""

import errno
import gc
import json
import logging
import os
import pickle
import struct
import sys
import types
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_data import bomb, folder, picture

from ddpm_jax import UserError
from ddpm_jax.config import Config, Data
from ddpm_jax.data import from_array, load_source, split
from ddpm_jax.data.decode import decode
from ddpm_jax.data.formats import endings
from ddpm_jax.data.quiet import quiet_pillow
from ddpm_jax.errors import DataLost
from ddpm_jax.storage.files import npz
from ddpm_jax.storage.run import start_run


@pytest.fixture
def three(tmp_path, rng):
    """A folder of three PNGs."""
    (tmp_path / "three").mkdir()
    for name in "abc":
        Image.fromarray(picture(rng)).save(tmp_path / "three" / f"{name}.png")
    return tmp_path / "three"


def refusal(path, **options):
    """The one line that refuses the folder."""
    with pytest.raises(UserError) as error:
        folder(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files); raise the limit"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error); fix that"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied); allow it"),
        (MemoryError(), "out of memory); free some memory"),
    ],
)
def test_a_file_that_cannot_be_read_is_not_left_out(three, monkeypatch, fault, words):
    source = folder(three, cache_mb=0)
    whole = Path.read_bytes

    def read_bytes(path):
        if path.name == "b.png":
            raise fault
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    line = refusal(three)
    assert f"{three}/b.png cannot be read" in line and words in line
    again = pickle.loads(pickle.dumps(source.read))  # As in a process that reads ahead.
    for read in (source.read, again):
        with pytest.raises(DataLost, match=r"b.png can no longer be read \(") as lost:
            read(np.array([0, 1]))
        assert words in str(lost.value)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux")
def test_a_disk_that_fails_is_not_a_damaged_image(three):
    (three / "d.png").symlink_to("/proc/self/mem")  # Reading it fails with EIO.
    assert "d.png cannot be read (Input/output error)" in refusal(three)


def test_what_is_no_file_is_refused_at_once(three):
    (three / "d.png").symlink_to(three / "nowhere")
    assert "d.png cannot be read (No such file or directory); restore it" in refusal(three)
    (three / "d.png").unlink()
    os.mkfifo(three / "d.png")  # Reading it would wait for ever.
    assert "d.png cannot be read (it is not a regular file)" in refusal(three)
    assert "d.png is neither a folder nor a zip" in refusal(three / "d.png")
    with pytest.raises(UserError, match=r"d.png is not an npz .*not a regular file"):
        load_source(Data(source=f"npz:{three}/d.png"))


def test_a_folder_that_cannot_be_looked_at_is_not_left_out(three, monkeypatch):
    (three / "more").mkdir()
    look = os.scandir

    def scandir(path):
        if Path(path).name == "more":
            raise OSError(number, os.strerror(number), str(path))
        return look(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for number, remedy in ((errno.EIO, "fix that"), (errno.EMFILE, "raise the limit")):
        expected = f"cannot read {three}/more ({os.strerror(number)}); {remedy}"
        assert expected in refusal(three)


def test_memory_that_runs_out_in_decoding_is_not_a_damaged_image(three, monkeypatch):
    (three / "d.png").write_bytes(bomb(2**31 - 1))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert "d.png cannot be read (out of memory)" in refusal(three)


def test_a_damaged_zip_is_no_damaged_image(three, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in "abc":
            archive.write(three / f"{name}.png", f"{name}.png")
    whole = (tmp_path / "x.zip").read_bytes()
    pixels = (three / "b.png").read_bytes()[-40:-20]
    (tmp_path / "x.zip").write_bytes(whole.replace(pixels, bytes(20)))
    line = refusal(tmp_path / "x.zip")
    assert f"b.png in {tmp_path}/x.zip cannot be read" in line and "make the zip again" in line


def test_a_run_inside_its_own_data_is_left_out(three, tmp_path, caplog):
    before = folder(three)
    for run in ("run", "old/run"):
        (three / run / "samples").mkdir(parents=True)
        for name in ("config.json", "run.json"):
            (three / run / name).write_text("{}")
        for grid in ("samples.png", "samples/00000020.png"):
            Image.new("RGB", (9, 9)).save(three / run / grid)
    source = folder(three)
    assert source.names == before.names and source.fingerprint == before.fingerprint
    assert "left out 2 folders that hold runs or samples: old/run, run" in caplog.text
    (three / "drawn").mkdir()
    (three / "drawn/samples.json").write_text("{}")
    Image.new("RGB", (9, 9)).save(three / "drawn/000000.png")
    assert folder(three).fingerprint == before.fingerprint
    assert len(folder(three / "drawn")) == 1
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for file in three.rglob("*.*"):
            archive.write(file, file.relative_to(three))
    assert folder(tmp_path / "x.zip").fingerprint == before.fingerprint
    # What is asked for by its own name is read.
    assert len(folder(three / "run/samples")) == 1
    assert f"{three}/run is a run; name a folder of images" in refusal(three / "run")


def test_a_config_alone_does_not_make_a_folder_a_run(three):
    (three / "config.json").write_text("{}")
    assert len(folder(three)) == 3


def test_names_of_any_bytes_are_read_hashed_and_printed(tmp_path, rng, caplog):
    root = os.fsencode(tmp_path) + b"/\xff"
    for kind in (b"caf\xe9", b"two\nlines", "größe".encode()):
        os.makedirs(root + b"/" + kind)
        for i in range(4):
            Image.fromarray(picture(rng)).save(os.fsdecode(root + b"/%s/\xe9%d.png" % (kind, i)))
    source = folder(os.fsdecode(root), cache_mb=0)
    assert len(source) == 12 and source.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert sum(map(len, split(source, 0.3))) == 12
    read = pickle.loads(pickle.dumps(source.read))
    np.testing.assert_array_equal(read(np.arange(12)), source.read(np.arange(12)))
    config = Config(data=Data(source=f"folder:{os.fsdecode(root)}"))
    with start_run(tmp_path / "run", config, source, "a device"):
        pass
    Path(os.fsdecode(root + b"/caf\xe9/\xe90.png")).write_bytes(b"damaged")
    Path(os.fsdecode(root + b"/two\nlines/\xe90.png")).write_bytes(b"damaged")
    fewer = folder(os.fsdecode(root), cache_mb=0)
    for named in ("caf\\xe9/\\xe90.png (Unid", "two\\nlines/\\xe90.png (Unid"):
        assert named in caplog.text
    with pytest.raises(UserError) as error, start_run(tmp_path / "run", config, fewer, "a device"):
        pass
    assert "caf\\xe9/\\xe90.png is gone, as 1 more" in str(error.value)
    str(error.value).encode()  # It can be printed.


def zipped(path, three, called, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for file in sorted(three.rglob("*.png")):
            info = zipfile.ZipInfo()
            info.filename = called(file.relative_to(three).as_posix())
            archive.writestr(info, file.read_bytes())
    return path


@pytest.fixture
def classes(three, rng):
    """A folder of three classes of one image."""
    for name in "abc":
        (three / f"{name}.png").unlink()
        (three / name).mkdir()
        Image.fromarray(picture(rng)).save(three / name / "0.png")
    return three


def test_a_zip_of_windows_is_the_folder(classes, tmp_path):
    whole = folder(classes)
    for called in (lambda name: name.replace("/", "\\"), lambda name: f"./{name}"):
        source = folder(zipped(tmp_path / "x.zip", classes, called))
        assert source.names == whole.names and source.labels.tolist() == [0, 1, 2]
        assert source.fingerprint == whole.fingerprint
        read = pickle.loads(pickle.dumps(folder(tmp_path / "x.zip", cache_mb=0).read))
        np.testing.assert_array_equal(read(np.arange(3)), whole.read(np.arange(3)))


def test_an_encrypted_zip_is_refused_for_what_it_is(classes, tmp_path):
    zipped(tmp_path / "x.zip", classes, lambda name: name)
    whole = bytearray((tmp_path / "x.zip").read_bytes())
    for mark, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = whole.index(mark)
        whole[at + flags] |= 1
    (tmp_path / "x.zip").write_bytes(whole)
    assert "x.zip is encrypted (1 images, the first is a/0.png)" in refusal(tmp_path / "x.zip")


def test_a_member_that_unpacks_to_a_flood_is_not_unpacked(classes, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("ddpm_jax.data.files.UNPACKED", 2**16)
    zipped(tmp_path / "x.zip", classes, lambda name: name)
    with zipfile.ZipFile(tmp_path / "x.zip", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("d/0.png", bytes(2**17))
    assert "d/0.png unpacks to 131,072 bytes, too many" in refusal(tmp_path / "x.zip")
    assert len(folder(tmp_path / "x.zip", skip_unfit=True)) == 3
    assert "skipped 1 images that do not fit: d/0.png" in caplog.text


def test_a_dictionary_of_4_gib_is_not_made(classes, tmp_path):
    zipped(tmp_path / "x.zip", classes, lambda name: name)
    with zipfile.ZipFile(tmp_path / "x.zip", "a", zipfile.ZIP_LZMA) as archive:
        archive.write(classes / "a/0.png", "d/0.png")
    assert len(folder(tmp_path / "x.zip")) == 4
    whole = bytearray((tmp_path / "x.zip").read_bytes())
    at = whole.index(b"d/0.png") + len("d/0.png")
    assert whole[at + 5 : at + 9] == (2**23).to_bytes(4, "little")
    whole[at + 5 : at + 9] = b"\xff" * 4
    (tmp_path / "x.zip").write_bytes(whole)
    assert "cannot be read (BadZipFile: its dictionary is too large)" in refusal(tmp_path / "x.zip")


def test_a_member_longer_than_its_zip_takes_no_memory(classes, tmp_path):
    zipped(tmp_path / "x.zip", classes, lambda name: name)
    whole = bytearray((tmp_path / "x.zip").read_bytes())
    at = whole.index(b"PK\1\2")
    whole[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**28)
    (tmp_path / "x.zip").write_bytes(whole)
    assert "a/0.png in" in refusal(tmp_path / "x.zip")
    assert "cannot be read (BadZipFile: it is longer than the zip)" in refusal(tmp_path / "x.zip")


def test_no_zip_is_left_open(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"PK\3\4 cut short")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert "neither a folder nor a zip that can be read" in refusal(tmp_path / "x.zip")
        gc.collect()
    assert not [warning for warning in told if "x.zip" in str(warning.message)]


def resumed(run, source):
    """The line that refuses to resume the run with these images."""
    config = Config(data=Data(source="array"))
    with pytest.raises(UserError) as error, start_run(run, config, source, "a device"):
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


def started(run, source):
    with start_run(run, Config(data=Data(source="array")), source, "a device"):
        pass


def test_one_image_that_differs_is_named(classes, tmp_path, rng):
    run = tmp_path / "run"
    started(run, folder(classes))
    started(run, folder(classes))
    top = folder(zipped(tmp_path / "x.zip", classes, lambda name: f"three/{name}"))
    assert top.labels.tolist() == [0, 1, 2]
    expected = "(3 images, now 3; three/a/0.png was called a/0.png, as 2 more)"
    assert expected in resumed(run, top)
    Image.fromarray(picture(rng)).save(classes / "b/0.png")
    assert "(3 images, now 3; b/0.png has changed)" in resumed(run, folder(classes))
    (classes / "c/0.png").unlink()
    Image.fromarray(picture(rng)).save(classes / "d.png")
    line = resumed(run, folder(classes))
    assert "b/0.png has changed; d.png is new; c/0.png is gone" in line
    # A run of an older version keeps no record, and a damaged one does not stand in the way.
    for content in (None, b"x", npz({"marks": np.zeros((2, 2))}), npz({"names": np.zeros(3)})):
        (run / "data.npz").unlink(missing_ok=True)
        if content is not None:
            (run / "data.npz").write_bytes(content)
        assert "(3 images, now 3)" in resumed(run, folder(classes))


def test_one_image_of_an_array_that_differs_is_named(tmp_path, rng):
    x = rng.integers(0, 256, (9, 4, 4), dtype=np.uint8)
    started(tmp_path / "run", from_array(x, (4, 4, 1), range(9)))
    labels = [0, 1, 2, 3, 4, 5, 5, 7, 8]
    line = resumed(tmp_path / "run", from_array(x, (4, 4, 1), labels))
    assert "(9 images, now 9; 6 has changed)" in line
    x[2] += 1
    line = resumed(tmp_path / "run", from_array(x[:8], (4, 4, 1), range(8)))
    assert "(9 images, now 8; 2 has changed; 8 is gone)" in line


def test_a_run_that_learned_other_pixels_or_names_is_told_so(tmp_path, rng):
    """What an older version recorded: the files alone, and the names as the zip has them."""
    from test_data_pixels import MIN_IS_WHITE, plain_fingerprint, tiff

    levels = rng.integers(0, 2**16, (4, 4)).astype("<u2")
    (tmp_path / "x").mkdir()
    (tmp_path / "x/a.tif").write_bytes(tiff(levels.tobytes(), (4, 4), 16, MIN_IS_WHITE))
    source = folder(tmp_path / "x")
    started(tmp_path / "run", source)
    record(tmp_path / "run", plain_fingerprint((tmp_path / "x/a.tif").read_bytes(), "a.tif"))
    assert "a.tif and 0 more are decoded otherwise since then" in resumed(tmp_path / "run", source)

    (tmp_path / "y/cat").mkdir(parents=True)
    Image.fromarray(picture(rng)).save(tmp_path / "y/cat/a.png")
    archive = zipped(tmp_path / "y.zip", tmp_path / "y", lambda name: name.replace("/", "\\"))
    file = (tmp_path / "y/cat/a.png").read_bytes()
    record(tmp_path / "run", plain_fingerprint(file, "cat\\a.png"))
    assert "cat/a.png was called cat\\a.png then" in resumed(tmp_path / "run", folder(archive))


def record(run, fingerprint):
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**about, "data_fingerprint": fingerprint}))


def test_images_that_only_another_package_opens_are_counted(three, caplog, monkeypatch):
    for name in ("a.HEIC", "b.heic", "c.jxl", "d.dng", ".hidden.jxl", "e.txt"):
        (three / name).write_bytes(b"")
    assert len(folder(three)) == 3
    for part in (
        "2 .heic (pip install pillow-heif opens them)",
        "1 .jxl (pip install pillow-jxl-plugin opens them)",
        "1 .dng (convert them to PNG, for example with rawpy)",
    ):
        assert part in caplog.text
    for file in three.glob("*.png"):
        file.unlink()
    assert "no images found" in refusal(three) and "pillow-heif" in refusal(three)
    for file in three.glob("*.[!t]*"):
        file.unlink()
    assert "no images found" in refusal(three) and "(it holds 1 .txt" in refusal(three)

    # Telephones give HEIC the ending of JPEG.
    Image.new("RGB", (4, 4)).save(three / "a.png")
    (three / "b.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert folder(three).names == ["a.png"]
    assert "b.jpg (pip install pillow-heif may open it)" in caplog.text
    (three / "a.png").unlink()
    (three / "b.jpg").unlink()

    # Where the package is installed, it is used.
    plugin = types.ModuleType("pillow_jxl")
    plugin.__spec__ = types.SimpleNamespace(name="pillow_jxl")
    monkeypatch.setitem(sys.modules, "pillow_jxl", plugin)
    monkeypatch.setattr(Image, "EXTENSION", {**Image.EXTENSION, ".jxl": "PNG"})
    endings.cache_clear()
    try:
        Image.new("RGB", (4, 4)).save(three / "c.jxl", "PNG")
        assert folder(three).names == ["c.jxl"]
    finally:
        endings.cache_clear()


def test_all_images_that_do_not_fit_are_named_at_once_or_left_out(three, monkeypatch, caplog):
    Image.new("RGB", (3, 9)).save(three / "d.png")
    Image.new("RGB", (9, 3)).save(three / "e.png")
    Image.new("RGB", (20, 20)).save(three / "f.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    line = refusal(three)
    assert "d.png is 3x9 pixels, smaller than data.image_shape 4x4, and 2 more images" in line
    assert "too small or too large: e.png, f.png" in line and "--data.skip-unfit" in line
    source = folder(three, skip_unfit=True)
    assert source.names == ["a.png", "b.png", "c.png"]
    assert "skipped 3 images that do not fit" in caplog.text
    for name in "def":
        (three / f"{name}.png").unlink()
    assert folder(three).fingerprint == source.fingerprint
    assert "none of the 3 image files" in refusal(three, skip_unfit=True, image_shape=(8, 8, 3))


def test_no_limit_means_none_in_other_processes_too(three, monkeypatch):
    """Those of Grain are new, with Pillow's own limit; here it is lowered, to be below a file."""
    source = folder(three, cache_mb=0)
    for limit in (None, 4 * 4):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        sent = pickle.dumps(source.read)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
        np.testing.assert_array_equal(pickle.loads(sent)([0]), folder(three).read(np.array([0])))
        assert limit == Image.MAX_IMAGE_PIXELS


def test_warnings_of_pillow_reach_nobody_and_change_nothing(three, monkeypatch, caplog):
    """Two threads may decode at once, and one ends before the other."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        with pytest.raises(UserError, match="has 4x4 pixels, too many"):  # Pillow warns, too.
            decode((three / "a.png").read_bytes(), (4, 4, 3), "a.png")
        assert warnings.filters == before
        first, second = quiet_pillow(), quiet_pillow()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert warnings.filters != before
        logging.getLogger("PIL.TiffImagePlugin").error("an odd file")
        second.__exit__(None, None, None)
        assert warnings.filters == before and not caplog.text
        logging.getLogger("PIL.TiffImagePlugin").error("another")
        assert "another" in caplog.text


def test_a_lost_image_is_told_without_addresses(three):
    source = folder(three, cache_mb=0)
    (three / "b.png").write_bytes(b"x")
    with pytest.raises(DataLost) as lost:
        source.read(np.array([1]))
    expected = "b.png can no longer be decoded (it is not an image that Pillow knows); restore it"
    assert expected in str(lost.value)
    Image.new("RGB", (2, 9)).save(three / "b.png")
    with pytest.raises(DataLost, match=r"b.png is 2x9 pixels, smaller than data.image_shape 4x4"):
        source.read(np.array([1]))


def test_a_git_lfs_pointer_in_place_of_data_is_told_to_pull(three, caplog):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (three / "d.png").write_bytes(pointer)
    assert len(folder(three)) == 3
    assert "d.png (it is a git-lfs pointer, not the file itself; run `git lfs pull`" in caplog.text
    for name in ("x.zip", "x.npz"):
        (three / name).write_bytes(pointer)
        with pytest.raises(UserError, match=r"git-lfs pointer.*`git lfs pull`"):
            load_source(Data(source=f"{'npz' if name == 'x.npz' else 'folder'}:{three / name}"))


def test_images_of_a_zip_of_parent_folders_are_not_hidden(three, tmp_path):
    for called in ("../data/{}", "a/./{}", "a/../b/{}"):
        zipped(tmp_path / "x.zip", three, called.format)
        assert folder(tmp_path / "x.zip").names == [called.format(f"{i}.png") for i in "abc"]
    zipped(tmp_path / "x.zip", three, "../.trash/{}".format)
    assert "no images found" in refusal(tmp_path / "x.zip")
