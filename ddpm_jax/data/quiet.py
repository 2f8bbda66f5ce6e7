"""Keeps Pillow's warnings of odd files from the screen: this program says what is left out."""

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator

_lock = threading.Lock()
_users = 0
_filter: tuple | None = None
_level = logging.NOTSET


@contextlib.contextmanager
def quiet_pillow() -> Iterator[None]:
    """No warning of Pillow is shown or logged inside, in any thread.

    Only a filter for Pillow's modules is added, and the level of its log raised, until the last
    user leaves; `warnings.catch_warnings` would lose or leave filters where two threads use it.
    """
    global _users, _filter, _level
    log = logging.getLogger("PIL")
    with _lock:
        _users += 1
        if _users == 1:
            warnings.filterwarnings("ignore", module=r"PIL\b")
            _filter = warnings.filters[0]
            _level = log.level
            log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                log.setLevel(_level)
                if _filter in warnings.filters:
                    warnings.filters.remove(_filter)  # type: ignore[attr-defined]
