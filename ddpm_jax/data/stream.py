"""Batches that are read ahead, through Grain."""

import dataclasses
import multiprocessing
import os
import signal
import sys
import threading

import grain
from absl import flags

from ddpm_jax.data.batches import Batch, Batches
from ddpm_jax.errors import DataLost


class Stream:
    """The batches of `batches`, the same for any number of worker processes and from any step on.

    Asked for one step after the other, it reads on ahead of them; asked for another one, it starts anew there.
    It holds at most four batches a worker besides the one it hands out, without workers two in all. A worker
    also holds what the source needs to find its images, and the order of the epoch. Workers import the main
    script: one that is not the command line calls this under `if __name__ == "__main__":`.
    """

    def __init__(self, batches: Batches, workers: int):
        """`workers` 0 reads ahead in a thread of this process."""
        self.source, self.workers = batches.source, workers
        # The workers find images by their index, and millions of names would lie in each.
        self._batches = dataclasses.replace(
            batches, source=dataclasses.replace(batches.source, names=[])
        )
        self._iterator, self._next = None, None

    def batch_at(self, step: int) -> Batch:
        """As Batches.batch_at. Raises DataLost too where a worker process has died."""
        if step != self._next:
            self._start(step)
        try:
            batch = next(self._iterator)
        except DataLost:
            self.close()
            raise
        except RuntimeError as error:  # Grain's word for a worker that was killed.
            self.close()
            reason = str(error).partition(". ")[0]
            raise DataLost(
                f"data: a process that reads images has died ({reason}): there may be too little "
                "memory, or room in /dev/shm, for data.workers; run the same command again"
            ) from error
        self._next = step + 1
        return batch

    def places_at(self, step: int) -> Batch:
        """As Batches.places_at: nothing is read for it."""
        return self._batches.places_at(step)

    def close(self) -> None:
        """Ends the worker processes."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator, self._next = None, None

    def _start(self, step: int) -> None:
        self.close()
        steps = grain.MapDataset.range(step, sys.maxsize).map(self._batches.batch_at)
        if self.workers:
            if (
                not flags.FLAGS.is_parsed()
            ):  # Grain reads absl's flags, which this program does not use.
                flags.FLAGS.mark_as_parsed()
            # The worker itself is what reads ahead: no threads in it.
            stream = steps.to_iter_dataset(
                grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
            ).mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=1),
                worker_init_fn=_settle,
            )
        else:
            stream = steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        self._iterator = iter(stream)


def _settle(worker: int, workers: int) -> None:
    """Run in a worker when it starts."""
    # A terminal and a job manager signal all processes: the program decides what that means, and ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)  # Killed, it ended nobody.
