"""A run on gs://: epath's own backend for it, over a bucket that lies in memory here."""

import io
import json
import signal

import fsspec
import numpy as np
import pytest
from conftest import refused, with_source
from etils import epath
from etils.epath import backend, gpath
from PIL import Image

from ddpm_jax import fit, load
from ddpm_jax.cli import main
from ddpm_jax.data import Batches
from ddpm_jax.errors import UserError
from ddpm_jax.storage import checkpoint, restore
from ddpm_jax.storage.files import write_file


class Bucket(fsspec.AbstractFileSystem):
    """A bucket as gcsfs shows it: whole objects by name, and no appending.

    Its only folders are parts of the objects' names.
    """

    protocol = ("gs", "gcs")
    cachable = False

    def __init__(self):
        super().__init__()
        self.objects = {}

    def ls(self, path, detail=True, **_):
        path = self._strip_protocol(path)
        prefix, found = f"{path}/" if path else "", {path: "file"} if path in self.objects else {}
        for name in self.objects:
            if name.startswith(prefix):
                child, slash, _ = name.removeprefix(prefix).partition("/")
                # The object PATH/ is an empty folder of the web console. gcsfs lists it as PATH.
                found[f"{prefix}{child}".rstrip("/")] = (
                    "directory" if slash or not child else "file"
                )
        if not found:
            raise FileNotFoundError(path)
        entries = [
            {"name": name, "type": kind, "size": len(self.objects.get(name, b""))}
            for name, kind in found.items()
        ]
        return entries if detail else sorted(found)

    def mkdir(self, path, **_):
        pass

    makedirs = mkdir

    def _open(self, path, mode="rb", **_):
        if mode == "wb":
            return Upload(self.objects, path)
        if mode != "rb":
            raise NotImplementedError(f"{mode}: objects are whole")
        if path not in self.objects:
            raise FileNotFoundError(path)
        return io.BytesIO(self.objects[path])


class Upload(io.BytesIO):
    """An object that is there once it is closed."""

    def __init__(self, objects, name):
        super().__init__()
        self.objects, self.name = objects, name

    def close(self):
        if not self.closed:
            self.objects[self.name] = self.getvalue()
        super().close()


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """An empty bucket behind every gs:// path, and a working directory that must stay empty."""
    here, stub = tmp_path / "here", Bucket()
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(
        gpath, "_is_tf_installed", lambda: False
    )  # TensorFlow has a backend of its own.
    monkeypatch.setattr(backend.fsspec_backend, "fs", lambda path: stub)
    yield stub
    assert not list(here.iterdir())


def names(bucket, folder):
    return {
        name.removeprefix(f"{folder}/") for name in bucket.objects if name.startswith(f"{folder}/")
    }


def test_a_run_in_a_bucket_trains_resumes_and_is_measured(
    tiny, pictures, bucket, monkeypatch, tmp_path
):
    # Orbax and TensorStore write to gs:// through a driver in C++, past epath. Their files are on
    # the disk here.
    for module in (checkpoint, restore):
        monkeypatch.setattr(module, "folder_of", lambda _: epath.Path(tmp_path / "checkpoints"))
    config = with_source(tiny, pictures, tmp_path, train={"eval_every": 0})
    run, batch_at = "gs://bucket/runs/tiny", Batches.batch_at
    bucket.objects["bucket/runs/tiny/"] = b""

    def stops_after_2(batches, step):
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
        return batch_at(batches, step)

    with monkeypatch.context() as context:
        context.setattr(Batches, "batch_at", stops_after_2)
        assert int(fit(config, run).step) == 2
    assert int(fit(config, run).step) == 4
    there = names(bucket, "bucket/runs/tiny")
    assert {
        "config.json",
        "run.json",
        "metrics.jsonl",
        "samples.png",
        "samples/00000004.png",
    } <= there
    lines = [
        json.loads(line) for line in bucket.objects["bucket/runs/tiny/metrics.jsonl"].splitlines()
    ]
    assert [line["step"] for line in lines] == [2, 4]
    events = [
        bucket.objects[f"bucket/runs/tiny/{name}"]
        for name in there
        if name.startswith("tensorboard/")
    ]
    assert all(b"grad_norm" in content for content in events) and any(
        b"\x89PNG" in content for content in events
    )
    assert Image.open(io.BytesIO(bucket.objects["bucket/runs/tiny/samples.png"])).size[0] > 100
    assert load(run)[0].config == config

    assert main(["likelihood", run]) == 0
    folder = "likelihood/holdout-00000004-ema-seed0"
    summary = json.loads(bucket.objects[f"bucket/runs/tiny/{folder}/likelihood.json"])
    assert summary["run"] == run and np.isfinite(summary["total"])
    assert main(["sample", run, "-n", "2", "--out", "gs://bucket/x.npz"]) == 0
    with np.load(io.BytesIO(bucket.objects["bucket/x.npz"])) as arrays:
        assert arrays["images"].shape == (2, 8, 8, 1)
    assert main(["sample", run, "-n", "2", "--out", "gs://bucket/x/"]) == 0
    assert names(bucket, "bucket/x") == {"samples.json", "000000.png", "000001.png"}
    assert main(["report", run, "--out", "gs://bucket/x.html"]) == 0
    page = bucket.objects["bucket/x.html"].decode()
    assert f"at most {summary['total']:.3f}" in page and f"ddpm-jax evaluate {run} -n 48" in page
    assert "data:image/webp" in page and "t = 10 of 10, pure noise" in page


def test_a_figure_goes_into_a_bucket(bucket):
    assert (
        main(
            [
                "figure",
                "schedule",
                "--num-timesteps",
                "20",
                "--out",
                "gs://bucket/figures/schedule.png",
            ]
        )
        == 0
    )
    assert Image.open(io.BytesIO(bucket.objects["bucket/figures/schedule.png"])).size[0] > 100
    with np.load(io.BytesIO(bucket.objects["bucket/figures/schedule.npz"])) as arrays:
        assert arrays["linear_snr"].shape == (20,)


def test_a_file_in_a_bucket_is_replaced_whole_or_stays(bucket, monkeypatch):
    for content in (b"first", b"second"):
        write_file("gs://bucket/a/file", content)
    assert bucket.objects == {"bucket/a/file": b"second"}

    def fails(upload):
        raise OSError("no connection")

    monkeypatch.setattr(Upload, "close", fails)
    with pytest.raises(UserError, match=r"gs://bucket/a/file: cannot be written .no connection."):
        write_file("gs://bucket/a/file", b"third")
    assert bucket.objects == {"bucket/a/file": b"second"}


def test_a_workdir_that_holds_something_else_is_refused_in_a_bucket_too(bucket, capsys):
    bucket.objects["bucket/photos/holiday.jpg"] = b""
    assert "not empty and not a run directory; choose another --workdir" in refused(
        capsys, "train", "digits", "--workdir", "gs://bucket/photos"
    )
    assert "not a model; name a run directory" in refused(capsys, "sample", "gs://bucket/photos")


def test_filesystems_that_are_not_installed_or_not_known_are_named(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)

    def missing(protocol, **_):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    backend.fsspec_backend._get_filesystem.cache_clear()
    for args in (["train", "digits", "--workdir"], ["sample"], ["likelihood"]):
        assert "pip install 'ddpm-jax[gcs]'" in refused(capsys, *args, "gs://bucket/run")
        said = refused(capsys, *args, "ftp://host/run")
        assert "ftp://host/run" in said and "gs://" in said
    assert not list(tmp_path.iterdir())
