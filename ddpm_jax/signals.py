"""Ctrl-C and SIGTERM as a request that the training loop looks at between two steps."""

import signal
import threading


class StopSignals:
    """While entered, the first SIGINT or SIGTERM only sets `received`; a second one acts as usual.

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
        while self._before:
            signal.signal(*self._before.popitem())

    def _receive(self, number, _frame):
        self.received = signal.Signals(number).name
        self.__exit__()
