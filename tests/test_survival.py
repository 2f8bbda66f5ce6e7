"""Runs survive damaged checkpoints, a full or read-only disk, a second start, hostile files."""

import contextlib
import errno
import json
import logging
import os
import resource
import shutil
import subprocess
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import files_of, lines, messages, on_one_device
from crashtest import crashtest
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp
from test_train import assert_equal_trees

from ddpm_jax import UserError, fit, load
from ddpm_jax.devices.mesh import make_mesh, replicated
from ddpm_jax.storage import checkpoint
from ddpm_jax.storage import checksum as checksum_file
from ddpm_jax.storage.checksum import checksum, checksums
from ddpm_jax.storage.files import append_line, locked
from ddpm_jax.training import train
from ddpm_jax.training.logs import RunLog, _TensorBoard


@pytest.fixture(scope="module")
def quiet_config(tiny):
    return on_one_device(tiny, train={"log_every": 1, "eval_every": 0})


@pytest.fixture(scope="module")
def whole(quiet_config, pictures, tmp_path_factory):
    """A run of 4 steps with checkpoints 2 and 4; copy it before it is damaged."""
    folder = tmp_path_factory.mktemp("survival") / "whole"
    fit(quiet_config, folder, pictures)
    return folder


@pytest.fixture
def run(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture
def small_disk(tmp_path):
    """A filesystem of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    # Lazily: what still looks at a file in it, an indexer, say, does not hold it.
    subprocess.run(["umount", "-l", folder], check=True)


def data_file(part: Path) -> Path:
    """The largest file with arrays of a part of a checkpoint."""
    return max((part / "d").iterdir(), key=lambda path: path.stat().st_size)


def truncate(part):
    file = data_file(part)
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(part):
    file = data_file(part)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def forget_metadata(part):
    (part.parent / "_CHECKPOINT_METADATA").write_text("{")


def test_the_checksum_is_the_same_on_any_mesh(rng):
    tree = {
        "a": rng.normal(size=(8, 3)).astype(np.float32),
        "b": rng.normal(size=(2, 4, 4)).astype(np.float32),
    }
    tree |= {
        "c": np.int32(7),
        "d": np.float64([1.5]),
        "e": np.arange(9, dtype=np.uint8),
        "f": np.array([True, False]),
    }
    tree["g"] = jnp.arange(6, dtype=jnp.bfloat16)
    expected = checksum(tree)
    mesh = make_mesh(4)
    assert checksum(jax.device_put(tree, replicated(mesh))) == expected
    sharded = tree | {
        name: jax.device_put(tree[name], NamedSharding(mesh, spec))
        for name, spec in {"a": PartitionSpec("data"), "b": PartitionSpec(None, "data")}.items()
    }
    assert checksum(sharded) == expected


def in_numpy(x):
    """The sum of an array of 4-byte elements: of MurmurHash3's finaliser, of bits and place."""
    h = x.view(np.uint32).ravel() + 2 * np.arange(x.size, dtype=np.uint32) * np.uint32(0x9E3779B1)
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return np.sum(h ^ (h >> 16), dtype=np.uint32)


def test_all_checksums_of_a_save_are_one_program_a_device(rng, monkeypatch):
    """The numbers that NumPy gets, in the order of the arrays, wherever pieces of them are."""
    calls = []
    sums_of = checksum_file._sums_of

    def counted(pieces, starts, shapes):
        calls.append(len(pieces))
        return sums_of(pieces, starts, shapes)

    monkeypatch.setattr(checksum_file, "_sums_of", counted)
    shapes = [(4, 3), (8,), (4, 3), (), (4, 3), (2, 4, 4), (8,)]
    a = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    parts = {"b": a, "a": {"y": a[0], "x": a[5]}}
    expected = {
        "b": zlib.crc32(np.array([in_numpy(x) for x in a], "<u4").tobytes()),
        "a": zlib.crc32(np.array([in_numpy(a[5]), in_numpy(a[0])], "<u4").tobytes()),
    }
    for most in (2**26, 100):  # Bytes in a stack: all arrays of a shape, and two of the first.
        monkeypatch.setattr(checksum_file, "STACKED", most)
        sums_of.clear_cache()
        calls.clear()
        assert checksums(parts) == expected
        assert calls == [9]
    mesh = make_mesh(4)
    parts["b"][0] = jax.device_put(a[0], NamedSharding(mesh, PartitionSpec("data")))
    parts["b"][5] = jax.device_put(a[5], NamedSharding(mesh, PartitionSpec(None, "data")))
    calls.clear()
    assert checksums(parts) == expected
    assert calls == [9, 2, 2, 2]


def test_the_checksum_sees_any_bit_and_any_place(rng):
    x = rng.normal(size=(4, 6)).astype(np.float32)
    seen = {checksum(x)}
    for bit in range(32):  # Of every third element, and each sign twice over.
        bits = x.view(np.uint32).copy()
        bits.flat[bit % 24] ^= np.uint32(1 << bit)
        seen.add(checksum(bits.view(np.float32)))
    seen |= {checksum(x * sign) for sign in (-1, np.float32([1, 1, -1, -1, 1, 1]))}
    seen |= {
        checksum(x[::-1].copy()),
        checksum(x[:, ::-1].copy()),
        checksum(x.T.copy()),
        checksum(np.zeros_like(x)),
    }
    assert len(seen) == 1 + 32 + 2 + 4
    assert checksum([x, x + 1]) != checksum([x + 1, x])


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, forget_metadata, shutil.rmtree])
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_is_used(run, damage, caplog):
    older = load(run, step=2)[1]
    damage(run / "checkpoints/4/ema_params")
    before = files_of(run)
    with caplog.at_level(logging.WARNING):
        assert_equal_trees(load(run)[1], older)
    (message,) = messages(caplog)
    assert message.startswith(f"{run / 'checkpoints/4'}: damaged (")
    assert message.endswith("), using checkpoint 2 instead") and files_of(run) == before
    with pytest.raises(UserError, match=r"no checkpoint can be used \(4: "):
        load(run, step=4)


