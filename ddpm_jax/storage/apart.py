"""Calls of Orbax in a thread of their own.

Orbax runs each call in a new event loop of asyncio, and takes away the one that the calling thread
had. In a notebook, where a loop runs already, it would even change asyncio for the whole process.
"""

import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def apart(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """function(*args, **kwargs), computed in another thread; raises what it raises."""
    context = contextvars.copy_context()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: context.run(function, *args, **kwargs)).result()
