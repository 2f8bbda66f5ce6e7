"""Four fake CPU devices, strict shapes, and the tiny things that many tests share."""

import contextlib
import dataclasses
import gc
import importlib.metadata
import json
import logging
import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path

# scripts/test_gpu.sh sets another platform.
PLATFORMS = os.environ.get("DDPM_JAX_TEST_PLATFORMS", "cpu")
os.environ["JAX_PLATFORMS"] = PLATFORMS
# Compiled programs are kept from one run of the tests to the next, for each kind of CPU its own.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parent.parent / ".pytest_cache")
# All of them: another test, or the other process of pytest, compiles the same.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# In a job of a cluster the commands would look for the job's other processes.
for name in ("SLURM_JOB_ID", "JOB_COMPLETION_INDEX"):
    os.environ.pop(name, None)
# Compiling takes most of the time here: no optimisation in what tests compile themselves.
QUICK = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    QUICK += " --xla_cpu_use_fusion_emitters=false"  # Halves it; jax 0.11 does not know the flag.
    QUICK += " --xla_cpu_parallel_codegen_split_count=1"  # Tiny programs: their code in one piece.
FLAGS = f"--xla_force_host_platform_device_count=4 {QUICK}"
if PLATFORMS == "cpu":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
# A shell lets what it starts in the background ignore Ctrl-C, and so would the tests' programs.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

# The modules whose annotated shapes and dtypes are checked at every call.
CHECKED = (
    "keys",
    "schedule",
    "diffusion",
    "losses",
    "samplers",
    "likelihood",
    "calibration",
    "guidance",
    "operators",
    "editing",
    "models",
)
install_import_hook([f"ddpm_jax.{name}" for name in CHECKED], "shapecheck.check")

from ddpm_jax.config import (
    Checkpoint,
    Config,
    Data,
    Diffusion,
    Model,
    Optim,
    Train,
    names_where,
)
from ddpm_jax.devices.runtime import configure_jax
from ddpm_jax.errors import UserError

# As the commands do, before anything is computed: all processes then run with the same flags.
configure_jax()
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes many small objects that live on; looking through them often is slow.
gc.set_threshold(100_000, 50, 50)

HANG = 1800
"""Seconds after which a program that a test waits for is taken to hang. None is that slow."""


LONGEST = (
    "test_slow_processes.py",
    "test_slow_class_devices.py",
    "test_slow_watching.py",
    "test_slow.py",
    "test_slow_data.py",
    "test_slow_classes.py",
    "test_slow_fuzz.py",
    "test_slow_compression.py",
    "test_slow_tutorial.py",
    "test_slow_values.py",
    "test_train.py",
    "test_models.py",
    "test_classes.py",
    "test_parallel.py",
    "test_cli.py",
    "test_edits.py",
    "test_runtime.py",
    "test_survival.py",
    "test_segments.py",
)
"""Files that take long. They come first, so that no process waits for another at the end."""


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """On GPUs, skips a test for which there are too few."""
    try:
        return (yield)
    except UserError as error:
        if PLATFORMS == "cpu" or "but this machine has" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session", autouse=True)
def surroundings(tmp_path_factory):
    """The same on every machine: an empty cache folder of the user's, and the terminal's width."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("COLUMNS", "80")
        yield


@pytest.fixture(scope="session", autouse=True)
def programs_read_what_counts():
    """Fails where a program reads a field that equal models may differ in, while it is traced."""
    around = {}
    for path in names_where(Config, lambda field: not field.compiled):
        group, name = path.split(".")
        around.setdefault(type(getattr(Config(), group)), {})[name] = path

    def read(group, name):
        path = around[type(group)].get(name)
        # Whatever is made while a program is traced is a tracer.
        if path and isinstance(jax.numpy.zeros(()), jax.core.Tracer):
            pytest.fail(f"a program reads {path}: let its Meaning say so")
        return object.__getattribute__(group, name)

    with pytest.MonkeyPatch.context() as patch:
        for kind in around:
            patch.setattr(kind, "__getattribute__", read)
        yield


@pytest.fixture(autouse=True)
def package_log():
    """The package's log as it is at import: a command in an earlier test has changed it."""
    log = logging.getLogger("ddpm_jax")
    log.handlers.clear()
    log.setLevel(logging.NOTSET)
    log.propagate = True


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def tiny():
    """A config with a network of about 4,000 parameters, dropout and flips: quick to compile."""
    return Config(
        model=Model(
            base_channels=4,
            channel_multipliers=(1,),
            num_res_blocks=1,
            attention_resolutions=(),
            dropout=0.2,
            norm_groups=2,
        ),
        diffusion=Diffusion(num_timesteps=10, beta_start=0.01, beta_end=0.5),
        data=Data(source="array", image_shape=(8, 8, 1), flip=True, holdout=0.2),
        optim=Optim(learning_rate=1e-3, warmup_steps=2, ema_decay=0.3),
        train=Train(
            steps=4, batch_size=8, log_every=2, eval_every=4, sample_every=0, num_samples=4
        ),
        checkpoint=Checkpoint(every=2, keep=2),
    )


