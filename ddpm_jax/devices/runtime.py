"""What jax runs with: XLA's flags for CPUs, malloc's settings, and the cache of compiled programs."""

import ctypes
import hashlib
import importlib.util
import os
import platform
from pathlib import Path

import jax
import jaxlib

CPU_FLAGS = {
    # Convolutions by Eigen: YNNPACK's gradients of them take three times as long.
    "--xla_cpu_experimental_ynn_fusion_type": "-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION",
}
"""What makes the network faster on a CPU."""

KNOWN_TO = ("0.10.", "0.11.")
"""The versions of jaxlib that know CPU_FLAGS: at a flag that it does not know, it ends the process."""


MALLOC_SETTINGS = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1)}
"""For glibc's mallopt, {name: (number, value)}: one heap, which keeps what is freed."""


def configure_jax(compile_cache: bool = True) -> None:
    """Sets what makes jax faster here; to be called before it computes anything. The commands do so by themselves.

    On a CPU, XLA_FLAGS get those of CPU_FLAGS that they do not name, and glibc's malloc gets MALLOC_SETTINGS, unless
    MALLOC_... or GLIBC_TUNABLES set any of its own. With `compile_cache`, compiled programs are kept in the user's
    cache folder, for this version of jaxlib and this kind of CPU, and taken from there by the next process. What
    JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE and JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS say stays.
    """
    if _computes_on_cpu():
        _keep_freed_memory()
        if jaxlib.__version__.startswith(KNOWN_TO):
            given = os.environ.get("XLA_FLAGS", "")
            missing = [f"{name}={value}" for name, value in CPU_FLAGS.items() if name not in given]
            os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()
    if not compile_cache:
        jax.config.update("jax_enable_compilation_cache", False)
    elif jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(_cache_folder()))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def user_cache() -> Path:
    """The folder of the user's cache that is for this package."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ddpm_jax"


def _keep_freed_memory() -> None:
    """Makes glibc's malloc keep what is freed.

    XLA frees the temporaries of a step after it. If they went back to the kernel, it would clear every page of them
    again for the next step.
    """
    own = any(name.startswith("MALLOC_") for name in os.environ)
    if (
        own
        or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
        or platform.libc_ver()[0] != "glibc"
    ):
        return
    for number, value in MALLOC_SETTINGS.values():
        ctypes.CDLL(None).mallopt(number, value)


def _computes_on_cpu() -> bool:
    """Whether jax will, as far as can be told before it starts: there is no plugin for anything else."""
    platforms = jax.config.jax_platforms
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))


def _cache_folder():
    """For programs that run on this kind of CPU: one compiled for another may end in an illegal instruction."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    kind = {line for line in lines if line.startswith(("model name", "flags", "Features"))} or set(
        lines[:1]
    )
    hashed = hashlib.blake2b(repr(sorted(kind)).encode(), digest_size=8).hexdigest()
    return user_cache() / f"xla/jaxlib-{jaxlib.__version__}-{hashed}"
