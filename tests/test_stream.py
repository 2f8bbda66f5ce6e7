"""Batches that are read ahead are those that are not."""

import contextlib
import dataclasses
import multiprocessing
import os
import select
from pathlib import Path

import numpy as np
import pytest
from conftest import HANG

from ddpm_jax.config import Data
from ddpm_jax.data import Batch, Batches, from_array, guard, open_batches
from ddpm_jax.errors import DataLost, UserError

N, BATCH = 20, 8


@dataclasses.dataclass(frozen=True)
class Log:
    """A read function whose pixels are the index. It writes a byte into a pipe for each batch."""

    pipe: Path

    def __call__(self, indices):
        pipe = os.open(self.pipe, os.O_RDWR)  # Does not wait for a reader.
        os.write(pipe, b".")
        os.close(pipe)
        if self.pipe.with_suffix(".lost").exists():
            raise DataLost("data: 7.png was there at the start")
        return np.uint8(indices)[:, None, None, None]


class Reads:
    """The test's end of that pipe."""

    def __init__(self, pipe):
        os.mkfifo(pipe)
        self.file, self.seen = os.open(pipe, os.O_RDWR | os.O_NONBLOCK), 0

    def wait_for(self, count):
        """Waits until so many batches have been read in all."""
        while self.seen < count:
            assert select.select([self.file], [], [], HANG)[0], f"{self.seen} of {count} are read"
            self.in_all()

    def in_all(self):
        """How many have been read."""
        with contextlib.suppress(BlockingIOError):
            self.seen += len(os.read(self.file, 1000))
        return self.seen


@pytest.fixture
def reads(tmp_path):
    reads = Reads(tmp_path / "log")
    yield reads
    os.close(reads.file)


@pytest.fixture
def logged(tmp_path, reads):
    """Images that are their indices, and whose reads are counted."""
    source = from_array(np.zeros((N, 1, 1), np.uint8), (1, 1, 1), np.arange(N))
    return dataclasses.replace(source, read=Log(tmp_path / "log"), streamed=True)


def opened(source, workers=0, rows=None):
    return open_batches(source, np.arange(len(source)), BATCH, 3, Data(workers=workers), rows)


def assert_same(batch, other):
    np.testing.assert_array_equal(batch.image, other.image)
    np.testing.assert_array_equal(batch.label, other.label)


def test_hosts_read_slices_of_the_same_batches(logged):
    whole = Batches(logged, np.arange(N), BATCH, 3)
    for step in range(6):  # Epochs meet within batches 2 and 4.
        parts = [opened(logged, rows=rows).batch_at(step) for rows in np.split(np.arange(BATCH), 4)]
        joined = Batch(*map(np.concatenate, zip(*parts, strict=True)))
        assert_same(joined, whole.batch_at(step))
    some = np.array([6, 1])
    batch = whole.batch_at(4)
    assert_same(opened(logged, rows=some).batch_at(4), Batch(batch.image[some], batch.label[some]))


def test_places_are_the_same_streamed_or_not(logged):
    """What an update reads where the images lie on the device (data.on_device)."""
    whole, stream = Batches(logged, np.arange(N), BATCH, 3), opened(logged)
    for step in (4, 0):
        places = stream.places_at(step)
        assert_same(places, whole.places_at(step))
        assert_same(Batch(logged.read(places.image), places.label), whole.batch_at(step))
    stream.close()


def test_what_lies_in_memory_is_not_streamed(logged):
    batches = opened(dataclasses.replace(logged, streamed=False))
    assert isinstance(batches, Batches) and batches.batch_at(2).image.shape == (BATCH, 1, 1, 1)
    batches.close()


def test_a_thread_reads_ahead_from_any_step(logged):
    batches, stream = Batches(logged, np.arange(N), BATCH, 3), opened(logged)
    for step in (0, 1, 2, 7, 8, 3, 3, 4):
        assert_same(stream.batch_at(step), batches.batch_at(step))
    stream.close()
    assert_same(stream.batch_at(6), batches.batch_at(6))
    stream.close()


def test_a_thread_is_one_batch_ahead(logged, reads):
    stream = opened(logged)
    for step in range(5):
        stream.batch_at(step)
        reads.wait_for(step + 2)
    stream.close()  # No more come.
    assert reads.in_all() == 6


def test_processes_read_the_same_not_too_far_ahead_and_tell_of_lost_data(logged, reads):
    others = multiprocessing.active_children()
    batches, stream = Batches(logged, np.arange(N), BATCH, 3), opened(logged, workers=2)
    read = [stream.batch_at(step) for step in range(5, 12)]
    for step, batch in enumerate(read, 5):
        assert_same(batch, batches.batch_at(step))
    reads.wait_for(2 * 7 + 2)  # Those above, here and there, and one that each is ahead.
    workers = set(multiprocessing.active_children()) - set(others)
    assert len(workers) == 2

    logged.read.pipe.with_suffix(".lost").touch()
    with pytest.raises(DataLost, match=r"data: 7.png was there at the start"):
        for step in range(12, 30):
            stream.batch_at(step)
    for worker in workers:
        worker.join(HANG)
        assert not worker.is_alive()
    delivered = step - 5
    assert reads.in_all() <= 7 + delivered + 4 * 2
    stream.close()


def test_a_script_without_the_main_guard_is_told_about_it(monkeypatch):
    """A process that is started to read images runs the main script first, and with it `fit`."""
    codes = []
    monkeypatch.setattr(guard.os, "_exit", codes.append)
    guard.leave_unguarded_reader()
    process = multiprocessing.current_process()
    monkeypatch.setattr(process, "_inheriting", True, raising=False)
    guard.leave_unguarded_reader()
    assert codes == [guard.UNGUARDED]

    def died():
        raise RuntimeError(f"Worker process was terminated with exit code {codes[0]}. Search")
        yield

    stream = open_batches(
        dataclasses.replace(from_array(np.zeros((4, 1, 1, 1), np.uint8), (1, 1, 1)), streamed=True),
        np.arange(4),
        2,
        0,
        Data(image_shape=(1, 1, 1)),
    )
    stream._iterator, stream._next = died(), 0
    with pytest.raises(UserError, match='under if __name__ == "__main__":'):
        stream.batch_at(0)
