"""Figure 5 with real bytes: distortion against the size of a file, and what its prefixes show."""

import dataclasses
import io
from typing import Annotated, Any, ClassVar

import numpy as np
from etils import epath
from PIL import Image

from ddpm_jax.calibration import kl_bits
from ddpm_jax.compression import Asked, Compressed, compressed, decompress
from ddpm_jax.compression.checks import calibration_of
from ddpm_jax.compression.compress import GROUP_BITS, LEAST_GROUP_BITS, MOST_GROUP_BITS
from ddpm_jax.config import Positive, Range, Split
from ddpm_jax.ddpm import DDPM
from ddpm_jax.devices.progress import progress_bar
from ddpm_jax.evaluation.labels import labels_of
from ddpm_jax.evaluation.splits import first_of, read_split
from ddpm_jax.figures.base import OptionalSource, RunFigure
from ddpm_jax.figures.panel import Line, curves, image_table
from ddpm_jax.storage.files import write_file
from ddpm_jax.weights.load import Loaded

SHOWN = 6
"""Images whose prefixes are shown."""

PARTS = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
"""Of the bytes after the head."""

QUALITIES = (2, 5, 10, 20, 30, 50, 70, 85, 95)
"""Of JPEG and WebP."""

LOW = 1.0
"""Bits/dim up to which the second panel shows."""


@dataclasses.dataclass(frozen=True)
class Codec(RunFigure):
    """Distortion against actual bits, beside the ideal rate and JPEG, WebP and PNG, and strips."""

    n: Annotated[int, Range(min=1)] = 64
    """Number of images."""
    group_bits: Annotated[int, Range(min=LEAST_GROUP_BITS, max=MOST_GROUP_BITS)] = GROUP_BITS
    """As in `ddpm-jax compress`."""
    split: Split | None = None
    """Training, held-out or test images; None for test if data.test is set, else holdout."""
    batch_size: Positive | None = None
    """Images per batch; None for 64 per device."""
    data: OptionalSource = None
    """The split's images; None for the config's source."""

    name: ClassVar[str] = "codec"

    def draw(self) -> epath.Path:
        """Writes codec.png, codec-prefixes.png (the strips) and .npz.

        The .npz holds bits_per_dim and rmse [L] of the file after 0, 1, ... layers, and
        ideal_bits_per_dim and ideal_rmse [T]; likewise jpeg, webp and png.
        """
        model = self.load()
        split, _ = first_of(read_split(model, self.split, self.data), self.n)
        images = split.source.read(split.indices)
        labels = labels_of(model.ddpm, split)
        whole = self._compressed(model, images, labels)
        lines = lines_of(model.ddpm, whole, images)
        exact = [f"{name} {exact_bits(images, name):.2f}" for name in ("PNG", "WebP")]
        notes = [
            f"{split.split}, {len(images)} images. File: the first bytes of one file. Ideal: "
            "expected rate of all steps, by the calibration.",
            f"JPEG and WebP: one sheet of all images. Exact images: {', '.join(exact)} bits/dim.",
            self.footnote(model.words),
        ]
        picture = picture_of(lines, notes)
        path = self.path()
        strips = path.with_name(f"{path.stem}-prefixes.png")
        write_file(strips, self._strips(model, images[:SHOWN], labels))
        numbers = {}
        for name, line in lines.items():
            numbers[f"{name}_bits_per_dim"] = line.x
            numbers[f"{name}_rmse"] = line.y
        return self.write(picture, numbers)

    def _compressed(self, model: Loaded, images: np.ndarray, labels) -> Compressed:
        asked = Asked(
            labels=labels,
            seed=self.seed,
            group_bits=self.group_bits,
            batch_size=self.batch_size,
            progress=True,
        )
        return compressed(model.ddpm, model.params, images, asked)

    def _strips(self, model: Loaded, images: np.ndarray, labels) -> bytes:
        """The images of prefixes of their file, by both kinds of picture."""
        labels = None if labels is None else labels[: len(images)]
        whole = self._compressed(model, images, labels)
        head = whole.ends[0]
        columns = []
        names = []
        with progress_bar(total=2 * len(PARTS), desc="decompressing", unit="file") as bar:
            for part in PARTS:
                end = head + round(part * (len(whole.data) - head))
                names.append(f"{100 * part:g} %\n{8 * end / images.size:.2f} bits")
                for kind in ("x_0", "flow"):
                    prefix = whole.data[:end]
                    made = decompress(model.ddpm, model.params, prefix, picture=kind)
                    columns.append(made)
                    bar.update()
        x_0 = np.stack([*columns[::2], images], axis=1)
        flow = np.stack([*columns[1::2], images], axis=1)
        rows = [f"{kind}, image {i}" for i in range(len(images)) for kind in ("x_0", "flow")]
        table = np.stack([x_0, flow], axis=1).reshape(-1, *x_0.shape[1:])
        return image_table(
            table,
            rows=rows,
            columns=[*names, "image"],
            title="The pictures that the first bytes of a file give (Algorithm 4)",
            notes=[
                "x_0: the predicted image, which has the least error. flow: what DDIM draws from "
                "the last x_t. Bits: per dimension, the head included.",
                self.footnote(model.words),
            ],
        )


