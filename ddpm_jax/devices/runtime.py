"""Settings of jax: XLA's flags for CPUs, malloc's settings, and the cache of compiled programs."""

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jaxlib

from ddpm_jax.errors import UserError

log = logging.getLogger(__name__)

CPU_FLAGS = {
    # Use Eigen for convolutions: their gradients take three times as long with YNNPACK.
    "--xla_cpu_experimental_ynn_fusion_type": "-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION",
}
"""XLA flags that make the network faster on a CPU."""

FASTER_IN = ("0.10.", "0.11.")
"""The versions of jaxlib that get CPU_FLAGS. In 0.12 YNNPACK is the faster one.

A flag that a version does not know would end the process.
"""

MALLOC_SETTINGS = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1)}
"""For glibc's mallopt, {name: (number, value)}: a single heap that keeps freed memory."""


def configure_jax(compile_cache: bool = True) -> None:
    """Makes jax faster on this machine. Call it before jax computes; the commands do so themselves.

    On a CPU, the CPU_FLAGS that XLA_FLAGS does not set yet are added to it, if this version of
    jaxlib gets them; the name of a file is replaced with the flags in it. glibc's malloc gets
    MALLOC_SETTINGS, unless MALLOC_... or GLIBC_TUNABLES configure it.

    With `compile_cache`, compiled programs are stored in the user's cache folder, for this version
    of jaxlib and this kind of CPU, and later processes reuse them. Settings by
    JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE and
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS are kept.

    Raises UserError for XLA_FLAGS that XLA does not know or cannot read: it would end the process.
    """
    check_xla_flags()
    if _computes_on_cpu():
        _keep_freed_memory()
        given = _given_xla_flags()
        flags = CPU_FLAGS if jaxlib.__version__.startswith(FASTER_IN) else {}
        missing = [f"{name}={value}" for name, value in flags.items() if name not in given]
        os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()
    if not compile_cache:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    # jax adds its options as attributes at run time.
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        _use_cache(_cache_folder())


def _use_cache(folder: Path) -> None:
    """Keeps compiled programs in `folder`; warns where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning(
            "%s: cannot be written (%s), so programs are compiled anew at every start; set "
            "XDG_CACHE_HOME to a folder that can",
            folder,
            error.strerror,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def check_xla_flags() -> None:
    """Raises UserError if XLA would end the process for what XLA_FLAGS holds."""
    flags = os.environ.get("XLA_FLAGS", "")
    complaint = _complaint_about(flags) if flags.strip() else ""
    if complaint:
        raise UserError(f"XLA_FLAGS: {complaint}; correct or unset it")


@functools.cache
def _complaint_about(flags: str) -> str:
    """What XLA says of these XLA_FLAGS, which it takes from the environment; "" if it takes them.

    It ends the process that asks, so another one does.
    """
    ask = "from jaxlib import xla_client; xla_client.CompileOptions()"
    environment = {**os.environ, "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", ask], env=environment, capture_output=True, text=True
    )
    # For example "F1125 19:29:28.028204 4454 parse_flags_from_env.cc:171] Could not open file".
    said = re.search(r"flags\w*\.cc:\d+\] (.*)", done.stderr)
    return said.group(1).rstrip(".") if done.returncode and said else ""


def _given_xla_flags() -> str:
    """The flags in XLA_FLAGS, or in the file that it names."""
    given = os.environ.get("XLA_FLAGS", "").strip()
    if not given or given.startswith("-"):
        return given
    try:
        flags = Path(given).read_text().strip()
    except (OSError, ValueError) as error:
        raise UserError(f"XLA_FLAGS: cannot read {given} ({error}); correct or unset it") from error
    # XLA takes no flag from a file that begins with anything else.
    return flags if flags.startswith("-") else ""


def user_cache() -> Path:
    """This package's folder in the user's cache folder, or in /tmp where the user has no home."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        cache = Path(given or "~/.cache").expanduser()
    except RuntimeError:  # A container can run under a user that it does not list.
        cache = Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
    return cache / "ddpm_jax"


def _keep_freed_memory() -> None:
    """Makes glibc's malloc keep freed memory.

    XLA frees a step's temporary buffers after the step. If that memory went back to the kernel, the
    kernel would clear every page again for the next step.
    """
    by_malloc = any(name.startswith("MALLOC_") for name in os.environ)
    by_tunables = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if by_malloc or by_tunables or platform.libc_ver()[0] != "glibc":
        return
    for number, value in MALLOC_SETTINGS.values():
        ctypes.CDLL(None).mallopt(number, value)


def _computes_on_cpu() -> bool:
    """Whether jax will compute on the CPU, as far as is known before it starts.

    It will if no plugin for another device is installed.
    """
    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))


def _cache_folder():
    """The folder for programs compiled for this kind of CPU.

    A program compiled for another CPU may contain illegal instructions.
    """
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    kind = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    kind = kind or set(lines[:1])
    hashed = hashlib.blake2b(repr(sorted(kind)).encode(), digest_size=8).hexdigest()
    return user_cache() / f"xla/jaxlib-{jaxlib.__version__}-{hashed}"
