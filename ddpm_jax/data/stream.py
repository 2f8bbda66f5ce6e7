"""Reads batches ahead of their use, with Grain."""

import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
from typing import Any

import grain
from absl import flags

from ddpm_jax.data.batches import Batch, Batches
from ddpm_jax.data.guard import REMEDY, UNGUARDED
from ddpm_jax.errors import DataLost, UserError


class Stream:
    """Reads `batches` ahead. They do not depend on the number of workers or on the first step.

    While steps are requested in order, it reads ahead; a request for any other step makes it start
    again there. Besides the batch it returns, it holds at most four batches per worker, or two in
    all without workers. Each worker also holds the order of the epoch and the data that the source
    needs to find its images.

    Workers import the main script. A script of your own must call this under
    `if __name__ == "__main__":`.
    """

    def __init__(self, batches: Batches, workers: int):
        """With `workers` 0, a thread of this process reads ahead."""
        self.source = batches.source
        self.workers = workers
        # Workers find images by index. Without this, each would hold a copy of all names.
        source = dataclasses.replace(batches.source, names=[], marks=None)
        self._batches = dataclasses.replace(batches, source=source)
        self._iterator: Any = None
        self._next: int | None = None

    def batch_at(self, step: int) -> Batch:
        """As Batches.batch_at. Also raises DataLost if a worker process has died.

        Raises UserError if the main script has no such guard.
        """
        if step != self._next:
            self._start(step)
        try:
            batch = next(self._iterator)
        except DataLost:
            self.close()
            raise
        except RuntimeError as error:  # Grain raises it if a worker was killed.
            self.close()
            reason = str(error).partition(". ")[0]
            if f"exit code {UNGUARDED}" in reason:
                raise UserError(REMEDY) from None
            raise DataLost(
                f"data: a process that reads images has died ({reason}); run the same command "
                "again, with fewer data.workers if memory or /dev/shm was full"
            ) from error
        self._next = step + 1
        return batch

    def places_at(self, step: int) -> Batch:
        """As Batches.places_at. Reads no images."""
        return self._batches.places_at(step)

    def close(self) -> None:
        """Ends the worker processes."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None
        self._next = None

    def _start(self, step: int) -> None:
        self.close()
        steps = grain.MapDataset.range(step, sys.maxsize).map(self._batches.batch_at)
        if self.workers:
            # Grain reads absl's flags. This program has none to parse.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            # The worker processes read ahead, so they need no threads of their own.
            read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
            processes = grain.MultiprocessingOptions(
                num_workers=self.workers, per_worker_buffer_size=1
            )
            stream = steps.to_iter_dataset(read).mp_prefetch(processes, worker_init_fn=_settle)
        else:
            read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
            stream = steps.to_iter_dataset(read)
        self._iterator = iter(stream)


def _settle(worker: int, workers: int) -> None:
    """Prepares a worker process when it starts."""
    # Terminals and job managers signal all processes. Only the main process acts on it, and ends
    # the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this worker when its parent is gone: a parent that is killed cannot end its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
