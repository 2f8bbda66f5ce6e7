"""The line for an exception of a command: None for a bug, one for a fault of its surroundings."""

import errno

from ddpm_jax.errors import UserError, machine_remedy

NO_MEMORY = ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "ALLOC_FAILED", "out of memory")
"""How XLA, CUDA and cuDNN say that memory has run out."""

SMALLER = {
    "train": "lower train.batch_size, raise train.accumulate or list levels in model.remat; "
    "data.cache_mb and data.workers take memory of the host",
    "plan": "plan a smaller model",
    "sample": "lower --batch-size, or -n if all images go into one file",
    "edit": "lower --batch-size, or edit fewer images at once",
    "compress": "lower --batch-size, or compress fewer images at once",
    "decompress": "lower --batch-size",
    "likelihood": "lower --batch-size",
    "calibrate": "lower --batch-size",
    "tune": "lower --batch-size, or --images",
    "evaluate": "lower --batch-size, or -n",
    "figure": "lower the figure's number of images, or its --batch-size if it has one",
    "report": "pass --compute none, or name fewer runs",
    "export": "export on a machine with more memory",
}
"""The settings of each command that take less memory."""


def line_of(error: BaseException, command: str) -> str | None:
    """The line for `error` in `command`, or None if it is not known to be other than a bug."""
    if isinstance(error, UserError):
        return str(error)
    if _is_out_of_memory(error):
        return f"out of memory ({_first_line(error)}); {SMALLER.get(command, 'free some')}"
    if isinstance(error, OSError):
        remedy = machine_remedy(error)
        return f"{error}; {remedy}" if remedy else str(error)
    if isinstance(error, ImportError):
        return f"{error}; pip install 'ddpm-jax[gcs]'" if "gcsfs" in str(error) else str(error)
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return f"{error}; raise the limit of processes and threads with ulimit -u"
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # jaxlib's own errors, whose class has had several names, are RuntimeErrors.
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def _first_line(error: BaseException) -> str:
    """The error's first line of text, or its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
