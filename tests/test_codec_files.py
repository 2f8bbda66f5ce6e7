"""Damaged and hostile files: one line, or something that can be decoded; little memory."""

import dataclasses
import itertools
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from coded import LABELS, images, model

from ddpm_jax.compression import Asked, compressed, decompress
from ddpm_jax.compression.checks import check_claim, check_head
from ddpm_jax.compression.decompress import read_steps
from ddpm_jax.compression.format import (
    MAGIC,
    MOST_CANDIDATES,
    VERSION,
    head_bytes,
    layer_bytes,
    read_head,
    read_layers,
    varint,
)
from ddpm_jax.errors import UserError

MANY = 1000


@pytest.fixture(scope="module")
def coder(tiny):
    return model(tiny)


@pytest.fixture(scope="module")
def file(coder):
    return compressed(*coder, images(), Asked(LABELS, lossless=True, group_bits=4))


def opened(coder, data):
    """(head, what the steps say) as `decompress` reads them; None and the message if it refuses.

    Without a coder the head is not compared with one.
    """
    try:
        head, start = read_head(data)
        if coder:
            check_head(head, *coder)
        layers = read_layers(data, start, head.num_layers)
        check_claim(head, layers)
        steps = read_steps(head, layers[: len(head.groups)])
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 300
        return None, str(error)
    for groups, step in zip(head.groups, steps, strict=False):
        assert len(step.levels) == len(step.numbers) == head.count
        assert groups >= 1
        assert all(1 <= each.size <= 64 and each.min() >= 0 for each in step.numbers)
    return head, steps


def test_truncated_files_end_with_their_last_whole_layer(file):
    for end in range(len(file.data) + 1):
        head, steps = opened(None, file.data[:end])
        if end < file.ends[0]:
            assert head is None and ("within its head" in steps or "written by" in steps)
        else:
            whole = int(np.searchsorted(file.ends, end, side="right")) - 1
            assert len(steps) == min(whole, len(head.groups))
    assert "bytes follow its end" in opened(None, file.data + b"\0")[1]


