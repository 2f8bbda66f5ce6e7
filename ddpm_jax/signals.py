"""Ctrl-C and SIGTERM as a request that the training loop looks at between two steps."""

import signal
import threading


class StopSignals:
    """While entered, SIGINT and SIGTERM only set `received`; a second SIGINT acts as usual.

    In another thread than the main one Python takes no handlers, and nothing changes.
    """

    def __init__(self):
        self.received: str | None = None
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_):
        for number in list(self._before):
            self._restore(number)

    def _receive(self, number, _frame):
        self.received = signal.Signals(number).name
        if number == signal.SIGINT:  # A person insists; what repeats SIGTERM is a supervisor.
            self._restore(number)

    def _restore(self, number):
        signal.signal(number, self._before.pop(number))
