"""How fast images are read, by kind of source and way of reading.

    python benchmarks/data.py [--config small32]

Images/s in batches of 64, at 32 (PNG) and 256 pixels (JPEG): medians of alternating rounds.
--config adds the rate of that config's training step, which reading must keep up with. The images
are smooth noise, written to a temporary folder.
"""

import argparse
import dataclasses
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
    """A picture of smooth noise, different for each i."""
    rng = np.random.default_rng(i)
    coarse = Image.fromarray(rng.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8))
    return coarse.resize((size, size), Image.Resampling.BICUBIC)


def write(folder: Path, size: int) -> None:
    """Writes the images as files in `folder`/files and as a data set of tfds."""
    (folder / "files").mkdir(parents=True)
    for i in range(COUNTS[size]):
        picture(size, i).save(folder / f"files/{i:06}.{ENDINGS[size]}", quality=90)

    class Noise(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """A tfds data set of the same files."""

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
    """{name: (batches, number of batches that a Stream may have read ahead)}."""
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
    """Batches of all images of the source."""
    source = load_source(data)
    return open_batches(source, np.arange(len(source)), BATCH, 0, data)


def rate(batches, first: int, ahead: int, seconds: float) -> tuple[float, int]:
    """(images/s, next step), from step `first`, not counting the `ahead` batches read ahead."""
    step = first
    while step <= first + ahead:
        batches.batch_at(step)
        step += 1
    start = time.perf_counter()
    first_timed = step
    while time.perf_counter() < start + seconds:
        batches.batch_at(step)
        step += 1
    return (step - first_timed) * BATCH / (time.perf_counter() - start), step


def step_rate(name: str) -> tuple[int, float]:
    """(pixels per side, images/s) of the training step of the config `name`."""
    import ours

    config = load_config(name)
    size = config.train.batch_size
    images = np.zeros((size, *config.data.image_shape), np.uint8)
    step = ours.training(config, ours.parameters(config), images)
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return config.data.image_shape[0], size / float(np.median(times[1:]))


def main(config: str | None, seconds: float) -> None:
    """Writes the images, measures every way of reading them, and prints a table."""
    table: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in COUNTS:
            write(Path(folder) / str(size), size)
            readers = paths(Path(folder) / str(size), size)
            steps = dict.fromkeys(readers, 0)
            rates = {name: [] for name in readers}
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
        cells = [f"{row[size]:,.0f}" if size in row else "" for size in COUNTS]
        print(f"{name:32}" + "".join(f"{cell:>10}" for cell in cells))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="also measure the training step of this config")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds per measurement")
    main(**vars(parser.parse_args()))
