"""Ctrl-C and SIGTERM as a request that the training loop looks at between two steps."""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils


class StopSignals:
    """While entered, SIGINT and SIGTERM only ask the loop to stop; a second SIGINT acts as usual.

    Among several processes jax's runtime receives SIGTERM and has all of them stop after the same step;
    SIGINT is passed on to it. In another thread than the main one Python takes no handlers, and nothing
    changes.
    """

    def __init__(self):
        self._received: str | None = None
        self._before = {}
        self._together = jax.process_count() > 1

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT,) if self._together else (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_):
        for number in list(self._before):
            self._restore(number)

    def stop_after(self, step: int) -> str | None:
        """The signal, if training is to end after `step`; to be asked once after each."""
        if self._together:
            return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
        return self._received

    def _receive(self, number, _frame):
        self._received = signal.Signals(number).name
        if number == signal.SIGINT:  # A person insists; what repeats SIGTERM is a supervisor.
            self._restore(number)
            if self._together:
                os.kill(os.getpid(), signal.SIGTERM)

    def _restore(self, number):
        signal.signal(number, self._before.pop(number))
