"""Which files are images, by their endings, and which package opens them."""

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Iterable
from typing import NamedTuple

from PIL import Image, TiffImagePlugin

from ddpm_jax.data.array_files import is_array
from ddpm_jax.data.names import ending as ending_of
from ddpm_jax.data.names import endings as counted_endings


class Plugin(NamedTuple):
    """A package that teaches Pillow a format."""

    package: str
    module: str
    function: str | None
    """The function of the module that does so; None if importing the module does."""


HEIF = Plugin("pillow-heif", "pillow_heif", "register_heif_opener")
AVIF = Plugin("pillow-avif-plugin", "pillow_avif", None)
JXL = Plugin("pillow-jxl-plugin", "pillow_jxl", None)
PLUGINS = {".heic": HEIF, ".heif": HEIF, ".hif": HEIF, ".avif": AVIF, ".avifs": AVIF, ".jxl": JXL}

# How files begin that are HEIC and the like, whatever their ending says: after so many bytes.
STARTS = {
    (4, b"ftyphei"): HEIF,
    (4, b"ftyphev"): HEIF,
    (4, b"ftypmif1"): HEIF,
    (4, b"ftypavi"): AVIF,
    (0, b"\xff\x0a"): JXL,
    (0, b"\0\0\0\x0cJXL "): JXL,
}

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# No package lets Pillow open these. What they hold must be written as another format first.
CONVERTED = {
    "rawpy": (".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf", ".raw", ".rw2"),
    "imageio": (".exr", ".hdr"),
    "pydicom": (".dcm",),
    "cairosvg or pdf2image": (".eps", ".pdf", ".ps", ".svg"),
}


def image_files(names: Iterable[str]) -> list[str]:
    """Those of `names` (paths with /) with an image file's ending, sorted; hidden ones left out."""
    known = endings()
    return sorted(name for name in set(names) if _after_dot(name) in known and not _is_hidden(name))


def array_files(names: Iterable[str]) -> list[str]:
    """Those of `names` that hold arrays, .npy and .npz, sorted; hidden ones left out."""
    return sorted(name for name in set(names) if is_array(name) and not _is_hidden(name))


def unopened(names: Iterable[str]) -> str:
    """How many of `names` are images that cannot be opened, and what opens them; empty for none."""
    known = endings()
    by_remedy: dict[str, list[str]] = {}
    for name in names:
        last = ending_of(name)
        remedy = _remedy(last)
        if remedy and last not in known and not _is_hidden(name):
            by_remedy.setdefault(remedy, []).append(name)
    parts = [f"{counted_endings(of_it)} ({remedy})" for remedy, of_it in by_remedy.items()]
    return f"images that Pillow cannot open here: {'; '.join(parts)}" if parts else ""


def _remedy(ending: str) -> str | None:
    if ending in PLUGINS:
        return f"pip install {PLUGINS[ending].package} opens them"
    for package, opened in CONVERTED.items():
        if ending in opened:
            return f"convert them to PNG, for example with {package}"
    return None


def opener(file: bytes) -> str | None:
    """The package that may open `file`, which Pillow does not know; None if it is not known."""
    for (place, start), plugin in STARTS.items():
        if file.startswith(start, place):
            return plugin.package
    return None


def is_tiff(file: bytes) -> bool:
    """Whether `file` begins as a TIFF does."""
    return file.startswith(TIFF_STARTS)


def _after_dot(name: str) -> str:
    return "." + name.rpartition("/")[2].rpartition(".")[2].lower()


def _is_hidden(name: str) -> bool:
    parts = [part for part in name.split("/") if part not in (".", "..")]  # Some zips have these.
    return any(part.startswith((".", "__MACOSX")) for part in parts)


@functools.cache
def endings() -> dict[str, str]:
    """{".png": "PNG", ...}: the formats that are opened.

    Packages that teach Pillow another are used where they are installed. EPS is left out, because
    Pillow runs an interpreter on PostScript.
    """
    known = Image.registered_extensions()
    for plugin in {plugin for ending, plugin in PLUGINS.items() if ending not in known}:
        if importlib.util.find_spec(plugin.module):
            with contextlib.suppress(ImportError):  # It was built for another system.
                module = importlib.import_module(plugin.module)
                if plugin.function:
                    getattr(module, plugin.function)()
    _add_inverted_tiff()
    known = Image.registered_extensions()
    return {ending: name for ending, name in known.items() if name in Image.OPEN and name != "EPS"}


def _add_inverted_tiff() -> None:
    """16-bit greys of which 0 is white, with the high byte first: Pillow knows the low byte first.

    Both are read as they stand; `pixels.py` inverts them.
    """
    big_endian = (TiffImagePlugin.MM, 0, (1,), 1, (16,), ())
    modes: dict[tuple, tuple[str, str]] = TiffImagePlugin.OPEN_INFO
    modes.setdefault(big_endian, ("I;16B", "I;16B"))


@functools.cache
def _formats_after(first: str | None) -> tuple[str, ...]:
    return tuple(sorted(set(endings().values()), key=lambda name: (name != first, name)))


def formats(name: str) -> tuple[str, ...]:
    """All formats, with that of the name's ending first.

    Trying all of them can take longer than decoding a small image.
    """
    return _formats_after(endings().get(_after_dot(name)))
