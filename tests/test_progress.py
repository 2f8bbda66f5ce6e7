"""A bar where it can be seen, lines where it cannot."""

import contextlib
import fcntl
import os
import pty
import struct
import sys
import termios

import numpy as np
import pytest
from conftest import messages, on_one_device
from etils import epath

from ddpm_jax import fit
from ddpm_jax.devices.progress import progress_bar, shows_bar
from ddpm_jax.training import train
from ddpm_jax.training.logs import open_log


@contextlib.contextmanager
def terminal(columns, rows=24):
    """The number of a terminal's other end; standard error is that terminal, of this size."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    with open(theirs, "w") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        yield ours
    os.close(ours)


def shown(ours):
    """What has been written to the terminal, up to the word end."""
    print("end", file=sys.stderr, flush=True)
    seen = ""
    while "end" not in seen:
        seen += os.read(ours, 1000).decode()
    return seen


@pytest.mark.parametrize("columns", [0, 80])
def test_a_terminal_without_a_width_gets_lines(tmp_path, caplog, columns):
    caplog.set_level("INFO")
    with terminal(columns) as ours:
        log = open_log(epath.Path(tmp_path), 0, 3)
        for step in (1, 2, 3):
            log.advance()
            log.tick(step, {"loss": 0.25})
        log.close()
        seen = shown(ours)
    lines = [line for line in messages(caplog) if line.startswith("step ")]
    assert len(lines) == (3 if columns == 0 else 0)
    assert ("| 3/3 [" in seen) == (columns == 80)


def test_the_bar_of_other_commands_is_chosen_alike(monkeypatch):
    for columns in (0, 80):
        with terminal(columns):
            assert shows_bar() == (columns == 80)
            with progress_bar(total=2) as bar:
                assert bar.disable == (columns == 0)
    with terminal(80, rows=0):
        assert not shows_bar()
    with terminal(80):
        monkeypatch.setattr("ddpm_jax.devices.progress.is_first", lambda: False)
        assert not shows_bar()
    assert not shows_bar()


def test_a_line_says_that_the_program_is_compiled(tiny, pictures, tmp_path, caplog, monkeypatch):
    """Before the first update, at every start that makes one."""
    caplog.set_level("INFO")

    def stop(update, state, step):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Update, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(on_one_device(tiny), tmp_path / "run", np.asarray(pictures))
    said = messages(caplog)
    assert said[-1] == "compiling the update; the first step waits for it"
