"""Whatever a folder is called, what is saved in it can be read again."""

import os
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import refused

from ddpm_jax import UserError, load
from ddpm_jax.cli import main
from ddpm_jax.figures.panel import curves
from ddpm_jax.storage import checkpoint
from ddpm_jax.storage.checkpoint import Checkpoints
from ddpm_jax.storage.files import check_writable, path_of, write_file
from ddpm_jax.storage.plain_name import plain_name
from ddpm_jax.storage.restore import abstract_like, restore_part

TREE = {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(4, np.float32)}
NAMES = [
    "run[0]",
    "[abc]",
    "[!a]",
    "**",
    "a*b",
    "a?b",
    "{a,b}",
    "a b",
    "a#b",
    "a%20b",
    "a|b",
    "a\\b",
    "a\nb",
    "-lead",
    "dots...",
    "~tilde",
    "back~",
    "é e\u0301 \U0001f600",
    "caf\udce9",
    "x" * 255,
    "ocdbt.process_0",
    "1.orbax-checkpoint-tmp",
]


@pytest.fixture(autouse=True)
def links(tmp_path, monkeypatch):
    """Where links are made: a folder whose own name is plain."""
    folder = tmp_path / "links"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def saved(workdir):
    """A checkpoint of TREE in `workdir`, as step 1 and, by another object, as step 2."""
    for step in (1, 2):
        checkpoints = Checkpoints(workdir, 2)
        checkpoints.save(step, {"params": TREE})
        checkpoints.close()


def abstract():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return abstract_like(TREE, jax.tree.map(lambda _: sharding, TREE))


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_checkpoint_is_read_back_from_a_folder_of_any_name(tmp_path, name):
    if sys.platform == "darwin" and "\udce9" in name:
        pytest.skip("macOS has only names in UTF-8")
    workdir = tmp_path / name / "run"
    workdir.mkdir(parents=True)
    saved(workdir)
    assert sorted(os.listdir(workdir / "checkpoints")) == ["1", "2"]
    assert set(os.listdir(tmp_path)) == {name, "links"}
    step, params = restore_part(workdir, "params", abstract())
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, params, TREE)


def test_no_file_of_a_neighbour_is_taken_by_a_pattern(tmp_path):
    """`a*` matches `ab` too, whose own files are damaged."""
    (tmp_path / "a*").mkdir()
    (tmp_path / "ab").mkdir()
    for name in ("ab", "a*"):
        saved(tmp_path / name)
    for file in (tmp_path / "ab").rglob("array_metadatas/*"):
        file.write_text(file.read_text().replace("bias", "other"))
    _, params = restore_part(tmp_path / "a*", "params", abstract())
    jax.tree.map(np.testing.assert_array_equal, params, TREE)


def test_paths_that_are_relative_very_long_or_lead_through_links(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "far/deep").mkdir(parents=True)
    (tmp_path / "near").symlink_to("far/deep")
    # The folder above the link's end, not the one above the link.
    saved(Path("near/../run"))
    assert (tmp_path / "far/run/checkpoints/2").is_dir() and not (tmp_path / "run").exists()
    restore_part("near/../run", "params", abstract())
    restore_part("far/run", "params", abstract())

    here = os.open(".", os.O_RDONLY)
    for _ in range(15):  # Deeper than one system call can name with the files in it.
        os.mkdir("y" * 250)
        os.chdir("y" * 250)
    long = Path(os.getcwd())
    os.fchdir(here)
    os.close(here)
    assert len(str(long)) > 3750
    saved(long)
    restore_part(long, "params", abstract())


def test_a_run_in_such_a_folder_is_loaded_and_exported(run, tmp_path):
    folder = tmp_path / "run [1] *?\\ $x$"
    shutil.copytree(run, folder)
    params = load(folder)[1]
    before = load(run)[1]
    jax.tree.map(np.testing.assert_array_equal, params, before)
    model = str(folder / "model.safetensors")
    assert main(["export", str(folder), "--out", model]) == 0
    jax.tree.map(np.testing.assert_array_equal, load(model)[1], before)


