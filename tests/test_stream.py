"""Batches that are read ahead are those that are not."""

import dataclasses
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest

from ddpm_jax.config import Data
from ddpm_jax.data import Batch, Batches, from_array, open_batches
from ddpm_jax.errors import DataLost

N, BATCH = 20, 8


@dataclasses.dataclass(frozen=True)
class Log:
    """A read function that returns indices as pixels and writes a byte for each batch it reads."""

    file: Path

    def __call__(self, indices):
        with self.file.open("ab") as file:
            file.write(b".")
        if self.file.with_suffix(".lost").exists():
            raise DataLost("data: 7.png was there at the start")
        return np.uint8(indices)[:, None, None, None]

    def settled(self):
        """How many batches were read when no more come."""
        before, now = -1, 0
        while before != now:
            time.sleep(0.3)
            before, now = now, self.file.stat().st_size
        return now


@pytest.fixture
def logged(tmp_path):
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
    before = logged.read.settled()
    stream.batch_at(5)
    assert logged.read.settled() - before == 1  # It stays as far ahead as it is.
    stream.close()
    assert_same(stream.batch_at(6), batches.batch_at(6))
    stream.close()


def test_processes_read_the_same_not_too_far_ahead_and_tell_of_lost_data(logged):
    batches, stream = Batches(logged, np.arange(N), BATCH, 3), opened(logged, workers=2)
    read = [stream.batch_at(step) for step in range(5, 12)]
    assert 7 < logged.read.settled() <= 7 + 4 * 2
    for step, batch in enumerate(read, 5):
        assert_same(batch, batches.batch_at(step))

    logged.read.file.with_suffix(".lost").touch()
    with pytest.raises(DataLost, match=r"data: 7.png was there at the start"):
        for step in range(12, 30):
            stream.batch_at(step)
    assert not multiprocessing.active_children()
    stream.close()
