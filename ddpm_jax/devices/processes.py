"""Several processes as one programme, on JAX's own distributed runtime: every one runs the same lines.

Process 0 alone writes files and prints; all see the same workdir. When a process dies, the runtime ends
the others within `BOUND` seconds, with a line that gives its number.
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

from ddpm_jax.errors import UserError

BOUND = 60
"""Seconds after which the other processes of one that died have ended."""


def join(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the programme's other processes, to be called before anything else of jax.

    Where nothing is given they are found by themselves on a TPU pod, under SLURM (srun) and in an indexed Job
    of Kubernetes; elsewhere this process is alone and nothing happens. Raises UserError for what does not
    fit together, or where the others do not come.
    """
    given = {
        "--coordinator": coordinator,
        "--num-processes": num_processes,
        "--process-id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise UserError(f"{', '.join(missing)}: several processes need all of {', '.join(given)}")
    if not missing:
        _check(coordinator, num_processes, process_id)
    elif not in_cluster(os.environ):
        return
    # XLA's own CPU client knows no collectives between processes, and two programs of gloo's at once wait for
    # each other for ever where the processes come to them in another order.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        # The bound leaves the others some seconds to hear of it.
        jax.distributed.initialize(
            coordinator, num_processes, process_id, heartbeat_timeout_seconds=BOUND - 10
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes of this programme did not find each other: {error}; "
            "give --coordinator, --num-processes and --process-id"
        ) from error


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether jax can find this programme's other processes by itself: SLURM, Kubernetes or a TPU."""
    slurm = {
        "SLURM_JOB_ID",
        "SLURM_STEP_NODELIST",
        "SLURM_PROCID",
        "SLURM_LOCALID",
    } <= environment.keys()
    if slurm and int(environment.get("SLURM_NTASKS", "1")) > 1:
        return True
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys():
        return True
    wanted = environment.get("JAX_PLATFORMS", "tpu").split(",")
    has_tpu = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    return "tpu" in wanted and bool(has_tpu) and importlib.util.find_spec("libtpu") is not None


def is_first() -> bool:
    """Whether this is process 0, the one that writes and prints."""
    return jax.process_index() == 0


def agreed(value) -> np.ndarray:
    """Process 0's `value`, a number or an array of them, in all processes; waits for all of them."""
    value = np.asarray(value)
    return (
        value
        if jax.process_count() == 1
        else np.asarray(multihost_utils.broadcast_one_to_all(value))
    )


def wait_for_all(name: str) -> None:
    """Returns once every process has come to this line, whatever process 0 wrote before being visible to all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def leave_at_once(code: int) -> None:
    """Ends this process with `code` if it is one of several: at exit jax would wait for the others, for ever.

    Of an exception that is being handled the traceback is printed.
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
        raise UserError(f"--coordinator: HOST:PORT is needed, got {coordinator!r}")
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise UserError(
            f"--process-id: from 0 to --num-processes - 1 is needed, got {process_id} of {num_processes}"
        )
