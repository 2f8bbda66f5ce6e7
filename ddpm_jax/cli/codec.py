"""`ddpm-jax compress` and `decompress`: images as files, and their options."""

import dataclasses
import hashlib
import logging
from typing import Annotated, Any

import numpy as np
import tyro

from ddpm_jax.cli.options import Launch, Launched, ModelOptions, Path
from ddpm_jax.compression import Asked, Picture, compressed, decompress
from ddpm_jax.compression.checks import check_head
from ddpm_jax.compression.compress import GROUP_BITS, LEAST_GROUP_BITS, MOST_GROUP_BITS
from ddpm_jax.compression.format import read_head
from ddpm_jax.config import Positive, Range, Seed
from ddpm_jax.data.faults import cannot_read
from ddpm_jax.data.given import Given, given_images
from ddpm_jax.data.images import png
from ddpm_jax.data.names import shown
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.sample_files import sample_files
from ddpm_jax.storage.files import check_writable, claim, path_of, write_file
from ddpm_jax.weights.load import Loaded

log = logging.getLogger(__name__)

ENDING = ".ddpm"
LAUNCH = Launch()


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressOptions(ModelOptions):
    """Compress images into one file, every prefix of which gives a picture of each."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """Image files, or folders or zips of them."""
    rmse: Annotated[float | None, Range(above=0)] = None
    """Stop where the mean error is so many of 255 levels."""
    bits_per_dim: Annotated[float | None, Range(above=0)] = None
    """Stop before the file has more bits for each pixel and channel."""
    lossless: bool = False
    """Keep every pixel exactly."""
    labels: Annotated[tuple[int, ...] | None, Range(min=-1)] = None
    """Classes of the images, one for all or one each; -1 is no class. They are kept in the file."""
    group_bits: Annotated[int, Range(min=LEAST_GROUP_BITS, max=MOST_GROUP_BITS)] = GROUP_BITS
    """Bits that one number tells: more make a smaller file and take longer."""
    seed: Seed = 0
    """Random seed; kept in the file."""
    out: Path = "images.ddpm"
    """The file, which ends in .ddpm."""
    batch_size: Positive | None = None
    """Images per batch; None for 64 per device."""
    launch: Launched = LAUNCH

    def write(self, model: Loaded) -> str:
        """Compresses the images into the file; returns what is printed of each."""
        file = path_of(self.out)
        if file.suffix != ENDING:
            raise UserError(f"out: must end in {ENDING}, got {self.out}")
        check_writable(file)
        given = self._given(model.ddpm.image_shape)
        asked = Asked(
            labels=self._labels(),
            rmse=self.rmse,
            bits_per_dim=self.bits_per_dim,
            lossless=self.lossless,
            seed=self.seed,
            group_bits=self.group_bits,
            batch_size=self.batch_size,
            progress=True,
        )
        result = compressed(model.ddpm, model.params, given.images, asked)
        write_file(file, result.data)
        lines = [
            f"{shown(name)}: {bits / 8:.0f} bytes, {bits / given.images[0].size:.3f} bits/dim, "
            f"RMSE {rmse:.2f}"
            for name, bits, rmse in zip(given.names, result.bits, result.rmse[-1], strict=True)
        ]
        of_all = 8 * len(result.data) / given.images.size
        mean = float(np.sqrt(np.mean(np.square(result.rmse[-1]))))
        return "\n".join(
            [*lines, f"{file}: {len(result.data)} bytes, {of_all:.3f} bits/dim, RMSE {mean:.2f}"]
        )

    def _given(self, image_shape: tuple[int, int, int]) -> Given:
        if not self.images:
            raise UserError("images: are none; name image files, or folders or zips of them")
        parts = [given_images(path, image_shape, "images") for path in self.images]
        names = [name for part in parts for name in part.names]
        return Given(names, np.concatenate([part.images for part in parts]))

    def _labels(self) -> Any:
        if self.labels is None:
            return None
        return self.labels[0] if len(self.labels) == 1 else np.array(self.labels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecompressOptions(ModelOptions):
    """Make pictures of a compressed file, or of its beginning."""

    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.ddpm")]
    """What `ddpm-jax compress` wrote with the same model, or the first bytes of it."""
    picture: Picture = "x_0"
    """x_0 has the least error; flow looks like an image where few bytes are there."""
    out: Path = "decompressed"
    """Folder for the pictures: 000000.png, 000001.png, ... in the order of the images."""
    batch_size: Positive | None = None
    """Images per batch; None for 64 per device."""
    launch: Launched = LAUNCH

    def write(self, model: Loaded) -> str:
        """Writes the pictures; returns what is printed of them."""
        data = self.read()
        # What cannot be decoded shall leave no folder, and a folder of others no work undone.
        head, _ = read_head(data)
        check_head(head, model.ddpm, model.params)
        folder = path_of(self.out)
        claim(folder, "decompressed.json", self._label(model, data))
        images = decompress(
            model.ddpm,
            model.params,
            data,
            picture=self.picture,
            batch_size=self.batch_size,
            progress=True,
        )
        files = sample_files(model.ddpm, ".png")
        for number, image in enumerate(images):
            write_file(files.file(folder, number), png(image))
        return f"{folder}: {len(images)} images of {len(data)} bytes"

    def _label(self, model: Loaded, data: bytes) -> dict[str, Any]:
        """What the folder holds."""
        content = hashlib.blake2b(data, digest_size=8).hexdigest()
        return {**model.label, "file": content, "picture": self.picture}

    def read(self) -> bytes:
        """The file's content. Raises UserError if it cannot be read."""
        file = path_of(self.file)
        if not file.exists() or file.is_dir():
            raise UserError(f"file: {shown(self.file)} does not exist; name a {ENDING} file")
        try:
            return file.read_bytes()
        except OSError as error:
            raise cannot_read(shown(self.file), error) from error
