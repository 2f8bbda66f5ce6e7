"""Real data sets through tfds, and killed worker processes; run by scripts/test_slow.sh."""

import gzip
import hashlib
import importlib.util
import io
import os
import select
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import HANG, QUICK, compiled_once, finish, lines, read_until, started
from PIL import Image

from ddpm_jax.config import Data
from ddpm_jax.data import decode_all, load_source
from ddpm_jax.data.decode_process import DecodeProcesses

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
FASHION_MNIST = ROOT.parent / "shared/data/fashion_mnist"
COMMAND = [sys.executable, "-m", "ddpm_jax"]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
}
needs_tensorflow = pytest.mark.skipif(
    not importlib.util.find_spec("tensorflow"), reason="needs the extra tfds-prepare (TensorFlow)"
)

READ = """
import sys, numpy as np
from ddpm_jax.data import load_source
def read(data, out, test):
    source = load_source(data, test=test)
    images = source.read(np.arange(len(source)))
    np.savez(out, images=images, labels=source.labels, fingerprint=source.fingerprint)
"""
WITHOUT_TENSORFLOW = """
import sys
from prepared import NoTensorFlow
sys.meta_path.insert(0, NoTensorFlow())
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory, monkeypatch):
    """tensorflow_datasets leaves folders in the temporary one: they go with the test's."""
    monkeypatch.setitem(ENVIRONMENT, "TMPDIR", str(tmp_path_factory.mktemp("temporary")))


