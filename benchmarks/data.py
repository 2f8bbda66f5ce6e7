"""How fast images come, by where they lie and how they are read: benchmarks/data.py [--config small32].

Images/s in batches of 64, at 32 (PNG) and 256 pixels (JPEG), medians of rounds that take turns; --config adds
the rate of that config's own training step, which is what they have to keep up with. The images are smooth
noise, written to a temporary folder.
"""

import argparse
import dataclasses
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from ddpm_jax.config import Data, load_config
from ddpm_jax.data import load_source, open_batches

BATCH, ROUNDS = 64, 5
COUNTS = {32: 4096, 256: 512}
ENDINGS = {32: "png", 256: "jpeg"}


def picture(size: int, i: int) -> Image.Image:
    """Smooth noise, different for each i."""
    rng = np.random.default_rng(i)
    coarse = Image.fromarray(rng.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8))
    return coarse.resize((size, size), Image.Resampling.BICUBIC)


def write(folder: Path, size: int) -> None:
    """The images as a folder, as files in `folder`/files, and as a data set of tfds."""
    (folder / "files").mkdir(parents=True)
    for i in range(COUNTS[size]):
        picture(size, i).save(folder / f"files/{i:06}.{ENDINGS[size]}", quality=90)

    class Noise(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """The same files."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image = tfds.features.Image(shape=(size, size, 3), encoding_format=ENDINGS[size])
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"image": image})
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, file in enumerate(sorted((folder / "files").iterdir())):
                yield i, {"image": file}

    Noise(data_dir=folder, file_format="array_record").download_and_prepare()


def paths(folder: Path, size: int) -> dict:
    """{name: (batches, how many of a Stream's may lie ready)}."""
    found = {}
    for kind in (f"folder:{folder}/files", "tfds:noise"):
        data = Data(source=kind, dir=str(folder), image_shape=(size, size, 3))
        name = kind.partition(":")[0]
        found[f"{name}, in memory"] = data, 0
        for workers in (0, 1, 2, 4):
            streamed = dataclasses.replace(data, cache_mb=0, workers=workers)
            found[f"{name}, streamed, {workers} workers"] = streamed, 4 * workers or 2
    return {name: (opened(data), ahead) for name, (data, ahead) in found.items()}


def opened(data: Data):
    """Batches of all images."""
    source = load_source(data)
    return open_batches(source, np.arange(len(source)), BATCH, 0, data)


def rate(batches, first: int, ahead: int, seconds: float) -> tuple[float, int]:
    """(images/s, next step), from step `first` on, without those that lay ready."""
    step = first
    while step <= first + ahead:
        batches.batch_at(step)
        step += 1
    start, started = time.perf_counter(), step
    while time.perf_counter() < start + seconds:
        batches.batch_at(step)
        step += 1
    return (step - started) * BATCH / (time.perf_counter() - start), step


def step_rate(name: str) -> tuple[int, float]:
    """(pixels a side, images/s) of the training step of the config `name`."""
    import ours

    config = load_config(name)
    size = config.train.batch_size
    step, times = (
        ours.training(
            config, ours.parameters(config), np.zeros((size, *config.data.image_shape), np.uint8)
        ),
        [],
    )
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return config.data.image_shape[0], size / float(np.median(times[1:]))


def main(config: str | None, seconds: float) -> None:
    """Writes, reads, prints."""
    table: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in COUNTS:
            write(Path(folder) / str(size), size)
            readers = paths(Path(folder) / str(size), size)
            steps, rates = dict.fromkeys(readers, 0), {name: [] for name in readers}
            for _ in range(ROUNDS):
                for name, (batches, ahead) in readers.items():
                    measured, steps[name] = rate(batches, steps[name], ahead, seconds)
                    rates[name].append(measured)
            for name, (batches, _) in readers.items():
                batches.close()
                table.setdefault(name, {})[size] = float(np.median(rates[name]))
    if config is not None:
        size, measured = step_rate(config)
        table[f"training step of {config}"] = {size: measured}
    print(f"{'images/s':32}" + "".join(f"{f'{size} px':>10}" for size in COUNTS))
    for name, row in table.items():
        cells = [row.get(size, math.nan) for size in COUNTS]
        print(
            f"{name:32}"
            + "".join(f"{'' if math.isnan(cell) else f'{cell:,.0f}':>10}" for cell in cells)
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    main(**vars(parser.parse_args()))
