"""Keeps warnings of odd files from the screen: this program says what is left out."""

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator

LOGS = ("PIL", "tifffile")
"""The packages that warn."""

_lock = threading.Lock()
_users = 0
_filter: tuple | None = None
_levels: dict[str, int] = {}


@contextlib.contextmanager
def quiet_pillow() -> Iterator[None]:
    """No warning of Pillow or tifffile is shown or logged inside, in any thread.

    Only a filter for Pillow's modules is added, and the level of the logs raised, until the last
    user leaves; `warnings.catch_warnings` would lose or leave filters where two threads use it.
    """
    global _users, _filter
    with _lock:
        _users += 1
        if _users == 1:
            warnings.filterwarnings("ignore", module=r"PIL\b")
            _filter = warnings.filters[0]
            for name in LOGS:
                _levels[name] = logging.getLogger(name).level
                logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                for name in LOGS:
                    logging.getLogger(name).setLevel(_levels[name])
                if _filter in warnings.filters:
                    warnings.filters.remove(_filter)  # type: ignore[attr-defined]
