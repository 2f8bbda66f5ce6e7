"""Ctrl-C and SIGTERM as requests to stop, which the training loop checks after each step."""

import os
import signal
import threading
from typing import Self

import jax
from jax.experimental import multihost_utils


class StopSignals:
    """A context in which SIGINT and SIGTERM only ask the loop to stop.

    A second SIGINT acts as usual. With several processes, jax's runtime handles SIGTERM and stops
    them all after the same step; SIGINT is passed on to it as SIGTERM. Python allows signal
    handlers only in the main thread; in any other thread this context changes nothing.
    """

    def __init__(self):
        self._received: str | None = None
        self._before = {}
        self._together = jax.process_count() > 1

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT] if self._together else [signal.SIGINT, signal.SIGTERM]
            for number in numbers:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number in list(self._before):
            self._restore(number)

    @property
    def received(self) -> str | None:
        """The name of the signal that came to this process alone, else None."""
        return None if self._together else self._received

    def stop_after(self, step: int) -> str | None:
        """The name of the signal if training must end after `step`, else None.

        Call it once after every step.
        """
        if self._together:
            return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
        return self._received

    def _receive(self, number, _frame):
        self._received = signal.Signals(number).name
        # A second Ctrl-C means it; a second SIGTERM may be no more than a supervisor's repeat.
        if number == signal.SIGINT:
            self._restore(number)
            if self._together:
                os.kill(os.getpid(), signal.SIGTERM)

    def _restore(self, number):
        signal.signal(number, self._before.pop(number))


class Stopped(Exception):
    """A signal came while something was made that can be made again."""


class UntilSignal:
    """The progress of a chain that a signal ends."""

    def __init__(self, signals: StopSignals):
        self.signals = signals

    def update(self, _steps: int) -> None:
        """Raises Stopped if a signal has come."""
        if self.signals.received:
            raise Stopped
