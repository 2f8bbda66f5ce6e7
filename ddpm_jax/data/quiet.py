"""Keeps Pillow's warnings of odd files from the screen: what a file lacks is said once, here."""

import contextlib
import threading
import warnings
from collections.abc import Iterator

_lock = threading.Lock()
_users = 0
_ours: tuple | None = None


@contextlib.contextmanager
def quiet_pillow() -> Iterator[None]:
    """No warning of Pillow is shown inside, in any thread.

    Only a filter for Pillow's modules is added, and taken away when its last user leaves; that of
    `warnings.catch_warnings` would be lost or stay where two threads use it at once.
    """
    global _users, _ours
    with _lock:
        _users += 1
        if _users == 1:
            warnings.filterwarnings("ignore", module=r"PIL\b")
            _ours = warnings.filters[0]
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users and _ours in warnings.filters:
                warnings.filters.remove(_ours)  # type: ignore[attr-defined]
