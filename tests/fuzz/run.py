"""Reads damaged files with every reader of the package.

    PYTHONPATH=.:tests python -m fuzz.run [--reader NAME [--case N]] [--seed N] [--times X]

Each case is a function of the seed, the reader's name and the case's number. It ends in a result
that the reader's test finds plausible, or in a UserError of one printable line; without a warning,
a line on stderr, a changed hook or file, and without memory that a file only declares.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

from ddpm_jax.errors import UserError
from fuzz.reader import files_of
from fuzz.watch import Watch, at_most, changed, hooks, open_files

SEED = 0
SECONDS = 60
"""Of computing, for one small file: more is a reader that hangs."""
HEADROOM = 2**30
"""Bytes of addresses that reading may take. A file has at most a million bytes."""
LONGEST = 2000
"""Characters of a message that a user reads."""
PIXELS = 2**22
"""Image.MAX_IMAGE_PIXELS, which is the user's to set, and which the package keeps to."""


def main():
    """Writes the figures as JSON to stdout; the faults are among them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--reader")
    parser.add_argument("--case", type=int)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--times", type=float, default=1, help="times the usual number of cases")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of computing, a case")
    parser.add_argument("--now", help="a file for the case that is being read")
    options = parser.parse_args()
    readers = [each for each in all_readers() if options.reader in (None, each.name)]
    with started(options) as runner:
        for reader in readers:
            runner.warm_up(reader)
        runner.limit_memory()
        figures = [runner.run(reader) for reader in readers]
    json.dump({"seed": options.seed, "readers": figures}, sys.stdout, indent=1)


def all_readers():
    """Those of every room, and the process as they need it."""
    from PIL import Image

    from fuzz import arrays, checkpoints, deep, images, models, prepared_sets, runs

    Image.MAX_IMAGE_PIXELS = PIXELS
    models.use_small_inception()
    rooms = (images, deep, arrays, prepared_sets, runs, models, checkpoints)
    return [reader for room in rooms for reader in room.READERS]


@contextlib.contextmanager
def started(options):
    """A Runner. Until it ends, stderr is a file that it looks at."""
    with tempfile.TemporaryDirectory() as scratch, open(f"{scratch}/stderr", "a+b") as stderr:
        screen = os.dup(2)
        os.dup2(stderr.fileno(), 2)
        try:
            yield Runner(Path(scratch), Watch(stderr), options)
        finally:
            os.dup2(screen, 2)


class Runner:
    """Makes, damages and reads the files of one case after another."""

    def __init__(self, scratch, watch, options):
        self.scratch = scratch
        self.watch = watch
        self.options = options

    def warm_up(self, reader):
        """Valid files are read; all that is imported, opened and compiled once is so now."""
        for case in range(8):
            rng = random.Random(f"valid {reader.name} {case}")
            folder = self._write(reader.valid(rng))
            word = reader.read(folder, rng)
            assert word != "left out", f"{reader.name}: valid file {case} was left out"
        self.watch.take()

    def limit_memory(self):
        """Lets the process have HEADROOM beside what it has; where the system can tell that."""
        status = Path("/proc/self/status")
        if not status.exists():
            return
        used = next(line for line in status.read_text().splitlines() if line.startswith("VmSize"))
        most = int(used.split()[1]) * 1024 + HEADROOM
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    def run(self, reader):
        """{reader, cases, outcomes, seconds, faults}."""
        start = time.monotonic()
        outcomes = collections.Counter()
        faults = {}
        cases = range(int(reader.cases * self.options.times))
        if self.options.case is not None:
            cases = [self.options.case]
        before = open_files()
        for case in cases:
            if self.options.now:  # If the reader hangs or crashes, this is where it did.
                Path(self.options.now).write_text(f"--reader {reader.name!r} --case {case}")
            word, found = self._run_case(reader, case)
            outcomes[word] += 1
            for fault, text in found:
                faults.setdefault(fault, {"fault": fault, "cases": [], "first": text})
                faults[fault]["cases"].append(case)
        left = open_files() - before
        if left > 8:
            fault = f"left {left} files open"
            faults[fault] = {"fault": fault, "cases": list(cases), "first": ""}
        return {
            "reader": reader.name,
            "cases": len(cases),
            "outcomes": dict(outcomes),
            "seconds": round(time.monotonic() - start, 1),
            "faults": list(faults.values()),
        }

    def _write(self, files):
        folder = self.scratch / "case"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return folder

    def _run_case(self, reader, case):
        """(word for the outcome, [(fault, more about it)])."""
        rng = random.Random(f"{self.options.seed} {reader.name} {case}")
        files = reader.edit(rng, reader.valid(rng))
        folder = self._write(files)
        before = hooks()
        faults = []
        try:
            with at_most(self.options.seconds):
                word = reader.read(folder, rng)
        except UserError as error:
            word = "refused"
            faults += _of_message(error)
        except BaseException as error:  # Whatever it is, it is no UserError.
            word = "fault"
            faults.append((_kind(error), traceback.format_exc()[-3000:]))
        faults += [(seen[:60], seen) for seen in self.watch.take()]
        faults += [(f"{name} was changed", "") for name in changed(before, hooks())]
        if reader.keeps and files_of(folder) != files:
            faults.append(("the files were changed", ""))
        return word, faults


def _of_message(error):
    """The faults of what a UserError says, and of what it comes from."""
    message = str(error)
    if not message.isprintable():
        yield f"not one printable line: {_place(error)}", repr(message)[:1000]
    if len(message) > LONGEST:
        yield f"a message of more than {LONGEST} characters: {_place(error)}", message[:1000]
    cause = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            yield f"memory taken first: {_place(error)}", f"{cause!r}: {message[:500]}"
        cause = cause.__cause__ or cause.__context__


def _kind(error):
    return f"{type(error).__name__}: {_place(error)}"


def _place(error):
    """The innermost line of the package or of the test in a traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "ddpm_jax" in frame.filename or "fuzz" in frame.filename]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"


if __name__ == "__main__":
    main()
