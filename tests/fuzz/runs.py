"""Damaged records of a run: config.json, run.json, labels of results, metrics.jsonl."""

import json

import numpy as np
from etils import epath

from ddpm_jax.config import Config, from_dict, load_config, to_dict
from ddpm_jax.data.record import record
from ddpm_jax.data.sources import from_array
from ddpm_jax.storage import run as run_files
from ddpm_jax.storage.files import claim
from ddpm_jax.training.logs import RunLog
from fuzz.arrays import RUN, npz
from fuzz.edits import edit_bytes
from fuzz.formats import edit_npz
from fuzz.json_edits import edit_json
from fuzz.reader import Reader, edit_one, files_of

SHIPPED = RUN.parents[2] / "configs/digits.py"
OTHERS = ".others"
"""A file that says that the images are no longer those of the run."""
LABEL = {"parameters": "abc", "step": 2, "seed": 0, "diffusion": {"num_timesteps": 10}}


def _records():
    return {name: (RUN / name).read_bytes() for name in ("config.json", "run.json")}


def _valid_config(rng):
    config = rng.choice((Config(), from_dict(json.loads(_records()["config.json"]))))
    return {"config.json": json.dumps(to_dict(config)).encode()}


def _read_config(folder, rng):
    """A config whose fields are of their types, since writing and reading it changes nothing."""
    config = run_files.read_config(folder)
    assert isinstance(config, Config) and from_dict(to_dict(config)) == config
    assert run_files.is_run(folder)
    return "read"


def _read_python(folder, rng):
    """A file that defines CONFIG; it is executed, and a user's own code may raise anything."""
    assert isinstance(load_config(str(folder / "x.py")), Config)
    return "read"


def _read_record(folder, rng):
    assert isinstance(run_files.data_fingerprint(folder), str), "the fingerprint is no text"
    start = run_files.starts_from(epath.Path(folder))
    assert start is None or isinstance(start, dict), "init_from is no record"
    return "read"


def _source(seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    return from_array(images, (8, 8, 1))


def _valid_run(rng):
    source = _source()
    about = json.loads(_records()["run.json"])
    about |= {"data_fingerprint": source.fingerprint, "images": len(source)}
    return _records() | {
        "run.json": json.dumps(about).encode(),
        "data.npz": npz(**record(source)),
    }


def _edit_run(rng, files):
    """At times the images are others, too, so that the run's record of them is read."""
    name = rng.choice(sorted(files))
    edit = edit_npz if name == "data.npz" else edit_json
    others = {OTHERS: b""} if name == "data.npz" or rng.random() < 0.2 else {}
    return files | {name: edit(rng, files[name])} | others


def _start_run(folder, rng):
    """A run that resumes keeps its record; one that cannot is left as it is."""
    config = from_dict(json.loads(_records()["config.json"]))
    others = (folder / OTHERS).exists()
    before = files_of(folder)
    resumed = False
    try:
        with run_files.start_run(folder, config, _source(int(others)), "cpu"):
            resumed = True
            assert not others, "a run resumed with other images"
            after = json.loads((folder / "run.json").read_bytes())
            assert len(after["starts"]) == len(json.loads(before["run.json"])["starts"]) + 1
            assert run_files.read_config(folder) == config
    finally:
        now = files_of(folder)
        same = all(now[name] == content for name, content in before.items())
        assert resumed or same, "a run that cannot resume was changed"
    return "read"


def _read_label(folder, rng):
    """Results are taken for this label's, or the folder is left as it is."""
    before = (folder / "label.json").read_bytes()
    done = False
    try:
        claim(epath.Path(folder), "label.json", LABEL)
        done = True
    finally:
        after = (folder / "label.json").read_bytes()
        assert json.loads(after) == LABEL if done else after == before
    return "read"


def _valid_metrics(rng):
    lines = [json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, 9)]
    return {"metrics.jsonl": "".join(lines).encode()}


def _edit_metrics(rng, content):
    if rng.random() < 0.5:
        return edit_bytes(rng, content)
    lines = content.splitlines()
    at = int(rng.randrange(len(lines)))
    lines[at] = edit_json(rng, lines[at])
    return b"\n".join(lines) + b"\n"


def _read_metrics(folder, rng):
    """The lines up to the step stay, in their order; what is damaged is moved, not lost."""
    before = (folder / "metrics.jsonl").read_bytes()
    log = RunLog.__new__(RunLog)  # Without its bar and TensorBoard, which read nothing.
    log.workdir, log.lines_file = epath.Path(folder), epath.Path(folder / "metrics.jsonl")
    log._keep_lines_until(5)
    kept = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    steps = [json.loads(line)["step"] for line in kept]
    assert all(isinstance(step, int) and step <= 5 for step in steps), steps
    rest = iter(before.splitlines(keepends=True))
    assert all(line in rest for line in kept), "lines that were not there"
    aside = folder / "metrics.damaged"
    lost = aside.read_bytes().splitlines() if aside.exists() else []
    assert all(line in before for line in lost)
    return "read"


READERS = [
    Reader(
        "config.py",
        150,
        lambda rng: {"x.py": SHIPPED.read_bytes()},
        edit_one(edit_bytes),
        _read_python,
    ),
    Reader("config.json", 800, _valid_config, edit_one(edit_json), _read_config),
    Reader("run.json", 300, lambda rng: _records(), edit_one(edit_json, "run.json"), _read_record),
    Reader(
        "a run that resumes",
        300,
        _valid_run,
        _edit_run,
        _start_run,
        keeps=False,
    ),
    Reader(
        "label.json",
        200,
        lambda rng: {"label.json": json.dumps(LABEL).encode()},
        edit_one(edit_json),
        _read_label,
        keeps=False,
    ),
    Reader(
        "metrics.jsonl", 200, _valid_metrics, edit_one(_edit_metrics), _read_metrics, keeps=False
    ),
]