def test_a_run_goes_on_from_before_a_damaged_checkpoint(run, whole, quiet_config, pictures, caplog):
    flip_a_bit(run / "checkpoints/4/opt_state")
    (run / "checkpoints/4.damaged").mkdir()  # It has happened before.
    caplog.clear()
    fit(quiet_config, run, pictures)
    (message,) = messages(caplog)
    assert "checkpoint 4 is damaged (" in message
    assert "renamed to 4.damaged-2, resuming from checkpoint 2" in message
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"2", "4", "4.damaged", "4.damaged-2"}
    for weights in ("raw", "ema"):
        assert_equal_trees(load(run, weights=weights)[1], load(whole, weights=weights)[1])
    keep = ("step", "loss", "grad_norm")
    assert [[line[name] for name in keep] for line in lines(run)] == [
        [line[name] for name in keep] for line in lines(whole)
    ]


def test_where_all_are_damaged_nothing_is_changed(run, quiet_config, pictures):
    for step in (2, 4):
        truncate(run / f"checkpoints/{step}/params")
    before = {
        path: content
        for path, content in files_of(run).items()
        if path.name not in ("run.json", "config.json")
    }
    with pytest.raises(
        UserError, match=r"no checkpoint can be used \(4: .*; 2: .*\); nothing was changed"
    ):
        fit(quiet_config, run, pictures)
    after = files_of(run)
    assert all(after[path] == content for path, content in before.items())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"shape": [2**40]},
            r"is float32 of shape \(1099511627776,\), "
            r"but must be float32 of shape \(4,\) by the run's config",
        ),
        ({"data_type": "float64"}, r"is float64 of shape \(4,\)"),
        (
            {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2**40]}}},
            "pieces larger than itself",
        ),
        (None, "stem.bias is not there"),
    ],
)
def test_what_a_checkpoint_claims_is_checked_before_memory_is_taken(run, change, says, monkeypatch):
    import tensorstore as ts

    part = run / "checkpoints/4/ema_params"
    store = ts.KvStore.open(f"file://{part}/|ocdbt:").result()
    if change:
        (name,) = [key for key in store.list().result() if key.endswith(b"stem.bias/zarr.json")]
        claim = json.loads(store.read(name).result().value) | change
        if "chunk_grid" in change:
            claim["codecs"][0]["configuration"]["chunk_shape"] = [2**40]
        store.write(name, json.dumps(claim)).result()
    else:
        metadata = json.loads((part / "_METADATA").read_text())
        del metadata["tree_metadata"]["('stem', 'bias')"]
        (part / "_METADATA").write_text(json.dumps(metadata))
    monkeypatch.setattr(ocp, "load_checkpointables", lambda *_: pytest.fail("memory was taken"))
    with pytest.raises(UserError, match=says):
        load(run, step=4)


def test_a_checkpoint_that_may_be_whole_is_not_called_damaged(run, monkeypatch):
    """Memory that does not suffice, or a store that does not answer, says nothing of the files."""
    crowded = ValueError("a file cannot be opened")
    crowded.__cause__ = OSError(errno.EMFILE, "Too many open files")
    for error in (
        MemoryError("no more"),
        ValueError("UNAVAILABLE: storage.example.com"),
        crowded,
    ):
        monkeypatch.setattr(
            ocp,
            "load_checkpointables",
            lambda *_, error=error: (_ for _ in ()).throw(error),
        )
        words = r"checkpoints/4: cannot be read now \((no more|UNAVAILABLE|.*Too many open files)"
        with pytest.raises(UserError, match=words):
            load(run)


