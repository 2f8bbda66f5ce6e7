"""Work for the device and the host at the same time."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

S = TypeVar("S")
T = TypeVar("T")


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each once the one after it is made.

    Where making one dispatches a program, the device has its next work while the last result is
    fetched.
    """
    made: list[T] = []
    for item in items:
        made.append(item)
        if len(made) == 2:
            yield made.pop(0)
    yield from made


def made_beside(function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """function(item) of each item in its order, made in a thread of their own, one item ahead."""
    with ThreadPoolExecutor(1) as pool:
        for made in one_ahead(pool.submit(function, item) for item in items):
            yield made.result()


@contextlib.contextmanager
def beside() -> Iterator[Callable[..., None]]:
    """A function that makes calls in a thread of their own, in their order.

    It takes a function and its arguments, and waits for the call before. What that raises it raises
    itself, or the end of the block does. The block ends once all calls are done.
    """
    with ThreadPoolExecutor(1) as pool:
        last: Future | None = None

        def call(function: Callable, *args: Any) -> None:
            nonlocal last
            if last is not None:
                last.result()
            last = pool.submit(function, *args)

        yield call
        if last is not None:
            last.result()
