"""Processes that decode small images, most of whose decoding no two threads of a process can share.

One process is started. It imports what decoding takes, once, and forks into a process a core: it
has no threads, which this one has. They speak over a pair of sockets each: a line of JSON with
names one way, the images' bytes the other way. They end when their socket does, as this process
does however it ends.
"""

import contextlib
import json
import os
import queue
import select
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image as Pillow
from PIL import ImageFile

from ddpm_jax.data.files import reader_of
from ddpm_jax.data.image_file import Decoder, Digest, Image, try_decode
from ddpm_jax.data.quiet import quiet_pillow

START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1])['path']; "
    "from ddpm_jax.data.decode_process import main; main()"
)
"""What the first process runs. It never runs the user's script, which may have no guard."""

HASH = 16
"""Bytes of a file's hash."""

FAILED, DECODED, ANEW = range(3)
"""How an image's answer begins: see `Decoded.anew`."""


class DecodeProcesses:
    """Processes that decode the images below `path` as `decoder` does; a context manager.

    Where they cannot be started, or end, there are none: `try_some` then gives None.
    """

    def __init__(self, path: str, decoder: Decoder, with_pixels: bool, count: int):
        self._decoder = decoder
        self._with_pixels = with_pixels
        self._waiting: queue.SimpleQueue[_Line] = queue.SimpleQueue()
        self._lines: list[_Line] = []
        self._process: subprocess.Popen | None = None
        with contextlib.suppress(OSError):  # Too many processes, or open files.
            self._start(path, count)

    def _start(self, path: str, count: int) -> None:
        pairs = [socket.socketpair() for _ in range(count)]
        theirs = [pair[1] for pair in pairs]
        numbers = [each.fileno() for each in theirs]
        order = {
            "path": sys.path,
            "images": path,
            "shape": self._decoder.image_shape,
            "dtype": self._decoder.dtype.str,
            "pixels": self._with_pixels,
            "limits": [Pillow.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES],
            "sockets": numbers,
        }
        with contextlib.ExitStack() as after:
            for each in theirs:
                after.callback(each.close)
            self._process = subprocess.Popen(
                [sys.executable, "-c", START, json.dumps(order)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=numbers,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for this process, which then ends them.
            )
        self._lines = [_Line(pair[0]) for pair in pairs]
        for line in self._lines:
            self._waiting.put(line)

    def __enter__(self) -> "DecodeProcesses":
        return self

    def __exit__(self, *_: object) -> None:
        has_begun = any(line.is_used for line in self._lines)
        for line in self._lines:
            line.close()
        if self._process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5 if has_begun else 0)
        self._process.kill()
        self._process.wait()

    def try_some(self, names: Sequence[str]) -> list[Image | None] | None:
        """The images of `names`, None for those that do not decode there.

        None instead of a list where no process is free to do so.
        """
        try:
            line = self._waiting.get_nowait()
        except queue.Empty:
            return None
        try:
            images = line.ask(names, self._read) if line.is_ready() else None
        except (OSError, EOFError):  # It has ended, for want of memory perhaps.
            return None
        self._waiting.put(line)
        return images

    def _read(self, file: BinaryIO, count: int) -> list[Image | None]:
        shape = self._decoder.image_shape
        dtype = self._decoder.dtype
        how = _exactly(file, count)
        hashes = _exactly(file, count * HASH).hex()
        pixels = np.empty((count, *shape), dtype)
        if self._with_pixels:
            size = pixels.nbytes
            pixels = np.frombuffer(_exactly(file, size), dtype).reshape(pixels.shape)
        return [
            Image(pixels[i], Digest(hashes[2 * HASH * i : 2 * HASH * (i + 1)], how[i] == ANEW))
            if how[i] != FAILED
            else None
            for i in range(count)
        ]


class _Line:
    """This process's end of the connection to one of the others."""

    def __init__(self, connection: socket.socket):
        self._socket = connection
        self._file = connection.makefile("rb")
        self.is_used = False
        """Whether the other process has said that it is there."""

    def is_ready(self) -> bool:
        """Whether the other is there. Raises EOFError or OSError if it has ended."""
        if not self.is_used and select.select([self._socket], [], [], 0)[0]:
            _exactly(self._file, 1)
            self.is_used = True
        return self.is_used

    def ask(self, names: Sequence[str], read: Callable) -> list[Image | None]:
        """The images of `names`, as `read` reads them. Raises as `is_ready` does."""
        self._socket.sendall(json.dumps(names).encode() + b"\n")
        return read(self._file, len(names))

    def close(self) -> None:
        """Ends the connection, and with it the other process."""
        with contextlib.suppress(OSError):  # It has ended before.
            self._socket.shutdown(socket.SHUT_RDWR)
        self._file.close()
        self._socket.close()


def _exactly(file: BinaryIO, size: int) -> bytes:
    content = file.read(size)
    if len(content) < size:
        raise EOFError
    return content


def main() -> None:
    """Forks into the processes that `sys.argv` asks for."""
    order = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")  # jax warns of forks, since it often has threads.
    decoder = decoder_of(order)
    for own in order["sockets"]:
        if os.fork():
            continue
        for other in order["sockets"]:
            if other != own:
                os.close(other)
        with contextlib.suppress(OSError), quiet_pillow():  # Once: it looks through all logs.
            serve(own, decoder, order["pixels"])
        os._exit(0)
    for each in order["sockets"]:
        os.close(each)
    for _ in order["sockets"]:
        os.wait()


def decoder_of(order: dict[str, Any]) -> Decoder:
    """The decoder that the process which sent `order` has; sets Pillow's limits as there."""
    Pillow.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = order["limits"]
    read = reader_of(Path(order["images"]).expanduser())
    return Decoder(read, tuple(order["shape"]), np.dtype(order["dtype"]))


def serve(descriptor: int, decoder: Decoder, with_pixels: bool) -> None:
    """Answers on the socket `descriptor` until it ends; OSError if that is amid an answer."""
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rwb") as file:
        file.write(b"!")
        file.flush()
        for line in file:
            file.write(_answer(json.loads(line), decoder, with_pixels))
            file.flush()


def _answer(names: Sequence[str], decoder: Decoder, with_pixels: bool) -> bytes:
    how = bytearray(len(names))
    hashes = bytearray(len(names) * HASH)
    shape = (len(names) if with_pixels else 0, *decoder.image_shape)
    pixels = np.zeros(shape, decoder.dtype)
    for i, name in enumerate(names):
        try:
            image = try_decode(decoder, name)
        except Exception:  # The other process tries for itself, and says what is wrong.
            continue
        if isinstance(image, Exception):
            continue
        how[i] = ANEW if image.digest.anew else DECODED
        hashes[i * HASH : (i + 1) * HASH] = bytes.fromhex(image.digest.file)
        if with_pixels:
            pixels[i] = image.pixels
    return bytes(how) + bytes(hashes) + pixels.tobytes()
