"""Settings for jax: faster on a CPU, never over the user's own, none at import."""

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

REPORT = """
import os, ddpm_jax
from ddpm_jax import DDPM
before = os.environ.get("XLA_FLAGS", "")
{call}
import jax
jax.jit(lambda x: x + 1)(1.0)
print(repr([before, os.environ.get("XLA_FLAGS", ""), jax.config.jax_compilation_cache_dir]))
"""

FAULTS = """
import resource, ddpm_jax
ddpm_jax.configure_jax(compile_cache=False)
import jax, numpy as np
many = jax.jit(lambda x: jax.numpy.square(x @ x.T) @ x)  # 100 MB of temporaries
x = np.ones((5000, 20), np.float32)
for repeat in range(15):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    many(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def huge_pages():
    file = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return file.exists() and "[always]" in file.read_text()


def report(tmp_path, call="ddpm_jax.configure_jax()", **environment):
    """[flags before, flags after, cache folder] of a process that runs `call`, then computes."""
    return eval(process(REPORT.format(call=call), {"XDG_CACHE_HOME": str(tmp_path), **environment}))


def process(program, environment):
    """What a fresh process prints, without the settings of this one."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("XLA_FLAGS", "MALLOC_", "GLIBC_"))
    }
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, env={**kept, **environment}, capture_output=True, text=True, check=True
    ).stdout


def test_flags_and_cache_are_set_when_asked_and_not_by_importing(tmp_path):
    before, flags, cache = report(tmp_path)
    assert before == "" and flags == f"{FLAG}={runtime.CPU_FLAGS[FLAG]}"
    assert (
        Path(cache).parent == tmp_path / "ddpm_jax/xla" and jaxlib.__version__ in Path(cache).name
    )


def test_what_the_user_set_stays(tmp_path):
    own = f"--xla_cpu_enable_fast_math=false {FLAG}="
    _, flags, cache = report(tmp_path, XLA_FLAGS=own, JAX_COMPILATION_CACHE_DIR=f"{tmp_path}/mine")
    assert flags == own and cache == f"{tmp_path}/mine"
    assert (
        "--xla_cpu_enable_fast_math=false --xla_cpu"
        in report(tmp_path, XLA_FLAGS="--xla_cpu_enable_fast_math=false")[1]
    )


def test_nothing_is_set_for_other_devices_or_an_unknown_jaxlib(tmp_path):
    """A flag that jaxlib does not know would end the process."""
    call = "import {0}; {0}.{1}; ddpm_jax.configure_jax()"
    assert report(tmp_path, call.format("jaxlib", '__version__ = "9.9.9"'))[1] == ""
    _, flags, _ = report(
        tmp_path, call.format("jax", 'config.update("jax_platforms", "cuda,cpu")'), JAX_PLATFORMS=""
    )
    assert flags == ""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is set")
@pytest.mark.skipif(
    huge_pages(), reason="the kernel gives huge pages unasked: there are few faults either way"
)
def test_temporaries_take_the_same_memory_again():
    """Page faults of a program with large temporaries, without and with a user's setting."""
    faults = [
        int(process(FAULTS, own))
        for own in (
            {},
            {"MALLOC_TOP_PAD_": "9999"},
            {"GLIBC_TUNABLES": "glibc.malloc.top_pad=9999"},
        )
    ]
    assert 10 * faults[0] < min(faults[1:]) > 50e6 / mmap.PAGESIZE, faults


def test_the_versions_that_know_the_flags_are_listed():
    """The installed jaxlib's library contains the names of the flags that it knows."""
    library = Path(jaxlib.__file__).parent / "libjax_common.so"
    with (
        open(library, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        known = all(
            content.find(name.removeprefix("--").encode()) >= 0 for name in runtime.CPU_FLAGS
        )
    assert known == jaxlib.__version__.startswith(runtime.KNOWN_TO)


@pytest.mark.parametrize("option", [["--no-compile-cache"], []])
def test_a_second_process_takes_what_the_first_compiled(run, tmp_path, option):
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")
    }
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_LOG_COMPILES": "1"}
    command = [
        sys.executable,
        "-c",
        "from ddpm_jax.cli import main; main()",
        "sample",
        str(run),
        *option,
    ]
    hits = []
    for number in range(2):
        command += ["--out", f"{tmp_path}/{number}.npz"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        hits.append(done.stderr.count("Persistent compilation cache hit"))
    if option:
        assert hits == [0, 0] and not (tmp_path / "ddpm_jax").exists()
    else:
        assert hits[0] == 0 < hits[1] and list((tmp_path / "ddpm_jax/xla").rglob("*-cache"))
    assert (tmp_path / "0.npz").read_bytes() == (tmp_path / "1.npz").read_bytes()
