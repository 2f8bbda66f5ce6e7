"""Windows gets one line; what only Linux has is not needed on a Mac."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import ddpm_jax.storage
from ddpm_jax import UserError
from ddpm_jax.cli import commands, main

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("args", [[], ["--help"], *([name, "x"] for name in commands.COMMANDS)])
def test_windows_gets_one_line_that_names_wsl(monkeypatch, capsys, args):
    monkeypatch.setattr(sys, "platform", "win32")
    assert main(args) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("ddpm-jax: ddpm_jax does not run on Windows itself; install WSL")


def test_fit_and_load_refuse_windows_before_they_import_what_it_lacks(monkeypatch):
    """Both import the storage, whose files import fcntl."""
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(UserError, match="install WSL"):
        importlib.reload(ddpm_jax.storage)


# A Mac as far as Python can see: no glibc, no /proc, no mallopt, nothing of Linux alone in os.
MAC = """
import ctypes, os, pathlib, platform, sys
import jax
sys.platform = "darwin"
platform.libc_ver = lambda *args, **options: ("", "")
platform.processor = lambda: "arm"
for name in ("sched_getaffinity", "posix_fadvise", "memfd_create", "sendfile", "pidfd_open"):
    if hasattr(os, name):
        delattr(os, name)
exists, read_text = pathlib.Path.exists, pathlib.Path.read_text
def is_linux(path):
    return str(path).startswith("/proc")
def refuse(path, *args, **options):
    assert not is_linux(path), path
    return read_text(path, *args, **options)
pathlib.Path.exists = lambda path, **options: not is_linux(path) and exists(path, **options)
pathlib.Path.read_text = refuse
ctypes.CDLL = None
from ddpm_jax.devices.runtime import configure_jax
configure_jax()
from ddpm_jax.cli.streams import open_closed_streams
open_closed_streams()
print(jax.config.jax_compilation_cache_dir)
"""


def test_what_only_linux_has_is_not_needed(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": ":".join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", MAC],
        env={**environment, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path}/ddpm_jax/xla/")


@pytest.mark.parametrize(("name", "units"), [("darwin", 2**20), ("linux", 2**10)])
@pytest.mark.parametrize("benchmark", ["startup", "scaling"])
def test_peak_memory_is_in_bytes_on_a_mac(monkeypatch, benchmark, name, units):
    monkeypatch.setattr(sys, "platform", name)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.delitem(sys.modules, benchmark, raising=False)
    assert units == importlib.import_module(benchmark).UNITS_IN_MIB
    monkeypatch.delitem(sys.modules, benchmark)
