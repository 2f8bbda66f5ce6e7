"""The file: a head, then layers, each with its length and checksum. See docs/codec.md.

A file may end anywhere after its head: a layer that is not whole is dropped.
"""

import dataclasses
import struct
import zlib

from ddpm_jax.errors import UserError

MAGIC = b"\x89ddpm\r\n"
VERSION = 1

DIGESTS = ("parameters", "process", "calibration")
"""What a file is of, 8 bytes each."""

MOST_IMAGES = 2**24
MOST_CANDIDATES = 24
"""The most candidates of a group, as a power of two."""

LOSSLESS = 1
LABELLED = 2
"""Bits of the head's flags."""


@dataclasses.dataclass(frozen=True)
class Head:
    """What a file says before its layers."""

    digests: dict[str, str]
    """By the names of DIGESTS, in hexadecimal."""
    generator: bytes
    """The self-check of the random generator."""
    image_shape: tuple[int, int, int]
    count: int
    """Number of images."""
    seed: int
    candidates: int
    """log2 of the candidates of a group."""
    timesteps: tuple[int, ...]
    """The chain, ascending."""
    groups: tuple[int, ...]
    """Expected groups of each step, from noise to the image."""
    labels: tuple[int, ...] | None
    """The classes of the images, -1 for none."""
    lossless: bool
    """Whether a last layer makes the images exact."""

    @property
    def num_layers(self) -> int:
        """The layers of the whole file."""
        return len(self.groups) + self.lossless


def head_bytes(head: Head) -> bytes:
    """The head as it begins a file."""
    body = b"".join(bytes.fromhex(head.digests[name]) for name in DIGESTS) + head.generator
    flags = LOSSLESS * head.lossless + LABELLED * (head.labels is not None)
    steps = _differences(head.timesteps)
    numbers = [*head.image_shape, head.count, head.seed, head.candidates, flags]
    numbers += [len(steps), *steps, *head.groups]
    numbers += [label + 1 for label in head.labels or ()]
    body += b"".join(map(varint, numbers))
    return MAGIC + bytes([VERSION]) + varint(len(body)) + body + _checksum(body)


def read_head(data: bytes) -> tuple[Head, int]:
    """(the head that `data` begin with, the number of its bytes).

    Raises UserError if they do not begin with one.
    """
    if not data.startswith(MAGIC):
        raise UserError("file: was not written by ddpm-jax compress; name one that was")
    version = data[len(MAGIC) : len(MAGIC) + 1]
    if version and version[0] > VERSION:
        raise UserError(
            f"file: is of format {version[0]}, and this version of ddpm-jax reads {VERSION}; "
            "update it"
        )
    short = UserError("file: ends within its head, so nothing can be seen of it; get more of it")
    try:
        length, start = read_varint(data, len(MAGIC) + 1)
    except IndexError as error:
        raise short from error
    end = start + length + CHECKSUM.size
    if end > len(data) and length < len(data) + 2**20:
        raise short
    body = data[start : start + length]
    if version != bytes([VERSION]) or data[start + length : end] != _checksum(body):
        raise UserError("file: its head is damaged; get the file again")
    try:
        return _parsed(body), end
    except (IndexError, ValueError) as error:
        raise UserError("file: its head makes no sense; get the file again") from error


def layer_bytes(payload: bytes) -> bytes:
    """A layer as it stands in a file."""
    return varint(len(payload)) + _checksum(payload) + payload


def read_layers(data: bytes, start: int, most: int) -> list[bytes]:
    """The payloads of the whole layers from `start` on, at most so many.

    Raises UserError naming one that is damaged, or if anything follows the last.
    """
    layers: list[bytes] = []
    while len(layers) < most:
        try:
            length, begin = read_varint(data, start)
        except IndexError:
            return layers
        begin += CHECKSUM.size
        if begin + length > len(data):
            return layers
        payload = data[begin : begin + length]
        if data[begin - CHECKSUM.size : begin] != _checksum(payload):
            raise UserError(
                f"file: layer {len(layers) + 1} of {most} is damaged; get the file again, or cut "
                f"it off after {start} bytes"
            )
        layers.append(payload)
        start = begin + length
    if start < len(data):
        raise UserError(f"file: {len(data) - start} bytes follow its end; cut them off")
    return layers


CHECKSUM = struct.Struct("<H")


def _checksum(data: bytes) -> bytes:
    """The lower half of CRC-32: layers of one small image are not much longer."""
    return CHECKSUM.pack(zlib.crc32(data) & 0xFFFF)


def varint(number: int) -> bytes:
    """A number from 0 on, seven bits a byte, the lowest first; more follow where bit 7 is set."""
    encoded = bytearray()
    while number >= 128:
        encoded.append(number & 127 | 128)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def read_varint(data: bytes, start: int) -> tuple[int, int]:
    """(the number, where the next begins). Raises IndexError where `data` end before it."""
    number = 0
    for place in range(10):
        byte = data[start + place]
        number |= (byte & 127) << 7 * place
        if byte < 128:
            return number, start + place + 1
    return number, start + 10


def _differences(timesteps: tuple[int, ...]) -> list[int]:
    return [timesteps[0], *(b - a for a, b in zip(timesteps[:-1], timesteps[1:], strict=True))]


def _parsed(body: bytes) -> Head:
    """The head in `body`. Raises IndexError or ValueError if it is not one."""
    digests = {name: body[8 * i : 8 * i + 8].hex() for i, name in enumerate(DIGESTS)}
    place = 8 * len(DIGESTS)
    generator = body[place : place + GENERATOR]
    place += GENERATOR

    def numbers(count: int) -> list[int]:
        nonlocal place
        found = []
        for _ in range(count):
            number, place = read_varint(body, place)
            if number >= 2**32:
                raise ValueError("numbers out of range")
            found.append(number)
        return found

    height, width, channels, count, seed, candidates, flags, steps = numbers(8)
    if not 1 <= count <= MOST_IMAGES or not 1 <= candidates <= MOST_CANDIDATES:
        raise ValueError("numbers out of range")
    timesteps: list[int] = []
    for difference in numbers(min(steps, len(body))):
        timesteps.append(difference + (timesteps[-1] if timesteps else 0))
    groups = tuple(numbers(len(timesteps) - 1))
    labels = tuple(label - 1 for label in numbers(count)) if flags & LABELLED else None
    rising = all(a < b for a, b in zip(timesteps[:-1], timesteps[1:], strict=True))
    if place != len(body) or flags >= 4 or len(timesteps) < 2 or not rising or min(groups) < 1:
        raise ValueError("numbers out of range")
    return Head(
        digests,
        generator,
        (height, width, channels),
        count,
        seed,
        candidates,
        tuple(timesteps),
        groups,
        labels,
        bool(flags & LOSSLESS),
    )


GENERATOR = 8
"""Bytes of the self-check."""
