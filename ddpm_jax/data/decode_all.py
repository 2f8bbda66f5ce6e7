"""Decodes many image files on all cores."""

import contextlib
import os
import sys
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from ddpm_jax.data.decode_process import DecodeProcesses
from ddpm_jax.data.image_file import Decoder, Image, try_decode
from ddpm_jax.data.quiet import quiet_pillow

GROUP = 192
"""Images that a thread takes at a time: passing small ones one by one costs more than decoding.
With 64 the processes waited for the next as long as they decoded."""

SHARES = 8
"""Groups for each core at least, so that all end at about the same time. A few large images make
groups of one."""

MANY = 10_000
"""From so many images on, processes decode beside the threads. The first takes a second of a core
to start, in which a thread decodes 5,000 small images."""

MOST = 16
"""Processes. Taking a small image in costs this one a seventh of what decoding it costs another, so
more would wait."""


def decode_all(
    decoder: Decoder, names: list[str], path: str, with_pixels: bool = True
) -> Generator[tuple[str, Image | Exception], None, None]:
    """Yields (name, its image, or the error for one that does not decode or does not fit).

    In the order of `names`, which lie below `path`. Without `with_pixels` those of an image may be
    anything. Raises CannotRead.
    """
    cores = len(os.sched_getaffinity(0))
    size = max(1, min(GROUP, len(names) // (SHARES * cores)))
    groups = [names[i : i + size] for i in range(0, len(names), size)]
    progress = tqdm(
        total=len(names), desc="reading images", unit="", disable=None, delay=2, leave=False
    )
    with contextlib.ExitStack() as until_done:
        until_done.enter_context(quiet_pillow())  # Once: it looks through all logs.
        processes = None
        threads = None
        if len(names) >= MANY and cores > 1 and sys.executable:
            threads = min(cores, MOST)  # One waits for each process; others would be in their way.
            processes = until_done.enter_context(
                DecodeProcesses(path, decoder, with_pixels, threads)
            )
        pool = until_done.enter_context(ThreadPoolExecutor(threads))
        until_done.enter_context(progress)

        def try_some(some_names: list[str]) -> list[Image | Exception]:
            found = processes.try_some(some_names) if processes else None
            images = found or [None] * len(some_names)
            return [
                image or try_decode(decoder, name)
                for image, name in zip(images, some_names, strict=True)
            ]

        for group, results in zip(groups, pool.map(try_some, groups), strict=True):
            yield from zip(group, results, strict=True)
            progress.update(len(group))
