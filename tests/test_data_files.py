"""Files of a folder or a zip: found, read whole or refused, whatever they are called."""

import errno
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_data import bomb, folder, picture

from ddpm_jax import UserError
from ddpm_jax.errors import DataLost


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


def test_a_folder_that_cannot_be_looked_at_is_not_left_out(three, monkeypatch):
    (three / "more").mkdir()
    look = os.scandir

    def scandir(path):
        if Path(path).name == "more":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return look(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert f"cannot read {three}/more (Input/output error)" in refusal(three)


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
    assert "left out 2 folders that hold runs: old/run, run" in caplog.text
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
