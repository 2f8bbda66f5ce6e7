"""A fault of the surroundings is one line that names the setting to change, a bug a traceback."""

import errno
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import UserError, configure_jax
from ddpm_jax.cli import commands, main
from ddpm_jax.cli.faults import line_of
from ddpm_jax.devices import mesh, runtime


def raised(call):
    """The exception that `call` ends with."""
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


OUT_OF_MEMORY = {
    "device": lambda: jnp.zeros(2**45).block_until_ready(),
    "host": lambda: np.zeros(2**58),
}


@pytest.mark.parametrize("command", list(commands.COMMANDS))
@pytest.mark.parametrize("call", [OUT_OF_MEMORY["device"], OUT_OF_MEMORY["host"]])
def test_memory_that_runs_out_names_the_settings_of_the_command(capsys, monkeypatch, command, call):
    monkeypatch.setitem(commands.COMMANDS, command, lambda args: call())
    assert main([command]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("ddpm-jax: out of memory (")
    setting = {
        "train": "lower train.batch_size, raise train.accumulate or list levels in model.remat",
        "sample": "lower --batch-size",
        "edit": "lower --batch-size",
        "compress": "lower --batch-size",
        "decompress": "lower --batch-size",
        "likelihood": "lower --batch-size",
        "calibrate": "lower --batch-size",
        "tune": "lower --batch-size, or --images",
        "evaluate": "lower --batch-size",
        "plan": "plan a smaller model",
        "figure": "number of images",
        "report": "pass --compute none",
        "export": "machine with more memory",
    }
    assert setting[command] in said


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "lower --batch-size"),
        (OSError(errno.EMFILE, "Too many open files", "x.png"), "x.png'; raise the limit with"),
        (OSError(errno.ENOSPC, "No space left on device"), "make room on that disk"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (RuntimeError("INTERNAL: CUDNN_STATUS_ALLOC_FAILED\nmore"), "lower --batch-size"),
        (RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: out of memory"), "lower --batch-size"),
        (MemoryError(), "out of memory (MemoryError); lower"),
        (UserError("seed: no"), "seed: no"),
    ],
)
def test_faults_of_the_surroundings_are_one_line(error, says):
    line = line_of(error, "sample")
    assert says in line and "\n" not in line


@pytest.mark.parametrize("bug", [ValueError("x"), RuntimeError("x"), AssertionError(), KeyError(1)])
def test_a_bug_keeps_its_traceback(monkeypatch, bug):
    def fail(args):
        raise bug

    monkeypatch.setitem(commands.COMMANDS, "plan", fail)
    assert line_of(bug, "plan") is None
    assert raised(lambda: main(["plan"])) is bug


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize (set...)"), AssertionError()])
def test_devices_that_are_not_there_name_the_setting(monkeypatch, error):
    def no_devices():
        raise error

    monkeypatch.setattr(jax, "devices", no_devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    for call in (mesh.make_mesh, mesh.device_advice):
        said = str(raised(call))
        assert said.startswith("JAX_PLATFORMS=cuda: no device can be used here (")
        assert "set JAX_PLATFORMS=cpu" in said and "ddpm-jax[cuda12]" in said
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    assert "cuda12" not in str(raised(mesh.make_mesh))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--xla_no_such_flag=1", "Unknown flag in XLA_FLAGS: --xla_no_such_flag=1"),
        ("--xla_cpu_enable_fast_math=maybe", "interpret value maybe for flag xla_cpu_enable"),
        ("nowhere/flags.txt", 'Could not open file "nowhere/flags.txt"'),
        (".", "cannot read . ("),
    ],
)
def test_flags_that_would_end_the_process_are_one_line(monkeypatch, flags, says):
    monkeypatch.setenv("XLA_FLAGS", flags)
    with pytest.raises(UserError, match="correct or unset it") as caught:
        configure_jax()
    assert str(caught.value).startswith("XLA_FLAGS: ") and says in str(caught.value)
    assert os.environ["XLA_FLAGS"] == flags