def test_a_path_in_a_figure_is_no_formula_and_need_not_be_text():
    panel = {"x": [0.0, 1.0], "lines": {"a": [0.0, 1.0]}, "xlabel": "x", "ylabel": "y"}
    assert curves([panel], r"run $\broken{$", ["caf\udce9 $_$"]).startswith(b"\x89PNG")


def test_a_folder_called_as_a_bucket_is_a_folder(tmp_path):
    assert os.fspath(path_of("/s3/runs") / "x") == "//s3/runs/x"
    assert os.path.samefile("//", "/")
    assert os.fspath(path_of("gs://bucket/runs")) == "gs://bucket/runs"
    assert plain_name(path_of(f"/{tmp_path}")) != path_of(f"/{tmp_path}")


def test_what_no_folder_can_be_called_is_one_line(tmp_path, capsys):
    with pytest.raises(UserError, match=r"'a\\x00b': a path cannot contain a null byte"):
        load("a\0b")
    with pytest.raises(UserError, match="in a bucket under a name with"):
        plain_name(path_of("gs://bucket/runs[0]/checkpoints"))
    long = tmp_path / ("x" * 300)
    assert "File name too long" in refused(capsys, "train", "digits", "--workdir", long)


def test_a_link_that_leads_elsewhere_is_set_right(tmp_path, links):
    folder = path_of(tmp_path / "a[0]")
    link = Path(plain_name(folder))
    link.unlink()
    link.symlink_to(tmp_path)
    assert os.readlink(plain_name(folder)) == str(folder)
    shutil.rmtree(link.parent)
    link.parent.symlink_to(tmp_path)  # As another user of the machine could.
    with pytest.raises(UserError, match=r"belongs to somebody else.*; set TMPDIR"):
        plain_name(folder)


def test_training_finds_out_at_the_first_checkpoint_that_it_cannot_be_read(tmp_path, monkeypatch):
    """As it was in a folder with [ in its name before links were made."""
    monkeypatch.setattr(checkpoint, "plain_name", lambda folder: folder)
    workdir = tmp_path / "run[0]"
    workdir.mkdir()
    checkpoints = Checkpoints(workdir, 2)
    checkpoints.save(1, {"params": TREE})
    with pytest.raises(UserError, match=r"checkpoints/1: was saved, but cannot be read back \("):
        checkpoints.wait()
    checkpoints.close()


def test_only_the_first_checkpoint_is_read_back_and_all_of_its_parts(tmp_path, monkeypatch):
    read = []
    whole = checkpoint.check_metadata

    def counted(path, part, shapes):
        read.append((path.name, part))
        return whole(path, part, shapes)

    monkeypatch.setattr(checkpoint, "check_metadata", counted)
    checkpoints = Checkpoints(tmp_path, 1)
    for step in (1, 2, 3):  # Faster than one asks whether they are saved.
        checkpoints.save(step, {"params": TREE, "ema_params": TREE})
    checkpoints.close()
    assert read == [("1", "params"), ("1", "ema_params")]


def test_a_checkpoint_that_vanishes_while_it_is_saved_is_missed(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(1, {"params": TREE})
    checkpoints._checkpointer.wait()
    shutil.rmtree(tmp_path / "checkpoints/1/params")
    with pytest.raises(UserError, match="was saved, but cannot be read back"):
        checkpoints.close()


def test_a_path_that_cannot_be_written_is_known_before(tmp_path, monkeypatch):
    from ddpm_jax.figures import Schedules

    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    for path in ("file/x.png", tmp_path / "file/deep/x.png"):
        for check in (check_writable, lambda out: Schedules(out=str(out)).path()):
            with pytest.raises(UserError, match=r"file/.*x\.png: cannot be written .*is no folder"):
                check(path)
    for path in ("x.png", tmp_path / "new/deep/x.png", "gs://bucket/x.png"):
        check_writable(path)
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"^x\.png: cannot be written \(no right"):
        check_writable("x.png")


def test_a_file_with_the_longest_name_is_written_whole(tmp_path):
    name = "é" * 127
    write_file(tmp_path / name, b"all")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == {
        name: b"all"
    }