def test_a_run_is_trained_by_one_process_at_a_time(run, quiet_config, pictures):
    before = files_of(run)
    with locked(run):
        with pytest.raises(
            UserError, match=rf"{run}: process {os.getpid()} on .* is training here"
        ):
            fit(quiet_config, run, pictures)
        assert {
            path: content for path, content in files_of(run).items() if path.name != ".lock"
        } == {path: content for path, content in before.items() if path.name != ".lock"}
        load(run)  # Reading is free.
    fit(quiet_config, run, pictures)


def test_a_full_disk_is_told_and_damages_nothing(small_disk, quiet_config, pictures, whole):
    run = small_disk / "run"
    fit(on_one_device(quiet_config, train={"steps": 2}), run, pictures)
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "filler").write_bytes(
        bytes(free - 64 * 1024)
    )  # Enough for lines, not for a checkpoint.
    with pytest.raises(
        UserError,
        match=r"a checkpoint cannot be saved \(.*[Nn]o space.*\); the last good checkpoint is 2",
    ):
        fit(quiet_config, run, pictures)
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4]
    assert load(run)[1]["stem"]["kernel"].shape[-1] == 4

    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "more").write_bytes(bytes(free))
    config = (run / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"run.json: cannot be written \(No space left on device\)"):
        fit(quiet_config, run, pictures)
    assert (run / "config.json").read_bytes() == config and json.loads(
        (run / "run.json").read_text()
    )

    for name in ("filler", "more"):
        (small_disk / name).unlink()
    fit(quiet_config, run, pictures)
    assert_equal_trees(load(run)[1], load(whole)[1])
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "4"]


def test_a_read_only_run_can_be_read_and_not_trained(small_disk, whole, quiet_config, pictures):
    run = shutil.copytree(whole, small_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match=r"run: cannot be written \(Read-only file system\)"):
        fit(quiet_config, run, pictures)
    assert_equal_trees(load(run)[1], load(whole)[1])


@contextlib.contextmanager
def file_limit(size):
    """Limits files to `size` bytes. Writing more is an error, for pytest's own output too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
    append_line(tmp_path / "lines", b"first\n")
    with (
        file_limit(10),
        pytest.raises(UserError, match=r"lines: cannot be written \(File too large\)"),
    ):
        append_line(tmp_path / "lines", b"the second\n")
    assert (tmp_path / "lines").read_bytes() == b"first\n"


# It lets go of a file whose last bytes cannot be written.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_what_tensorboard_cannot_write_is_told_once_and_stops_nothing(tmp_path, caplog):
    from tensorboardX import summary

    board = _TensorBoard(tmp_path, 0)
    with file_limit(100), caplog.at_level(logging.WARNING):
        for step in range(100):
            board.add(step, summary.image("x", np.zeros((8, 8, 3), np.uint8), dataformats="HWC"))
        board.add(
            100,
            summary.image(
                "x",
                np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8),
                dataformats="HWC",
            ),
        )
        board.add(101, summary.scalar("y", 1.0))
        board.close()
    assert messages(caplog) == [
        f"{tmp_path / 'tensorboard'}: cannot be written (File too large); "
        "TensorBoard logging stops, training continues"
    ]


def test_damaged_lines_of_metrics_are_set_aside(tmp_path, caplog):
    good = [json.dumps({"step": step, "loss": 0.5}).encode() + b"\n" for step in range(1, 7)]
    bad = [b'{"step": 2, "lo\x00\xff\n', b"17\n"]
    (tmp_path / "metrics.jsonl").write_bytes(
        b"".join([good[0], bad[0], *good[2:4], bad[1], *good[4:], b'{"step": 7'])
    )
    with caplog.at_level(logging.WARNING):
        RunLog(tmp_path, 5, 10).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join([good[0], *good[2:5]])
    assert (tmp_path / "metrics.damaged").read_bytes() == b"".join(bad)
    (message,) = messages(caplog)
    assert "2 damaged lines were moved to metrics.damaged" in message


def test_what_was_learned_is_saved_before_pictures_are_drawn(tiny, pictures, tmp_path, monkeypatch):
    """A supervisor kills what does not end soon after its SIGTERM, and drawing may take minutes."""
    saved = []
    monkeypatch.setattr(
        checkpoint.Checkpoints, "save", lambda self, step, parts: saved.append(step)
    )
    monkeypatch.setattr(
        train, "_pictures", lambda *_: saved.append("drawn") or np.zeros((1, 8, 8, 1))
    )
    fit(
        on_one_device(
            tiny, train={"steps": 3, "sample_every": 2, "eval_every": 0}, checkpoint={"every": 9}
        ),
        tmp_path,
        pictures,
    )
    assert saved == [2, "drawn", 3, "drawn"]


@pytest.mark.slow
def test_kills_change_nothing(tmp_path):
    """A short form of scripts/crashtest.sh."""
    crashtest(tmp_path, kills=4, saving=2, steps=48, seed=0)
