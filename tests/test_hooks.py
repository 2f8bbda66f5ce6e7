"""No call of the package changes what belongs to the process, and no fault is silenced."""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import messages, with_source

from ddpm_jax import UserError, fit, load
from ddpm_jax.storage.checkpoint import Checkpoints

SAVED = Path(__file__).parent / "data/run_0_1"
TREE = {"params": {"kernel": np.ones(3, np.float32)}}


def hooks():
    """All that belongs to the process and that a library could change, by name."""
    loggers = [
        logging.getLogger(),
        *(each for each in logging.root.manager.loggerDict.values() if hasattr(each, "handlers")),
    ]
    return {
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook, sys.displayhook),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "loggers": {
            each.name: (each.level, each.propagate, each.disabled, [*each.handlers, *each.filters])
            for each in loggers
        },
        "disabled": logging.root.manager.disable,
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "folder": os.getcwd(),
        "recursion": sys.getrecursionlimit(),
        "numpy": np.geterr(),
        "jax": {name: jax.config.values[name] for name in jax.config.values},
    }


def damaged(tmp_path):
    """A copy of the run, a bit of whose only checkpoint is turned."""
    copy = shutil.copytree(SAVED, tmp_path / "damaged")
    for file in (copy / "checkpoints/2").rglob("d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    return copy


@contextlib.contextmanager
def unchanged():
    """A block after which the process is as it was."""
    load(SAVED)  # Imports what is imported late.
    before = hooks()
    yield
    after = hooks()
    for name, value in before.items():
        if name == "loggers":  # New ones are made by whoever logs.
            after[name] = {logger: after[name][logger] for logger in value}
        assert after[name] == value, name


def test_a_load_changes_nothing_of_the_process():
    with unchanged():
        load(SAVED)


def test_a_load_that_fails_changes_nothing_of_the_process(tmp_path):
    copy = damaged(tmp_path)
    with unchanged(), pytest.raises(UserError, match="no checkpoint can be used"):
        load(copy)


def test_two_threads_that_load_at_once_change_nothing_of_the_process(tmp_path):
    copy = damaged(tmp_path)
    ready = threading.Barrier(4)

    def work(path):
        ready.wait()
        for _ in range(2):
            try:
                load(path)
            except UserError:
                assert path == copy

    with unchanged(), ThreadPoolExecutor(4) as threads:
        list(threads.map(work, [SAVED, copy, SAVED, copy]))


# Orbax leaves coroutines behind when it fails.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_save_that_fails_is_told_once_and_changes_nothing_of_the_process(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(1, TREE)
    checkpoints.wait()
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("in the way")
    with unchanged(), pytest.raises(UserError) as told:
        checkpoints.save(2, TREE)
        checkpoints.wait()
    assert "a checkpoint cannot be saved ([Errno 20] Not a directory: " in str(told.value)
    assert "2.orbax-checkpoint-tmp" in str(told.value)
    checkpoints.close()


def test_what_orbax_logs_of_a_fault_is_kept_for_those_who_ask(caplog):
    """Its pages go to this package's log at DEBUG; other records of absl pass as they are."""
    record = logging.LogRecord("absl", logging.ERROR, "/x/orbax/y.py", 1, "pages", (), None)
    # TensorStore's, which is raised elsewhere, too.
    task = "Task exception was never retrieved: ValueError('Error opening \"zarr3\" driver')"
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("absl").handle(record)
        logging.getLogger("absl").error("of another library")
        logging.getLogger("asyncio").error(task)
        logging.getLogger("asyncio").error("a task of the user's")
    assert messages(caplog) == ["pages", task]
    assert [r.getMessage() for r in caplog.records if r.name == "asyncio"] == [
        "a task of the user's"
    ]
    assert [r.getMessage() for r in caplog.records if r.name == "absl"] == ["of another library"]


def test_training_that_is_refused_changes_nothing_of_the_process(tiny, pictures, tmp_path):
    (tmp_path / "mine").touch()
    with unchanged(), pytest.raises(UserError, match="not empty and not a run directory"):
        fit(tiny, tmp_path, pictures)


def test_training_gives_back_what_it_takes(copy, tiny, pictures):
    """The signals, above all: it resumes a run that is at its end, so that nothing is compiled."""
    config = with_source(tiny, pictures, copy.parent, train={"steps": 2})
    with unchanged():
        fit(config, copy)


def test_the_event_loop_of_the_caller_stays(tmp_path):
    """Orbax would take it away, and `get_event_loop` fails after that."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        load(SAVED)
        checkpoints = Checkpoints(tmp_path, 2)
        checkpoints.save(1, TREE)
        checkpoints.close()
        assert asyncio.get_event_loop() is loop
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def test_a_run_is_loaded_inside_a_running_loop():
    """As in a notebook."""

    async def cell():
        return load(SAVED)[1]

    params = asyncio.run(cell())
    jax.tree.map(np.testing.assert_array_equal, params, load(SAVED)[1])
