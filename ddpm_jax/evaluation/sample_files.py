"""The files of a folder of samples: one an image, in the data's own values."""

import dataclasses

import numpy as np
from etils import epath

from ddpm_jax.data.decode import decode_file, read_dtype
from ddpm_jax.data.deep_files import check_kind, image_file_bytes, is_file_of
from ddpm_jax.data.scaled import as_source
from ddpm_jax.ddpm import DDPM
from ddpm_jax.errors import UserError
from ddpm_jax.shapes import Array, Float


@dataclasses.dataclass(frozen=True)
class SampleFiles:
    """How images of a model are written into files, and read again."""

    ddpm: DDPM
    kind: str
    """.png, .tif or .npy."""

    def file(self, folder: epath.Path, i: int) -> epath.Path:
        """That of image i."""
        return folder / f"{i:06d}{self.kind}"

    def content(self, x: Float[Array, "h w c"]) -> bytes:
        """The file of one image in the model's units."""
        return image_file_bytes(self.ddpm.to_data(x), self.kind)

    def is_whole(self, content: bytes) -> bool:
        """Whether it is the file of such an image."""
        dtype = self.ddpm.scaling.dtype
        return is_file_of(content, self.kind, self.ddpm.image_shape, dtype)

    def read(self, file: epath.Path) -> np.ndarray:
        """The image in a file [H,W,C], as a Source gives it."""
        data = self.ddpm.config.data
        dtype = read_dtype(data.value_kind)
        values = decode_file(file.read_bytes(), data.image_shape, file.name, dtype).pixels
        return as_source(values, data)


def sample_files(ddpm: DDPM, kind: str | None = None) -> SampleFiles:
    """Those of files that end in `kind`; None is for PNG where the values allow it, else .npy.

    Raises UserError if such a file cannot hold the images.
    """
    channels = ddpm.image_shape[2]
    if kind is None:
        kind = ".png" if ddpm.levels and channels in (1, 3) else ".npy"
    try:
        check_kind(kind, channels, ddpm.scaling.dtype)
    except UserError as error:
        raise UserError(f"out: {error}") from error
    return SampleFiles(ddpm, kind)
