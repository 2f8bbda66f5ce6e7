"""Files that were made to break their reader: one line, and no memory taken first."""

import io
import json
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import files_of
from etils import epath
from safetensors.numpy import save

from ddpm_jax import UserError, load
from ddpm_jax.config import Config, Data, Model, Train, from_dict
from ddpm_jax.data import from_array
from ddpm_jax.errors import one_line, shown
from ddpm_jax.evaluation.inception_weights import load_inception
from ddpm_jax.storage.checkpoint import Checkpoints
from ddpm_jax.storage.files import claim, parse_json, read_json, read_npz
from ddpm_jax.storage.restore import restore_part
from ddpm_jax.storage.run import data_fingerprint, read_config, start_run
from ddpm_jax.training.logs import _step_of
from ddpm_jax.weights.diffusers import is_diffusers, read_diffusers

SAVED = Path(__file__).parent / "data/run_0_1"
DEEP = b"[" * 200_000
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\n"
    b"size 143011364\n"
)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (DEEP, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b"[" * 60 + b"]" * 60, "nested too deeply"),
        (b"9" * 5000, "digits"),
        (b" " * (2**24 + 1), "too long"),
        (b"\xff\xfe\x00", "decode"),
        (b'{"a": 1', "delimiter"),
        (b"", "Expecting value"),
        (POINTER, "git lfs pull"),
    ],
    ids=["lists", "tables", "60 deep", "digits", "long", "bytes", "cut", "empty", "pointer"],
)
def test_json_that_is_none_is_one_line(tmp_path, content, says):
    with pytest.raises(ValueError, match=says):
        parse_json(content)
    file = epath.Path(tmp_path / "x.json")
    file.write_bytes(content)
    with pytest.raises(UserError, match=says) as told:
        read_json(file)
    assert str(told.value).startswith(f"{file}: cannot be read (")


def test_json_of_ours_is_read():
    value = {"a": [1, {"b": [None, 2.5, "é"]}], "c": True}
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(b"7") == 7