def test_flags_in_a_file_are_kept_beside_those_that_are_added(monkeypatch, tmp_path):
    """XLA takes the whole variable for a file's name if it does not start with a dash."""
    file = tmp_path / "flags.txt"
    file.write_text("\n--xla_cpu_enable_fast_math=false\n--xla_cpu_enable_fast_min_max=true\n")
    monkeypatch.setenv("XLA_FLAGS", str(file))
    configure_jax()
    flags = os.environ["XLA_FLAGS"].split()
    assert flags[:2] == ["--xla_cpu_enable_fast_math=false", "--xla_cpu_enable_fast_min_max=true"]
    added = [f"{name}={value}" for name, value in runtime.CPU_FLAGS.items()]
    gets = runtime.jaxlib.__version__.startswith(runtime.FASTER_IN)
    assert flags[2:] == (added if gets else [])
    # The flags of what is not a list of flags are none, to XLA and here.
    file.write_text("# my flags\n--xla_no_such_flag=1")
    monkeypatch.setenv("XLA_FLAGS", str(file))
    configure_jax()
    assert "no_such" not in os.environ["XLA_FLAGS"]


def test_a_cache_that_cannot_be_written_is_one_line(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    before = jax.config.jax_compilation_cache_dir
    runtime._use_cache(tmp_path / "file/cache")
    assert len(caplog.messages) == 1 and "set XDG_CACHE_HOME" in caplog.text
    assert jax.config.jax_compilation_cache_dir == before


def test_a_user_without_a_home_has_a_cache(monkeypatch):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(runtime.Path, "expanduser", no_home)
    assert runtime.user_cache().name == "ddpm_jax"


def shell(line, **environment):
    """(exit code, stdout, stderr) of a line for bash in which $D is the command."""
    done = subprocess.run(
        ["bash", "-c", line],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "D": f"{sys.executable} -m ddpm_jax", **environment},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["--help", "tarin"])
def test_a_reader_that_has_left_is_no_error(tmp_path, unbuffered, command):
    reading, writing = os.pipe()
    os.close(reading)
    with open(tmp_path / "said", "w") as said, open(writing, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "ddpm_jax", command],
            stdout=pipe if command == "--help" else said,
            stderr=said if command == "--help" else pipe,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert done.returncode == (141 if command == "--help" else 2)
    assert (tmp_path / "said").read_text() == ""


def test_output_that_cannot_be_written_is_one_line():
    if not os.path.exists("/dev/full"):
        pytest.skip("only Linux has /dev/full")
    code, _, said = shell("$D --help > /dev/full", PYTHONUNBUFFERED="")
    assert code == 2 and said.startswith("ddpm-jax: ") and said.count("\n") == 1


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">&-", "2>&-", "<&-"])
def test_closed_streams_do_not_get_into_files(tmp_path, closed):
    """A file that is opened next would get the number of the standard output, and its junk."""
    code = """
import logging, os, sys
from ddpm_jax.cli.program import _log_to_stderr
from ddpm_jax.cli.streams import open_closed_streams
open_closed_streams()
_log_to_stderr()
with open("file", "wb") as file:
    for number in (1, 2):
        os.write(number, b"junk")
    print("more")
    logging.getLogger("ddpm_jax").warning("more")
    sys.stderr.write("more")
    file.write(f"{file.fileno() > 2} {sys.stdin.readline()!r}".encode())
"""
    (tmp_path / "code.py").write_text(code)
    line = f"cd '{tmp_path}'; {sys.executable} code.py {closed}"
    there = os.pathsep.join([os.getcwd(), *sys.path])
    assert shell(line, PYTHONPATH=there)[0] == 0
    assert (tmp_path / "file").read_text() == "True ''"


def test_an_interrupted_command_does_not_wait_for_what_would_crash_at_exit(tmp_path):
    """As jax does where it was compiling."""
    code = """
import atexit, os, sys
from ddpm_jax.cli import commands, program
def interrupted(args):
    atexit.register(os.abort)
    print("said before")
    raise KeyboardInterrupt
commands.COMMANDS["sample"] = interrupted
program._import_jax = lambda: None
sys.argv = ["ddpm-jax", "sample"]
sys.exit(program.main())
"""
    (tmp_path / "code.py").write_text(code)
    there = os.pathsep.join([os.getcwd(), *sys.path])
    code, out, said = shell(f"{sys.executable} {tmp_path}/code.py", PYTHONPATH=there)
    assert (code, out, said) == (130, "said before\n", "ddpm-jax: interrupted\n")


def test_a_plan_with_flags_that_would_end_the_process_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("XLA_FLAGS", "/nowhere/flags")
    assert main(["plan", "digits"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ddpm-jax: XLA_FLAGS: ") and said.endswith("correct or unset it\n")