def picture_of(lines: dict[str, Line], notes: list[str]) -> bytes:
    """A PNG of all rates, and of low ones."""
    panel: dict[str, Any] = {
        "x": None,
        "xlabel": "bits/dim",
        "ylabel": "distortion (RMSE of 255)",
    }
    low = {name: _up_to(line, LOW) for name, line in lines.items()}
    return curves(
        [{**panel, "lines": lines, "yscale": "log"}, {**panel, "lines": low}],
        title="Distortion against the bits of a file (Fig. 5, with real bytes)",
        notes=notes,
    )


def lines_of(ddpm: DDPM, whole: Compressed, images: np.ndarray) -> dict[str, Line]:
    """Bits/dim and RMSE: of the file, of the ideal rate and of other formats."""
    rmse = np.sqrt(np.square(whole.rmse).mean(axis=1))
    lines = {
        "file": _line(8 * np.array(whole.ends) / images.size, rmse),
        "ideal": _line(*ideal(ddpm)),
    }
    sheet = sheet_of(images)
    for name in ("JPEG", "WebP"):
        points = [coded(sheet, name, quality=quality) for quality in QUALITIES]
        bits, errors = np.array(points).T
        lines[name] = _line(bits / images.size, errors)
    return lines


def sheet_of(images: np.ndarray) -> np.ndarray:
    """All images [N,H,W,C] one below another, as one picture [N H,W,1 or 3].

    Channels that no picture can have stand side by side.
    """
    if images.shape[-1] not in (1, 3):
        images = np.concatenate(np.split(images, images.shape[-1], axis=-1), axis=2)
    return images.reshape(-1, *images.shape[2:])


def exact_bits(images: np.ndarray, name: str) -> float:
    """Bits/dim of the images in a format that keeps every pixel."""
    sheet = sheet_of(images)
    options = {"lossless": True, "quality": 100, "method": 6} if name == "WebP" else {}
    return coded(sheet, name, **options)[0] / images.size


def ideal(ddpm: DDPM) -> tuple[np.ndarray, np.ndarray]:
    """(expected bits/dim sent before each step, RMSE there), from T - 1 down to 0."""
    mse = calibration_of(ddpm).mse
    kl = kl_bits(ddpm.schedule, mse, "fixed_small")
    steps = np.arange(len(mse) - 1)
    bits = np.append(0.0, np.cumsum(kl[steps, steps + 1][::-1]))
    return bits, 127.5 * np.sqrt(mse[::-1])


def coded(sheet: np.ndarray, name: str, **options: Any) -> tuple[float, float]:
    """(bits, RMSE of 255) of a picture uint8 [H,W,1 or 3] in another format."""
    file = io.BytesIO()
    image = Image.fromarray(sheet.squeeze(-1) if sheet.shape[-1] == 1 else sheet)
    image.save(file, name, **options)
    decoded = np.asarray(Image.open(file).convert(image.mode), np.float64).reshape(sheet.shape)
    return 8.0 * len(file.getvalue()), float(np.sqrt(np.square(decoded - sheet).mean()))


def _up_to(line: Line, bits: float) -> Line:
    kept = line.x <= bits
    return Line(line.x[kept], line.y[kept], line.error[kept])


def _line(bits: np.ndarray, rmse: np.ndarray) -> Line:
    return Line(np.asarray(bits), np.asarray(rmse), np.zeros_like(rmse))