@pytest.fixture(scope="session")
def pictures():
    """48 uint8 images [48,8,8,1]."""
    return np.random.default_rng(1).integers(0, 256, (48, 8, 8, 1), dtype=np.uint8)


@pytest.fixture(scope="session")
def run(tiny, pictures, tmp_path_factory):
    """A run directory of two steps, its pictures in an npz beside it; to be read alone."""
    from ddpm_jax import fit

    folder = tmp_path_factory.mktemp("runs")
    fit(with_source(tiny, pictures, folder, train={"steps": 2}), folder / "tiny")
    before = files_of(folder / "tiny")
    yield folder / "tiny"
    assert files_of(folder / "tiny") == before, "a test has changed the run that all share"


@pytest.fixture
def copy(run, tmp_path):
    """Of the run, for a test that writes into it."""
    return shutil.copytree(run, tmp_path / "copy")


def files_of(folder):
    """{path: content} of all files below `folder`."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def with_(config, **groups):
    """The config with fields replaced: with_(config, train={"steps": 2})."""
    changed = {
        name: dataclasses.replace(getattr(config, name), **fields)
        if isinstance(fields, dict)
        else fields
        for name, fields in groups.items()
    }
    return dataclasses.replace(config, **changed)


def on_one_device(config, **groups):
    """The same for a run on one of the four devices."""
    return with_(config, parallel={"devices": 1}, **groups)


def lines(workdir):
    """What the run has written to metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def with_source(config, pictures, folder, **groups):
    """The config on one device, `pictures` read from an npz that is written into `folder`."""
    np.savez(folder / "pictures.npz", images=pictures)
    return on_one_device(config, data={"source": f"npz:{folder}/pictures.npz"}, **groups)


def compiled_once(folder):
    """Environment variables for programs that share their compiled code through `folder`."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def make_old(folder):
    """Dates the files below `folder` to 1970, so that `made_since` knows those of any clock."""
    for path in files_of(folder):
        os.utime(path, (0, 0))


def made_since(folder, pattern):
    """The names of the files below `folder` that were written after `make_old`, sorted."""
    return sorted(path.name for path in folder.rglob(pattern) if path.stat().st_mtime_ns)


def messages(caplog):
    """What this package has logged; other libraries say what they like."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("ddpm_jax")]


@contextlib.contextmanager
def started(command, **options):
    """A program that runs, its stdout and stderr in one pipe of text; it ends with the block."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    ) as program:
        watchdog = threading.Timer(HANG, program.kill)
        watchdog.start()
        try:
            yield program
        finally:
            watchdog.cancel()
            program.kill()


def read_until(program, *words):
    """Waits until the program has written each of `words`, in lines of any order."""
    missing, said = set(words), []
    for line in program.stdout:
        said.append(line)
        missing -= {word for word in missing if word in line}
        if not missing:
            return
    pytest.fail(f"the program ended without {missing}: {''.join(said)}")


def finish(program):
    """(exit code, what it writes until then)."""
    said = program.stdout.read()
    return program.wait(), said


def refused(capsys, *args):
    """Runs a command that must fail; returns the one line it says."""
    from ddpm_jax.cli import main

    capsys.readouterr()
    code = main([str(arg) for arg in args])
    error = capsys.readouterr().err.strip()
    assert code == 2 and "\n" not in error and error.startswith("ddpm-jax: "), error
    return error
