"""Runs several processes as one program, with JAX's distributed runtime.

All processes run the same code and see the same workdir. Only process 0 writes files and prints. If
a process dies, the runtime ends the others within `BOUND` seconds, with a line that gives its
number.
"""

import glob
import importlib.util
import os
import sys
import traceback
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from numpy.typing import ArrayLike

from ddpm_jax.errors import UserError

BOUND = 60
"""When a process dies, the others end within this many seconds."""


def join(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Connects to the program's other processes. Call it before any other use of jax.

    Without arguments, jax finds the other processes by itself on a TPU pod, under SLURM (srun) and
    in an indexed Job of Kubernetes. Elsewhere this process is the only one and nothing happens.

    Raises UserError if the arguments do not fit together or the processes cannot connect.
    """
    given = {
        "--coordinator": coordinator,
        "--num-processes": num_processes,
        "--process-id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise UserError(
            f"{', '.join(missing)}: missing; several processes need all of {', '.join(given)}"
        )
    if not missing:
        _check(coordinator, num_processes, process_id)
    elif not in_cluster(os.environ):
        return
    # XLA's CPU client has no collectives between processes of its own; gloo has. Two programs that
    # use gloo at once deadlock if the processes reach them in different orders, so dispatch is not
    # asynchronous.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        # The timeout is below BOUND, because the others need a few seconds to be notified.
        jax.distributed.initialize(
            coordinator, num_processes, process_id, heartbeat_timeout_seconds=BOUND - 10
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes of this run could not connect ({error}); "
            "pass --coordinator, --num-processes and --process-id"
        ) from error


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether jax can find the other processes by itself: under SLURM, Kubernetes or on a TPU.

    Raises UserError if SLURM_NTASKS is not a number.
    """
    slurm = {
        "SLURM_JOB_ID",
        "SLURM_STEP_NODELIST",
        "SLURM_PROCID",
        "SLURM_LOCALID",
    } <= environment.keys()
    if slurm and _number_of_tasks(environment.get("SLURM_NTASKS", "1")) > 1:
        return True
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys():
        return True
    wanted = environment.get("JAX_PLATFORMS", "tpu").split(",")
    has_tpu = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    return "tpu" in wanted and bool(has_tpu) and importlib.util.find_spec("libtpu") is not None


def _number_of_tasks(given: str) -> int:
    try:
        return int(given)
    except ValueError:
        raise UserError(f"SLURM_NTASKS: {given!r} is not a number; correct or unset it") from None


def is_first() -> bool:
    """Whether this is process 0, the one that writes and prints."""
    return jax.process_index() == 0


def agreed(value: ArrayLike) -> np.ndarray:
    """Process 0's `value`, a number or an array, in all processes. Waits for all of them."""
    value = np.asarray(value)
    if jax.process_count() == 1:
        return value
    return np.asarray(multihost_utils.broadcast_one_to_all(value))


def wait_for_all(name: str) -> None:
    """Waits until every process has reached this line.

    All of them then see the files that process 0 wrote before it.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def leave_at_once(code: int) -> None:
    """Ends this process with `code` at once, if it is one of several.

    In a normal exit jax would wait forever for the others. If an exception is being handled, its
    traceback is printed.
    """
    if jax.distributed.is_initialized():
        if sys.exception():
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _check(coordinator, num_processes, process_id) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator: must be HOST:PORT, got {coordinator!r}")
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise UserError(
            "--process-id: must be from 0 to --num-processes - 1, "
            f"got {process_id} with --num-processes {num_processes}"
        )
