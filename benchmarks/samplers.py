"""Every sampler with few steps: distance from the fine solution, FID, seconds an image.

    python benchmarks/samplers.py RUN [--out results.json] [--n 2048] [--steps 5 8 10 15 20 50]

A row is one sampler at one number of steps, by the names of `ddpm-jax figure steps`; 1000 steps
(T) of ancestral are --samplers ancestral --steps 1000. With --list, rows and their network calls
are printed and nothing is drawn. With --out, rows are kept as soon as they are there, and images
of the row at hand every minute: the same command resumes, and other rows join the file.

The distance is that of `evaluation.steps`, from held-back starts. FID is by the proxy unless
--inception is given, against the images that were not trained on where these are known. The time
is the median over batches; the first, which compiles, and those that other processes
disturbed do not count. A * marks a time for which there was no undisturbed batch.

--labels 0 1 2 draws from a model with classes: images have these labels in turn.

--checkpoints compares deterministic and stochastic sampling at every checkpoint of a run.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from rounds import FOREIGN, timed

from ddpm_jax import configure_jax
from ddpm_jax.calls.conditions import UNGUIDED, Guide
from ddpm_jax.devices.mesh import make_mesh
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.flow import fine_steps
from ddpm_jax.evaluation.steps import (
    STARTS,
    Contestant,
    FidJudge,
    contestants,
    distance,
    draw,
    draw_fine,
    fid_judge_of,
    fids,
)
from ddpm_jax.sampler import Sampler
from ddpm_jax.storage.files import npz, read_npz, write_file
from ddpm_jax.storage.measured import digest_of_errors
from ddpm_jax.weights.load import Loaded, load_weights

EVERY = 60
"""Seconds between two copies of the images of the row at hand."""

OVER_TRAINING = [
    Sampler("unipc", 50),
    Sampler("ddim", 100),
    Sampler("ancestral", 100),
    Sampler("sde-dpm-solver++", 20),
]


class Store:
    """The rows in a JSON file, and the images of the row at hand beside it; or in memory alone."""

    def __init__(self, path: str | None, about: dict):
        self.path = None if path is None else Path(path)
        self.about = about
        self.rows = []
        if self.path is not None and self.path.exists():
            there = json.loads(self.path.read_text())
            # Older files do not name these.
            measured = {"batch": 64, "labels": None} | there["about"]
            others = [name for name in about if measured.get(name) != about[name]]
            if others:
                raise UserError(
                    f"{path}: was measured with another {others[0]}; choose another --out"
                )
            self.rows = there["rows"]

    @property
    def unfinished(self) -> Path | None:
        """The file of the images of the row at hand."""
        return self.path and self.path.with_suffix(".unfinished.npz")

    def find(self, key: str) -> dict | None:
        """The row of `key`."""
        return next((row for row in self.rows if row["key"] == key), None)

    def add(self, row: dict) -> None:
        """Keeps a finished row in the place of one that was drawn otherwise."""
        same = (row["name"], row["steps"])
        self.rows = [each for each in self.rows if (each["name"], each["steps"]) != same]
        self.rows.append(row)
        if self.path is not None:
            content = json.dumps({"about": self.about, "rows": self.rows}, indent=1)
            write_file(self.path, content.encode())
            self.unfinished.unlink(missing_ok=True)

    def keep(self, key: str, images: list[np.ndarray], times: list[tuple[float, float]]) -> None:
        """Keeps the images of an unfinished row."""
        if self.path is not None:
            arrays = {"key": np.array(key), "images": np.stack(images), "times": np.array(times)}
            write_file(self.unfinished, npz(arrays))

    def kept(self, key: str) -> tuple[list[np.ndarray], list[tuple[float, float]]]:
        """The images of an unfinished row, in batches, and the times of these."""
        if self.path is None or not self.unfinished.exists():
            return [], []
        arrays = read_npz(self.unfinished)
        if str(arrays["key"]) != key:
            return [], []
        return list(arrays["images"]), [tuple(map(float, each)) for each in arrays["times"]]


def key_of(contestant: Contestant, model: Loaded) -> str:
    """Of a row: with a grid that is tuned again, or another calibration, it is another row."""
    options = json.dumps(contestant.sampler.recorded(model.ddpm.config.diffusion))
    measured = digest_of_errors(model.ddpm, contestant.sampler)
    return f"{contestant.name} {contestant.steps} {options} {measured or ''}".rstrip()


def drawn_and_timed(
    store: Store, key: str, model: Loaded, sampler: Sampler, options: argparse.Namespace
) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """(images [N,H,W,C], (seconds, part of others) of each batch that did not compile)."""
    batches, times = store.kept(key)
    compiles = True
    said = time.monotonic()
    size = options.batch_size
    while len(batches) * size < options.n:
        drawn = []
        start = len(batches) * size

        def call(drawn=drawn, start=start):
            images = draw(
                model,
                sampler,
                options.seed,
                start,
                size,
                lambda calls: None,
                batch_size=size,
                guide=guide_of(options),
            )
            drawn.append(images)

        time_of_batch = timed(call)
        if not compiles:
            times.append(time_of_batch)
        compiles = False
        batches += drawn
        if time.monotonic() - said > EVERY:
            store.keep(key, batches, times)
            said = time.monotonic()
    return np.concatenate(batches)[: options.n], times


def row_of(contestant: Contestant, images, times, exact, judge: FidJudge | None, options) -> dict:
    """The numbers of a contestant from its images."""
    quiet = [seconds for seconds, foreign in times if foreign < FOREIGN]
    counted = quiet or [seconds for seconds, _ in times]
    far = distance(images, exact) if contestant.deterministic and exact is not None else None
    return {
        "name": contestant.name,
        "steps": contestant.steps,
        "sampler": contestant.sampler.options,
        "distance": far,
        "fid": {} if judge is None else fids(judge, images),
        "seconds": statistics.median(counted) / options.batch_size if counted else None,
        "quiet_batches": len(quiet),
    }


def one_model(options: argparse.Namespace, store: Store, model: Loaded, judge: FidJudge | None):
    """The rows of one model, printed as they are there."""
    chosen = chosen_of(model, options)
    if judge is None:
        chosen = [each for each in chosen if each.deterministic]
    left = [each for each in chosen if store.find(key_of(each, model)) is None]
    exact = None
    if any(each.deterministic for each in left):
        count = min(options.n, STARTS)
        exact = draw_fine(
            model, options.seed, 0, count, lambda calls: None, guide=guide_of(options)
        )
    for each in left:
        key = key_of(each, model)
        images, times = drawn_and_timed(store, key, model, each.sampler, options)
        store.add({"key": key} | row_of(each, images, times, exact, judge, options))
        print(line_of(store.rows[-1]), flush=True)


def guide_of(options: argparse.Namespace) -> Guide:
    """The labels that the images have in turn; none by default."""
    return UNGUIDED if options.labels is None else Guide(tuple(options.labels))


def over_training(options: argparse.Namespace, store: Store, judge: FidJudge):
    """The rows of every checkpoint, printed as they are there."""
    folders = (Path(options.run) / "checkpoints").iterdir()
    for step in sorted(int(folder.name) for folder in folders if folder.name.isdecimal()):
        model = load_weights(options.run, step=step, mesh=make_mesh())
        for sampler in OVER_TRAINING:
            name = f"step {step}, {sampler.name}"
            each = Contestant(name, model.ddpm.resolve(sampler), sampler.steps)
            key = key_of(each, model)
            if store.find(key) is not None:
                continue
            images, times = drawn_and_timed(store, key, model, each.sampler, options)
            row = row_of(each, images, times, None, judge, options)
            store.add({"key": key, "checkpoint": step} | row)
            print(line_of(store.rows[-1]), flush=True)


def chosen_of(model: Loaded, options: argparse.Namespace) -> list[Contestant]:
    """The contestants that the options name."""
    chosen = contestants(model.ddpm, options.steps, options.grids)
    names = dict.fromkeys(each.name for each in chosen)
    unknown = [name for name in options.samplers or [] if name not in names]
    if unknown:
        raise UserError(f"samplers: {unknown[0]!r} is not one of {'; '.join(names)}")
    return [each for each in chosen if not options.samplers or each.name in options.samplers]


def line_of(row: dict) -> str:
    """A row as it is printed while others are still missing."""
    words = [f"{row['name']:30} {row['steps']:5d} steps"]
    words.append(f"distance {plus_minus(row['distance'])}")
    words += [f"FID ({split}) {plus_minus(value)}" for split, value in row["fid"].items()]
    words.append(f"{seconds_of(row)} s/image")
    return "  ".join(words)


def plus_minus(estimate) -> str:
    """A number with its error."""
    return "" if estimate is None else f"{estimate[0]:.3g} ± {estimate[1]:.2g}"


def seconds_of(row: dict) -> str:
    """The time of an image; * where other processes disturbed every batch."""
    if row["seconds"] is None:
        return ""
    return f"{row['seconds']:.3g}{'' if row['quiet_batches'] else '*'}"


def tables(rows: list[dict], judge: FidJudge | None) -> str:
    """Markdown: a table of each quantity, a row a sampler, a column a number of steps."""
    quantities = {"distance from the fine solution, RMSE of 255": lambda row: row["distance"]}
    for split in judge.references if judge else {}:
        quantities[f"{judge.score} ({split})"] = lambda row, split=split: row["fid"].get(split)
    texts = []
    for title, value in quantities.items():
        texts.append(table(title, rows, lambda row, value=value: plus_minus(value(row))))
    texts.append(table("seconds an image", rows, seconds_of))
    return "\n\n".join(text for text in texts if text)


def table(title: str, rows: list[dict], cell) -> str:
    """One table; empty where no row has such a number."""
    cells = {(row["name"], row["steps"]): cell(row) for row in rows if cell(row)}
    if not cells:
        return ""
    steps = sorted({S for _, S in cells})
    lines = [f"| {title} | {' | '.join(map(str, steps))} |", "|---" * (len(steps) + 1) + "|"]
    for name in dict.fromkeys(name for name, _ in cells):
        numbers = " | ".join(cells.get((name, S), "") for S in steps)
        lines.append(f"| {name} | {numbers} |")
    return "\n".join(lines)


def main(options: argparse.Namespace) -> None:
    """Measures the rows that the options name; prints them, and all of the file as Markdown."""
    configure_jax()
    mesh = make_mesh()
    model = load_weights(options.run, mesh=mesh)
    guide_of(options).check(model.ddpm.config.model)
    if options.list:
        chosen = chosen_of(model, options)
        for each in chosen:
            print(f"{each.name:30} {each.steps:5d} steps  {each.calls:5d} calls")
        calls = sum(each.calls for each in chosen)
        print(f"{calls} network calls for each of {options.n} images")
        return
    shared = Path(options.out or "samplers.json").absolute().parent / "real"
    judge = None
    if options.judge:
        judge = fid_judge_of(model, options.data, options.inception, shared, mesh)
    about = {
        "of": "checkpoints" if options.checkpoints else model.label,
        "process": model.ddpm.process_digest,
        "samples": options.n,
        "batch": options.batch_size,
        "fine": list(fine_steps(model.ddpm.schedule.num_timesteps)),
        "seed": options.seed,
        "labels": options.labels,
        "features": judge.extractor.sha256 if judge else None,
        "real": {split: real.statistics.count for split, real in judge.references.items()}
        if judge
        else {},
        "device": jax.devices()[0].device_kind,
    }
    store = Store(options.out, about)
    if options.checkpoints:
        over_training(options, store, judge)
    else:
        one_model(options, store, model, judge)
    print()
    print(tables(store.rows, judge))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--n", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8, 10, 15, 20, 50])
    parser.add_argument("--samplers", nargs="+", help="their names, as --list prints them")
    parser.add_argument("--grids", action="store_true", help="all grids, not each default alone")
    parser.add_argument("--checkpoints", action="store_true")
    parser.add_argument("--list", action="store_true", help="print the rows and their calls alone")
    parser.add_argument("--no-judge", dest="judge", action="store_false", help="distances alone")
    parser.add_argument("--data", help="real images, as folder:PATH, npz:PATH or tfds:NAME")
    parser.add_argument("--inception", help="weights of FID's InceptionV3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--labels", type=int, nargs="+", help="classes that images have in turn")
    parser.add_argument("--out", help="JSON file that keeps the rows")
    try:
        main(parser.parse_args())
    except UserError as error:
        raise SystemExit(f"samplers.py: {error}") from None
