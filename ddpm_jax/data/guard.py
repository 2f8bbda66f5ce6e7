"""Scripts without `if __name__ == "__main__":`, which the processes that read images would run."""

import multiprocessing
import os

UNGUARDED = 97
"""The exit code of a process that would have run such a script; Python and shells use others."""

REMEDY = (
    "data: the processes that read images start this script from its beginning; put its call of "
    'ddpm_jax.fit under if __name__ == "__main__": (or set data.workers to 0)'
)


def leave_unguarded_reader() -> None:
    """Ends this process if it was started to read images and runs the user's script on its way.

    The process that started it finds the exit code and says what to do.
    """
    # Python's multiprocessing looks there for the same mistake, when it starts a process.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(UNGUARDED)