@pytest.mark.parametrize("name", ["config.json", "run.json"])
@pytest.mark.parametrize("content", [DEEP, b"[]", b"1", b'"x"', POINTER, b"\0\xff"], ids=ascii)
def test_a_run_whose_json_is_hostile_is_one_line(tmp_path, name, content):
    shutil.copytree(SAVED, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    (tmp_path / "run" / name).write_bytes(content)
    read = {"config.json": read_config, "run.json": data_fingerprint}[name]
    with pytest.raises(UserError, match=name):
        read(tmp_path / "run")


@pytest.mark.parametrize(
    "change",
    [{"starts": "x"}, {"starts": ["x"]}, {"data_fingerprint": 1}, {"init_from": 3}, {"images": []}],
)
def test_a_record_with_fields_of_other_kinds_is_refused_before_anything_is_written(
    tmp_path, change, tiny, pictures
):
    run = tmp_path / "run"
    shutil.copytree(SAVED, run, ignore=shutil.ignore_patterns("checkpoints"))
    record = json.loads((run / "run.json").read_text()) | change
    (run / "run.json").write_text(json.dumps(record))
    before = {path: content for path, content in files_of(run).items() if path.name != ".lock"}
    with (
        pytest.raises(UserError, match=f"not the record of a run, by its {next(iter(change))}"),
        start_run(run, tiny, from_array(pictures, (8, 8, 1)), "cpu"),
    ):
        pass
    after = files_of(run)
    assert {path: after[path] for path in before} == before


@pytest.mark.parametrize(
    ("group", "field", "value"),
    [
        ("model", "base_channels", 2**45),
        ("model", "base_channels", 1e400),
        ("model", "channel_multipliers", [2**45]),
        ("model", "channel_multipliers", [1] * 1000),
        ("model", "num_res_blocks", 2**31),
        ("model", "dropout", float("nan")),
        ("model", "norm_groups", 10**4000),
        ("data", "image_shape", [10**9, 10**9, 3]),
        ("data", "image_shape", [65_536, 65_536, 65_536]),
        ("data", "workers", 10**9),
        ("diffusion", "num_timesteps", 10**12),
        ("train", "batch_size", 10**15),
        ("train", "num_samples", 10**15),
        ("train", "steps", 10**4000),
        ("train", "steps", "4"),
        ("optim", "learning_rate", 10**4000),
        ("model", "attention_resolutions", {"a": 1}),
        ("data", "source", "x" * 20_000),
    ],
)
def test_a_config_beyond_any_use_is_one_line(group, field, value):
    with pytest.raises(UserError, match=rf"{group}\.{field}") as told:
        from_dict({group: {field: value}})
    assert len(str(told.value)) < 1600 and str(told.value).isprintable()


def test_configs_of_real_use_are_taken():
    """ADM's and Imagen's widths, a long chain, a large batch and image."""
    Config(
        model=Model(
            base_channels=512,
            channel_multipliers=(1, 1, 2, 2, 4, 4, 8),
            num_res_blocks=8,
            attention_resolutions=(32, 16, 8),
        ),
        data=Data(image_shape=(2048, 2048, 4), workers=128),
        train=Train(steps=10**12, batch_size=65_536),
    )


def test_a_message_is_one_line_that_can_be_shown():
    told = UserError("a\nb\x1b[31m\0\udce9 é " + "x" * 10_000)
    assert str(told).isprintable() and len(str(told)) < 1600
    assert str(told).startswith(r"a\nb\x1b[31m\x00\udce9 é x")
    assert shown("x" * 500).endswith("x'") and len(shown("x" * 500)) < 90
    assert shown(10**5000) == "a whole number of 16610 bits"
    assert one_line("short", 80) == "short"
    with pytest.raises(UserError, match=r"a\\nb: unknown field"):
        from_dict({"a\nb": 1})


@pytest.mark.parametrize("content", [DEEP, b"[]", b"1"], ids=["deep", "list", "number"])
def test_a_label_that_is_none_is_one_line(tmp_path, content):
    (tmp_path / "label.json").write_bytes(content)
    with pytest.raises(UserError, match=r"label.json"):
        claim(epath.Path(tmp_path), "label.json", {"seed": 0})


def test_lines_of_metrics_that_are_hostile_are_damaged_lines():
    assert _step_of(DEEP) is None and _step_of(b'{"step": 3}') == 3


def npz_of(tmp_path, shape):
    """A file whose header claims `shape`, and that has four numbers."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": shape}
    )
    file = epath.Path(tmp_path / "x.npz")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", header.getvalue() + bytes(16))
    return file


@pytest.mark.parametrize("shape", [(2**40,), (2**20, 2**10), (-1,)])
def test_arrays_that_claim_more_than_the_file_take_no_memory(tmp_path, shape):
    file = npz_of(tmp_path, shape)
    for read in (read_npz, load_inception):
        with pytest.raises(UserError, match=r"too short|its shape is") as told:
            read(file)
        assert not isinstance(told.value.__cause__.__cause__, MemoryError)
    np.testing.assert_array_equal(read_npz(npz_of(tmp_path, (4,)))["a"], np.zeros(4))


def test_members_that_are_no_arrays_are_not_taken_for_some(tmp_path):
    file = epath.Path(tmp_path / "x.npz")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", b"bytes")
    assert read_npz(file) == {}
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", b"bytes")
    with pytest.raises(UserError, match=r"x\.npz: cannot be read as npz \(.*a.*\); delete it"):
        read_npz(file)


def safetensors_with(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


ENTRY = '{{"a": {{"dtype": "F32", "shape": {shape}, "data_offsets": {offsets}}}}}'
HOSTILE = {
    "empty": b"",
    "cut": b"\x08\0\0",
    "long header": struct.pack("<Q", 2**62) + b"{}",
    "deep": safetensors_with(DEEP),
    "metadata deep": safetensors_with(
        json.dumps({"__metadata__": {"ddpm_jax": DEEP.decode()}}).encode()
    ),
    "more than the file": safetensors_with(
        ENTRY.format(shape=[2**40], offsets=[0, 2**42]).encode()
    ),
    "overlapping": safetensors_with(
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
        b' "b": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}}',
        bytes(6),
    ),
    "pointer": POINTER,
    "metadata of another kind": save(
        {"a": np.ones(1, np.float32)}, {"ddpm_jax": '{"config": {}, "provenance": []}'}
    ),
    "weights of another kind": save(
        {"a": np.ones(1, np.float32)},
        {
            "ddpm_jax": '{"config": {}, "provenance": '
            '{"weights": [1], "step": "x", "data_fingerprint": {}}}'
        },
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_safetensors_are_one_line_in_every_reader(tmp_path, name):
    file = tmp_path / "model.safetensors"
    file.write_bytes(HOSTILE[name])
    for read in (load, load_inception):
        with pytest.raises(UserError, match=r"model\.safetensors: ") as told:
            read(file)
        assert ("git lfs pull" in str(told.value)) == (name == "pointer")


@pytest.mark.parametrize("content", [DEEP, POINTER, b"[]"], ids=["deep", "pointer", "list"])
@pytest.mark.parametrize("name", ["config.json", "scheduler_config.json", "model_index.json"])
def test_hostile_json_of_a_diffusers_folder_is_one_line(tmp_path, name, content):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    (tmp_path / name).write_bytes(content)
    assert is_diffusers(tmp_path) == (name != "config.json")
    with pytest.raises(UserError, match=name) as told:
        read_diffusers(tmp_path)
    assert ("git lfs pull" in str(told.value)) == (content == POINTER)


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_a_pointer_in_place_of_weights_gets_the_command(tmp_path, suffix):
    file = tmp_path / f"inception.{suffix}"
    file.write_bytes(POINTER)
    with pytest.raises(UserError, match="run `git lfs pull`"):
        load_inception(file)


TREE = {"kernel": np.ones(3, np.float32)}


def two_checkpoints(folder):
    checkpoints = Checkpoints(folder, 3)
    for step in (1, 2):
        checkpoints.save(step, {"params": TREE})
    checkpoints.close()


@pytest.mark.parametrize(
    "content",
    [DEEP, b"[]", b'{"metrics": 3}', b'{"commit_timestamp_nsecs": 1%s}' % (b"0" * 30)],
    ids=["deep", "list", "field", "time"],
)
def test_metadata_that_orbax_cannot_list_leave_the_other_checkpoint(tmp_path, content):
    two_checkpoints(tmp_path)
    (tmp_path / "checkpoints/2/_CHECKPOINT_METADATA").write_bytes(content)
    step, params = restore_part(tmp_path, "params", TREE)
    assert step == 1
    np.testing.assert_array_equal(params["kernel"], TREE["kernel"])
    checkpoints = Checkpoints(tmp_path, 3)
    checkpoints.restore({"params": TREE})
    checkpoints.save(2, {"params": TREE})
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "1",
        "2",
        "2.damaged",
    ]


def test_a_run_whose_checkpoints_are_all_damaged_is_left_as_it_is(tmp_path):
    two_checkpoints(tmp_path)
    for step, content in ((1, b'{"metrics": 3}'), (2, DEEP)):
        (tmp_path / f"checkpoints/{step}/_CHECKPOINT_METADATA").write_bytes(content)
    before = files_of(tmp_path)
    checkpoints = Checkpoints(tmp_path, 3)
    with pytest.raises(UserError, match="no checkpoint can be used"):
        checkpoints.restore({"params": TREE})
    checkpoints.close()
    assert files_of(tmp_path) == before


def test_an_older_one_with_such_metadata_is_set_aside(tmp_path):
    two_checkpoints(tmp_path)
    (tmp_path / "checkpoints/1/_CHECKPOINT_METADATA").write_bytes(DEEP)
    assert restore_part(tmp_path, "params", TREE)[0] == 2
    checkpoints = Checkpoints(tmp_path, 3)
    checkpoints.restore({"params": TREE})
    assert checkpoints.latest_step == 2
    checkpoints.close()
    assert (tmp_path / "checkpoints/1.damaged").is_dir()


def test_pointers_in_a_checkpoint_get_the_command_and_stay_where_they_are(tmp_path):
    two_checkpoints(tmp_path)
    for file in (tmp_path / "checkpoints/2/params").rglob("*"):
        if file.is_file():
            file.write_bytes(POINTER)
    with pytest.raises(UserError, match=r"checkpoints/2: holds git-lfs pointers.*`git lfs pull`"):
        restore_part(tmp_path, "params", TREE)
    assert (tmp_path / "checkpoints/2").is_dir()