def python(program):
    """What a program on its own writes to stderr."""
    done = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def idx(file):
    """The array of a gzipped idx file."""
    content = gzip.decompress(file.read_bytes())
    shape = np.frombuffer(content, ">i4", content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def in_order(images, labels):
    """Both, sorted by the images' bytes: tfds shuffles."""
    order = sorted(range(len(images)), key=lambda i: images[i].tobytes())
    return images[order], labels[order]


@needs_tensorflow
@pytest.mark.skipif(not FASHION_MNIST.exists(), reason="needs fashion_mnist's original files")
def test_the_real_fashion_mnist_is_read_without_tensorflow(tmp_path):
    data = (
        "from ddpm_jax.config import Data\n"
        "data = Data(source='tfds:fashion_mnist', test='tfds:fashion_mnist', "
        f"dir={str(tmp_path / 'tfds')!r}, manual_dir={str(FASHION_MNIST)!r}, "
        "image_shape=(28, 28, 1))\n"
    )
    python(READ + data + f"read(data, {str(tmp_path / 'train.npz')!r}, False)")
    prepared = np.load(tmp_path / "train.npz")
    (
        tmp_path / "tfds/fashion_mnist/3.0.1/ddpm_jax-train-28x28x1.npz"
    ).unlink()  # What was decoded there.
    for split, prefix in [("train", "train"), ("test", "t10k")]:
        out = tmp_path / f"{split}2.npz"
        python(WITHOUT_TENSORFLOW + READ + data + f"read(data, {str(out)!r}, {split == 'test'})")
        read = np.load(out)
        images, labels = (
            idx(FASHION_MNIST / f"{prefix}-images-idx3-ubyte.gz"),
            idx(FASHION_MNIST / f"{prefix}-labels-idx1-ubyte.gz"),
        )
        assert read["images"].shape == (*images.shape, 1)
        for one, other in zip(
            in_order(read["images"][..., 0], read["labels"]), in_order(images, labels), strict=True
        ):
            np.testing.assert_array_equal(one, other)
        if split == "train":
            for name in prepared:
                np.testing.assert_array_equal(read[name], prepared[name])


def fake_cifar10(file):
    """Writes an archive in CIFAR-10's binary format.

    Returns {"train": images [50,32,32,3], "test": images [10,32,32,3]}.
    """
    rng = np.random.default_rng(0)
    parts = {f"data_batch_{i}.bin": "train" for i in range(1, 6)} | {"test_batch.bin": "test"}
    images = {"train": [], "test": []}
    with tarfile.open(file, "w:gz") as archive:

        def add(name, content):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

        for name, split in parts.items():
            records = rng.integers(0, 256, (10, 3073), dtype=np.uint8)
            records[:, 0] = np.arange(10)
            images[split].append(records[:, 1:].reshape(10, 3, 32, 32).transpose(0, 2, 3, 1))
            add(name, records.tobytes())
        add("batches.meta.txt", "\n".join("abcdefghij").encode())
    return {split: np.concatenate(some) for split, some in images.items()}


@needs_tensorflow
def test_cifar10_as_its_config_names_it_is_prepared_from_its_archive(tmp_path):
    archive = tmp_path / "cifar-10-binary.tar.gz"
    originals = fake_cifar10(archive)
    size, checksum = archive.stat().st_size, hashlib.sha256(archive.read_bytes()).hexdigest()

    def program(place, checksum, split):
        return READ + (
            "import dataclasses, tensorflow_datasets as tfds\n"
            "from tensorflow_datasets.core.download.checksums import UrlInfo\n"
            "from ddpm_jax.config import load_config\n"
            f"info = UrlInfo(size={size}, checksum={checksum!r}, "
            "filename='cifar-10-binary.tar.gz')\n"
            "urls = {'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz': info}\n"
            "tfds.builder_cls('cifar10').url_infos = urls\n"
            "data = dataclasses.replace(load_config('cifar10').data, "
            f"dir={str(tmp_path / place)!r}, manual_dir={str(tmp_path)!r})\n"
            "from ddpm_jax.errors import UserError\n"
            "try:\n"
            f"    read(data, {str(tmp_path / split)!r}, {split == 'test'})\n"
            "except UserError as error:\n"
            "    print('REFUSED', error, file=sys.stderr)\n"
        )

    for split in ("train", "test"):
        python((WITHOUT_TENSORFLOW if split == "test" else "") + program("good", checksum, split))
        read = np.load(tmp_path / f"{split}.npz")
        labels = np.tile(np.arange(10), len(originals[split]) // 10)
        there, expected = (
            in_order(read["images"], read["labels"]),
            in_order(originals[split], labels),
        )
        np.testing.assert_array_equal(there[0], expected[0])
        np.testing.assert_array_equal(there[1], expected[1])
    assert [path.name for path in (tmp_path / "good/downloads").iterdir()] == ["cifar10_3.0.2"]
    refusal = python(program("bad", "0" * 64, "train")).partition("REFUSED ")[2].strip()
    assert refusal.startswith("data: tfds:cifar10 cannot be prepared (") and "\n" not in refusal
    assert not (tmp_path / "bad/cifar10/3.0.2").exists()


@needs_tensorflow
def test_celeba_hq_as_its_config_names_it_is_prepared_from_its_archive(tmp_path, rng):
    data = (
        "import dataclasses\nfrom ddpm_jax.config import load_config\n"
        "data = dataclasses.replace(load_config('celebahq256').data, "
        f"dir={str(tmp_path / 'tfds')!r}, cache_mb=0, "
    )
    refused = data + (
        f"manual_dir={str(tmp_path)!r})\ntry:\n    load_source(data)\nexcept ValueError as error:\n"
    )
    refusal = (
        python(READ + refused + "    print('REFUSED', error, file=sys.stderr)\n")
        .partition("REFUSED ")[2]
        .strip()
    )
    assert (
        "set --data.manual-dir to a folder with its original files" in refusal
        and "\n" not in refusal
    )

    images = rng.integers(0, 256, (3, 256, 256, 3), dtype=np.uint8)
    with tarfile.open(tmp_path / "data256x256.tar", "w") as archive:
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / f"{i}.png")
            archive.add(tmp_path / f"{i}.png", f"data256x256/{i}.png")
    python(READ + data + f"manual_dir={str(tmp_path)!r})\nload_source(data)\n")
    out = tmp_path / "read.npy"
    read = (
        f"source = load_source(data)\nnp.save({str(out)!r}, source.read(np.arange(3)))\n"
        "assert source.streamed"
    )
    python(WITHOUT_TENSORFLOW + READ + data + ")\n" + read)
    assert sorted(map(bytes, np.load(out))) == sorted(map(bytes, images))


CONFIG = """
from ddpm_jax.config import *
CONFIG = Config(
    model=Model(base_channels=4, channel_multipliers=(1,), num_res_blocks=1,
                attention_resolutions=(), norm_groups=2),
    diffusion=Diffusion(num_timesteps=10, beta_start=0.01, beta_end=0.5),
    data=Data(source="folder:images", image_shape=(8, 8, 3), cache_mb=0, workers=2),
    train=Train(steps=1_000_000, batch_size=8, log_every=1, eval_every=0, num_samples=4),
    checkpoint=Checkpoint(every=1000),
)
"""


@pytest.fixture
def place(tmp_path, rng):
    """A folder with images and a config that streams them with two workers."""
    (tmp_path / "images").mkdir()
    for i in range(64):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(
            tmp_path / f"images/{i}.png"
        )
    (tmp_path / "streamed.py").write_text(CONFIG)
    return tmp_path


def train(place, *options, workdir="run"):
    """A started program, in a process group of its own."""
    command = [*COMMAND, "train", "streamed.py", "--workdir", workdir, *options]
    environment = {**os.environ, "XLA_FLAGS": QUICK, **compiled_once(place / "xla")}
    return started(command, cwd=place, env=environment, start_new_session=True)


@pytest.mark.parametrize("is_killed", [False, True])
def test_processes_decode_a_folder_and_end(place, monkeypatch, is_killed):
    """Those of `decode_process`, which few images do not start."""
    monkeypatch.setattr(decode_all, "MANY", 1)
    monkeypatch.setattr(decode_all.os, "sched_getaffinity", lambda of: {0, 1})

    def can_be_read(socket):
        return select.select([socket], [], [], 0)[0]

    processes, answered = [], []
    try_some = DecodeProcesses.try_some

    def try_when_there(self, names):
        processes.append(self._process)
        while not all(line.is_used or can_be_read(line._socket) for line in self._lines):
            time.sleep(0.01)
        images = try_some(self, names)
        answered.append(images)
        if is_killed:
            os.killpg(self._process.pid, signal.SIGKILL)
        return images

    monkeypatch.setattr(DecodeProcesses, "try_some", try_when_there)
    data = Data(source=f"folder:{place}/images", image_shape=(8, 8, 3), disk_cache_mb=0)
    found = load_source(data)
    assert processes[0].returncode == (-signal.SIGKILL if is_killed else 0)
    assert any(answered) and all(answered) != is_killed
    monkeypatch.setattr(decode_all, "MANY", 10**9)
    plain = load_source(data)
    assert found.fingerprint == plain.fingerprint
    np.testing.assert_array_equal(found.read(np.arange(64)), plain.read(np.arange(64)))


def losses(place, workdir="run"):
    return {line["step"]: line["loss"] for line in lines(place / workdir)}


def children(program):
    """{number: command} of its processes."""
    lists = Path(f"/proc/{program.pid}/task").glob("*/children")  # Of each thread its own.
    numbers = [int(number) for file in lists for number in file.read_text().split()]
    return {number: Path(f"/proc/{number}/cmdline").read_text() for number in numbers}


def workers_of(program):
    """{number: descriptor} of its workers, once it has trained a few steps.

    A descriptor can be read when its process has ended.
    """
    for _ in range(5):
        read_until(program, "/1000000")
    names = children(program)
    workers = {number: os.pidfd_open(number) for number in names if "spawn_main" in names[number]}
    assert len(workers) == 2, names
    return workers


def wait_until_gone(workers):
    for descriptor in workers.values():
        assert select.select([descriptor], [], [], HANG)[0], "workers outlive their program"
        os.close(descriptor)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_a_streamed_run_survives_signals_and_killed_workers(place):
    # Ctrl-C and a job manager's SIGTERM reach the workers too: the program saves as ever.
    for number in (signal.SIGINT, signal.SIGTERM):
        with train(place) as program:
            workers = workers_of(program)
            os.killpg(program.pid, number)
            code, said = finish(program)
        assert code == 0 and "run the same command to resume" in said, said
        assert "Traceback" not in said, said
        wait_until_gone(workers)

    with train(place) as program:
        workers = workers_of(program)
        os.kill(min(workers), signal.SIGKILL)
        code, said = finish(program)
    assert code == 2 and "ddpm-jax: data: a process that reads images has died" in said, said
    wait_until_gone(workers)

    with train(place) as program:
        workers = workers_of(program)
        program.kill()
        wait_until_gone(workers)

    steps = 3 + max(int(path.name) for path in (place / "run/checkpoints").iterdir())
    for workdir, workers in (("run", "2"), ("whole", "0")):
        options = ["--train.steps", str(steps), "--data.workers", workers]
        with train(place, *options, workdir=workdir) as program:
            code, said = finish(program)
        assert code == 0, said
    assert losses(place) == losses(place, "whole")


LARGE = """
import re, sys
from pathlib import Path
import numpy as np
from ddpm_jax.config import Data
from ddpm_jax.data import load_source, open_batches, split
from ddpm_jax.data.scaled import scaled
from ddpm_jax.data.survey import with_units
data = Data(
    source=f"npy:{sys.argv[1]}", image_shape=(128, 128, 5), values="standardise", cache_mb=256
)
source = load_source(data)
train, held_out = split(source, 0.1)
source = scaled(source, with_units(data, source, train))
batches = open_batches(source, train, 16, 0, data)
sums = sum(batches.batch_at(step).image.sum(dtype=np.float64) for step in range(len(train) // 16))
batches.close()
highest = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(int(highest[1]) / 1024, sums / (len(train) // 16 * 16 * 128 * 128 * 5), file=sys.stderr)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_2_gb_of_fields_take_less_than_1_gb_of_memory(tmp_path):
    """All that is done with them: the fingerprint, the statistics, and an epoch of batches.

    On the disk lie 16 MB: the other images are holes in the file, so zeros.
    """
    header = {"descr": "<f4", "fortran_order": False, "shape": (6600, 128, 128, 5)}
    with open(tmp_path / "x.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        some = np.random.default_rng(0).normal(size=(50, 128, 128, 5)).astype(np.float32)
        some.tofile(file)
        file.truncate(file.tell() + (6600 - 50) * 128 * 128 * 5 * 4)
    done = subprocess.run(
        [sys.executable, "-c", LARGE, str(tmp_path / "x.npy")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    memory, mean = map(float, done.stderr.split()[-2:])
    assert memory < 1000
    assert abs(mean) < 0.01  # It is zero over all of the epoch, but for the last few images.
