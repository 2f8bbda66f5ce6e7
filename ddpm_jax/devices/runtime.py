"""Settings of jax: XLA's flags for CPUs, malloc's settings, and the cache of compiled programs."""

import ctypes
import hashlib
import importlib.util
import os
import platform
from pathlib import Path

import jax
import jaxlib

CPU_FLAGS = {
    # Use Eigen for convolutions: their gradients take three times as long with YNNPACK.
    "--xla_cpu_experimental_ynn_fusion_type": "-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION",
}
"""XLA flags that make the network faster on a CPU."""

KNOWN_TO = ("0.10.", "0.11.")
"""The versions of jaxlib that have CPU_FLAGS. An unknown flag would end the process."""

MALLOC_SETTINGS = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1)}
"""For glibc's mallopt, {name: (number, value)}: a single heap that keeps freed memory."""


def configure_jax(compile_cache: bool = True) -> None:
    """Makes jax faster on this machine. Call it before jax computes; the commands do so themselves.

    On a CPU, the CPU_FLAGS that XLA_FLAGS does not set yet are added to it. glibc's malloc gets
    MALLOC_SETTINGS, unless MALLOC_... or GLIBC_TUNABLES configure it.

    With `compile_cache`, compiled programs are stored in the user's cache folder, for this version
    of jaxlib and this kind of CPU, and later processes reuse them. Settings by
    JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE and
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS are kept.
    """
    if _computes_on_cpu():
        _keep_freed_memory()
        if jaxlib.__version__.startswith(KNOWN_TO):
            given = os.environ.get("XLA_FLAGS", "")
            missing = [f"{name}={value}" for name, value in CPU_FLAGS.items() if name not in given]
            os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()
    if not compile_cache:
        jax.config.update("jax_enable_compilation_cache", False)
    # jax adds its options as attributes at run time.
    elif jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(_cache_folder()))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def user_cache() -> Path:
    """This package's folder in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ddpm_jax"


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