def test_flipped_files_are_refused_or_read(coder, file):
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(MANY):
        data = bytearray(file.data)
        for place in rng.integers(0, 8 * len(data), rng.integers(1, 4)):
            data[place // 8] ^= 1 << place % 8
        other_head = data[: file.ends[0]] != file.data[: file.ends[0]]
        refused += opened(coder if other_head else None, bytes(data))[0] is None
    assert refused > 0.9 * MANY


def test_foreign_files_are_refused(coder, file):
    rng = np.random.default_rng(1)
    starts = [b"", MAGIC, MAGIC + bytes([VERSION]), file.data[:30], b"\x89PNG\r\n\x1a\n", b"PK\x03"]
    for number in range(MANY):
        data = starts[number % len(starts)] + rng.bytes(rng.integers(0, 300))
        assert opened(coder, data)[0] is None
    newer = MAGIC + bytes([VERSION + 1]) + file.data[len(MAGIC) + 1 :]
    assert f"is of format {VERSION + 1}, and this version" in opened(coder, newer)[1]


HUGE = (2**7, 2**16, 2**24, 2**24 + 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64, 2**69)


def some_number(rng):
    """From 0 to beyond 64 bits."""
    return int(rng.choice(3)) if rng.random() < 0.5 else HUGE[rng.integers(len(HUGE))]


def hostile_head(rng, head):
    """A head with a right checksum, one to three of whose numbers are absurd."""
    count = int(rng.integers(1, 4))
    changed = {}
    for name in rng.choice(
        ["shape", "count", "seed", "candidates", "steps", "groups", "labels"], count
    ):
        number = some_number(rng)
        if name == "shape":
            changed["image_shape"] = (*head.image_shape[:2], number)
        elif name == "steps":
            size = int(rng.integers(1, 6))
            changed["timesteps"] = tuple(
                itertools.accumulate(some_number(rng) for _ in range(size))
            )
            changed["groups"] = tuple([1] * (size - int(rng.random() < 0.9)))
        elif name == "groups":
            changed["groups"] = tuple(some_number(rng) for _ in head.groups)
        elif name == "labels":
            labels = tuple(some_number(rng) - 1 for _ in range(int(rng.integers(0, 7))))
            changed["labels"] = None if rng.random() < 0.3 else labels
        else:
            changed[name] = number
    return dataclasses.replace(head, **changed)


def checked(body):
    """A head of this body, with its right length and checksum."""
    crc = struct.pack("<H", zlib.crc32(body) & 0xFFFF)
    return MAGIC + bytes([VERSION]) + varint(len(body)) + body + crc


def test_hostile_heads_are_refused_or_read(coder, file):
    head, start = read_head(file.data)
    rng = np.random.default_rng(2)
    refused = 0
    for _ in range(MANY):
        hostile = head_bytes(hostile_head(rng, head))
        refused += opened(coder, hostile + file.data[start:])[0] is None
    assert refused > 0.8 * MANY
    for size in (0, 5, 31, 32, 33, 40, 60, 200):
        for _ in range(40):
            assert opened(coder, checked(rng.bytes(size)))[0] is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"image_shape": (8, 8, 2)}, r"holds images of \[8, 8, 2\]"),
        ({"image_shape": (0, 0, 0)}, "holds images of"),
        ({"count": 0, "labels": None}, "makes no sense"),
        ({"count": 2**24 + 1, "labels": None}, "makes no sense"),
        ({"count": 6}, "makes no sense"),
        ({"seed": 2**32}, "makes no sense"),
        ({"candidates": 0}, "makes no sense"),
        ({"candidates": MOST_CANDIDATES + 1}, "makes no sense"),
        ({"timesteps": (3,), "groups": ()}, "makes no sense"),
        ({"timesteps": (3, 3, 9), "groups": (1, 1)}, "makes no sense"),
        ({"timesteps": (3, 30), "groups": (1,)}, "names steps that this model has not"),
        ({"timesteps": (3, 2**31), "groups": (1,)}, "names steps that this model has not"),
        ({"timesteps": (3, 29), "groups": (0,)}, "makes no sense"),
        ({"timesteps": (3, 29), "groups": (65,)}, "names groups of dimensions"),
        ({"timesteps": (3, 29), "groups": (2**31,)}, "names groups of dimensions"),
        ({"labels": (0, 1, 2, 0, 1)}, "names labels that this model has not"),
        ({"labels": (2**31, 1, 1, 0, 1)}, "names labels that this model has not"),
        ({"generator": bytes(8)}, "random generator here draws other numbers"),
        ({"generator": b"\xff" * 8}, "random generator here draws other numbers"),
    ],
)
def test_a_head_of_absurd_numbers_says_so(coder, file, changed, words):
    head, start = read_head(file.data)
    data = head_bytes(dataclasses.replace(head, **changed)) + file.data[start:]
    with pytest.raises(UserError, match=words):
        decompress(*coder, data)


def test_few_bytes_cannot_claim_many_images(coder, file):
    head, _ = read_head(file.data)
    claims = dataclasses.replace(head, count=2**24, labels=None)
    start = head_bytes(claims)
    little = layer_bytes(b"abc")
    fitting = dataclasses.replace(head, count=2**21, labels=None)  # 2^27 dimensions.
    tracemalloc.start()
    try:
        for data in (start, start + little, start + 2 * little):
            with pytest.raises(UserError, match="claims 16777216 images, and is too short"):
                decompress(*coder, data)
        with pytest.raises(UserError, match="too few bytes for what it claims"):
            decompress(*coder, head_bytes(fitting) + little)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**26
    few = dataclasses.replace(head, count=1000, labels=None)
    assert opened(coder, head_bytes(few))[1] == []


def test_hostile_layers_are_refused_or_read(coder, file):
    head, start = read_head(file.data)
    rng = np.random.default_rng(3)
    begin = file.data[:start]
    read = 0
    for number in range(MANY):
        payloads = [rng.bytes(rng.integers(0, 40)) for _ in range(rng.integers(1, 4))]
        if number % 3 == 0:
            payloads = [bytes([number % 256]) * int(rng.integers(0, 60))]
        found, _ = opened(None, begin + b"".join(map(layer_bytes, payloads)))
        read += found is not None
    assert 0 < read < MANY
    whole = read_layers(file.data, start, head.num_layers)
    for payload in (b"", b"\xff" * 50, rng.bytes(400), whole[0]):
        data = begin + b"".join(map(layer_bytes, [*whole[:-1], payload]))
        try:
            assert decompress(*coder, data).shape == images().shape
        except UserError as error:
            assert "nothing wrote" in str(error)
