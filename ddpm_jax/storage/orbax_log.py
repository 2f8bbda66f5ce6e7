"""Orbax's log: each of its threads logs an error, pages long, beside raising it.

The error that is raised becomes one line of ours. The pages go to this module's log at DEBUG, so
that nothing is lost: logging.getLogger("ddpm_jax").setLevel(logging.DEBUG) shows them.
"""

import logging
import traceback

log = logging.getLogger(__name__)

# Orbax logs through absl and the root; asyncio logs errors of tasks that Orbax waits for no more.
LOGGERS = ("absl", "asyncio", "root")

# Of TensorStore's errors in such tasks, which name none of Orbax's files.
OF_THE_STORE = ("OCDBT", '"zarr', "tensorstore")


def demote_orbax_errors() -> None:
    """Turns Orbax's log into debug messages of this package, from now on and in every thread."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(each, _FromOrbax) for each in logger.filters):
            logger.addFilter(_FromOrbax())


class _FromOrbax(logging.Filter):
    """Takes the records that come from Orbax's code; all others pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        sources = [record.pathname, record.getMessage()]  # asyncio's messages name the task's file.
        if record.exc_info and record.exc_info[2]:
            sources += [frame.filename for frame in traceback.extract_tb(record.exc_info[2])]
        from_store = record.name == "asyncio" and any(word in sources[1] for word in OF_THE_STORE)
        if not from_store and not any("/orbax/" in source for source in sources):
            return True
        log.debug(record.getMessage(), exc_info=record.exc_info)
        return False
