"""Settings for jax: faster on a CPU, never over the user's own, none at import."""

import ctypes
import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path

import jaxlib
import pytest

from ddpm_jax.devices import runtime

FLAG = "--xla_cpu_experimental_ynn_fusion_type"
GETS_IT = jaxlib.__version__.startswith(runtime.FASTER_IN)
ADDED = f"{FLAG}={runtime.CPU_FLAGS[FLAG]}" if GETS_IT else ""

REPORT = """
import os, ddpm_jax
from ddpm_jax import DDPM
before = os.environ.get("XLA_FLAGS", "")
{call}
import jax
{then}
flags, config = os.environ.get("XLA_FLAGS", ""), jax.config
seconds = config.jax_persistent_cache_min_compile_time_secs
print(repr([before, flags, config.jax_compilation_cache_dir, seconds]))
"""

COMPUTE = "jax.jit(lambda x: x + 1)(1.0)"


def report(tmp_path, call="ddpm_jax.configure_jax()", then=COMPUTE, **environment):
    """The settings of a fresh process that runs `call`, then `then`.

    XLA's flags before and after, the cache's folder, and how many seconds of compiling a program
    must take to be kept there. Of the user's settings there are those of `environment` alone.
    """
    others = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("XLA_FLAGS", "JAX_", "MALLOC_", "GLIBC_"))
    }
    environment = {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path), **environment}
    command = [sys.executable, "-c", REPORT.format(call=call, then=then)]
    done = subprocess.run(
        command, env={**others, **environment}, capture_output=True, text=True, check=True
    )
    return eval(done.stdout)


def test_flags_and_cache_are_set_when_asked_and_not_by_importing(tmp_path):
    before, flags, cache, seconds = report(tmp_path)
    assert before == "" and flags == ADDED
    assert seconds == 0.1
    assert (
        Path(cache).parent == tmp_path / "ddpm_jax/xla" and jaxlib.__version__ in Path(cache).name
    )


def test_what_the_user_set_stays(tmp_path):
    own = f"--xla_cpu_enable_fast_math=false {FLAG}="
    mine = {"JAX_COMPILATION_CACHE_DIR": f"{tmp_path}/mine"}
    mine |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "7"}
    _, *found = report(tmp_path, XLA_FLAGS=own, **mine)
    assert found == [own, f"{tmp_path}/mine", 7]
    one = "--xla_cpu_enable_fast_math=false"
    assert report(tmp_path, XLA_FLAGS=one)[1] == f"{one} {ADDED}".strip()


def test_nothing_is_set_for_other_devices_or_an_unknown_jaxlib(tmp_path):
    """A flag that jaxlib does not know would end the process."""
    call = "import {0}; {0}.{1}; ddpm_jax.configure_jax()"
    assert report(tmp_path, call.format("jaxlib", '__version__ = "9.9.9"'))[1] == ""
    # Nothing is computed: a GPU that is here may be full.
    for_gpus = call.format("jax", 'config.update("jax_platforms", "cuda,cpu")')
    assert report(tmp_path, for_gpus, then="", JAX_PLATFORMS="")[1] == ""


class Library:
    """In the C library's place, remembers what mallopt is called with."""

    def __init__(self):
        self.calls = []

    def mallopt(self, number, value):
        self.calls.append((number, value))
        return 1


@pytest.fixture
def library(monkeypatch):
    """A machine with glibc, where nothing is said of malloc."""
    for name in list(os.environ):
        if name.startswith(("MALLOC_", "GLIBC_")):
            monkeypatch.delenv(name)
    library = Library()
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(runtime.platform, "libc_ver", lambda: ("glibc", "2.36"))
    return library


def test_malloc_keeps_what_is_freed(library):
    """As <malloc.h> numbers it: M_TRIM_THRESHOLD -1, M_MMAP_MAX -4, M_ARENA_MAX -8."""
    runtime.configure_jax()
    assert sorted(library.calls) == [(-8, 1), (-4, 0), (-1, -1)]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is set")
def test_malloc_takes_what_it_is_set_to():
    """It is what conftest.py's configure_jax has set already."""
    mallopt = ctypes.CDLL(None).mallopt
    assert [mallopt(*setting) for setting in runtime.MALLOC_SETTINGS.values()] == [1, 1, 1]


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_TOP_PAD_", "9999"), ("GLIBC_TUNABLES", "glibc.malloc.top_pad=9999")],
)
def test_malloc_is_left_alone_where_the_user_set_it(library, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    runtime.configure_jax()
    assert library.calls == []


def test_malloc_is_left_alone_for_other_devices_and_libraries(library, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "_computes_on_cpu", lambda: False)
        runtime.configure_jax()
    monkeypatch.setattr(runtime.platform, "libc_ver", lambda: ("", ""))
    runtime.configure_jax()
    assert library.calls == []


def test_the_versions_that_are_listed_know_the_flags():
    """The installed jaxlib's library contains the names of the flags that it knows."""
    (library,) = Path(jaxlib.__file__).parent.glob("libjax_common.*")  # .dylib on a Mac.
    with (
        open(library, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        known = all(
            content.find(name.removeprefix("--").encode()) >= 0 for name in runtime.CPU_FLAGS
        )
    assert known or not GETS_IT


@pytest.mark.parametrize("option", [["--no-compile-cache"], []])
def test_a_second_process_takes_what_the_first_compiled(run, tmp_path, option):
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")
    }
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_EXPLAIN_CACHE_MISSES": "1"}
    # On a fast machine nothing here takes the tenth of a second from which on programs are kept.
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [
        sys.executable,
        "-c",
        "from ddpm_jax.cli import main; main()",
        "sample",
        str(run),
        *option,
    ]
    misses = []
    for number in range(2):
        command += ["--out", f"{tmp_path}/{number}.npz"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        misses.append(done.stderr.count("PERSISTENT COMPILATION CACHE MISS"))
    if option:
        assert misses == [0, 0] and not (tmp_path / "ddpm_jax").exists()
    else:
        assert misses[0] > 0 == misses[1] and list((tmp_path / "ddpm_jax/xla").rglob("*-cache"))
    assert (tmp_path / "0.npz").read_bytes() == (tmp_path / "1.npz").read_bytes()
