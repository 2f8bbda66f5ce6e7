"""What a file is made of: numbers, levels, edges, layers, pixels; both ways, at their limits."""

import dataclasses

import numpy as np
import pytest

from ddpm_jax.compression.chain import FINEST, edges
from ddpm_jax.compression.codec import Sent
from ddpm_jax.compression.format import (
    Head,
    head_bytes,
    layer_bytes,
    read_head,
    read_layers,
    read_varint,
    varint,
)
from ddpm_jax.compression.layers import Layers
from ddpm_jax.compression.levels import MOST, groups_at, next_levels
from ddpm_jax.compression.lossless import NEAR, SAFE, Pixels, level_means, resolved, rounded
from ddpm_jax.compression.numbers import (
    Counts,
    Reader,
    Writer,
    models,
    read_numbers,
    split_number,
    write_numbers,
)

SEEDS = range(30)


@pytest.mark.parametrize("bits", [0, 1, 7, 8, 31, 32, 63, 64, 69])
def test_varints_are_read_as_they_were_written(bits):
    for number in {max(0, 2**bits - 1), 2**bits, 2**bits + 1}:
        data = varint(number)
        assert len(data) == max(1, -(-number.bit_length() // 7))
        assert read_varint(b"\xff" + data + b"\x80", 1) == (number, 1 + len(data))
        for end in range(len(data)):
            with pytest.raises(IndexError):
                read_varint(data[:end], 0)
    assert varint(300) == b"\xac\x02"  # The example of Protocol Buffers.


def test_a_number_is_its_length_and_the_bits_behind():
    numbers = np.array([0, 1, 2, 3, 6, 7, 2**22 - 2, 2**22 - 1])
    lengths, rests = split_number(numbers)
    for number, length, rest in zip(numbers, lengths, rests, strict=True):
        assert bin(number + 1) == "0b1" + (format(rest, f"0{length}b") if length else "")


def numbers_of(rng, size):
    """Numbers below 2^18 of all lengths."""
    return np.minimum(2.0 ** rng.uniform(0, 18, size), 2**18 - 1).astype(np.int64) - (
        rng.random(size) < 0.1
    )


def test_arrays_are_read_in_the_order_they_were_written():
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        sizes = rng.integers(1, 40, 6)
        counts = Counts(np.array([96, 1, 1, 2**30]))
        lengths = Counts(np.ones(19, np.int64))
        means, deviations = rng.uniform(0, 255, sizes[0]), rng.uniform(0.05, 60, sizes[0])
        levels = rng.integers(0, 256, sizes[0])
        symbols = rng.integers(0, 4, sizes[1])
        numbers = [numbers_of(rng, size) for size in sizes[2:]]
        rests = rng.integers(0, 2**24, sizes[0])
        writer = Writer()
        writer.write_levels(levels, means, deviations)
        writer.write(symbols, counts.model)
        for each in numbers:
            write_numbers(writer, each, lengths)
        writer.write(rests, models.Uniform(2**24))
        reader = Reader(writer.bytes())
        np.testing.assert_array_equal(reader.read_levels(means, deviations), levels)
        np.testing.assert_array_equal(reader.read(counts.model, symbols.size), symbols)
        for each in numbers:
            np.testing.assert_array_equal(read_numbers(reader, each.size, lengths), each)
        np.testing.assert_array_equal(reader.read(models.Uniform(2**24), rests.size), rests)
        assert read_numbers(reader, 0, lengths).size == 0


def test_a_symbol_costs_what_its_count_says():
    rng = np.random.default_rng(0)
    first = np.array([50, 30, 15, 5])
    counts = Counts(first)
    symbols = rng.choice(4, 20_000, p=first / 100)
    writer = Writer()
    writer.write(symbols, counts.model)
    expected = -np.log2(first / 100)[symbols].sum()
    np.testing.assert_allclose(counts.bits(symbols).sum(), expected, rtol=1e-12)
    np.testing.assert_allclose(8 * len(writer.bytes()), expected, rtol=2e-3)
    counts.add(symbols)
    np.testing.assert_array_equal(counts.counts, first + np.bincount(symbols))


HEAD = Head(
    {"parameters": "00ff" * 4, "process": "12" * 8, "calibration": "ab" * 8},
    b"12345678",
    (28, 32, 3),
    3,
    2**32 - 1,
    18,
    (0, 1, 500, 999),
    (1, 300, 28 * 32 * 3),
    (-1, 0, 9),
    True,
)


def test_heads_and_layers_are_read_as_they_were_written():
    for changed in (
        {},
        {"labels": None},
        {"lossless": False, "count": 2**24, "labels": None},
        {"timesteps": (998, 999), "groups": (1,)},
    ):
        head = dataclasses.replace(HEAD, **changed)
        data = head_bytes(head)
        assert read_head(data + b"more") == (head, len(data))
    payloads = [b"", b"a", bytes(1000), b"\xff" * 128]
    data = b"".join(map(layer_bytes, payloads))
    assert read_layers(b"head" + data, 4, 4) == payloads
    ends = np.cumsum([0, *(len(layer_bytes(each)) for each in payloads)])
    for end in range(len(data)):
        whole = int(np.searchsorted(ends, end, side="right")) - 1
        assert read_layers(data[:end], 0, 4) == payloads[:whole]


@pytest.mark.parametrize("dimensions", [1, 2, 16, 100, 784])
def test_edges_make_as_many_groups_as_asked_of_about_equal_weight(dimensions):
    D = dimensions
    rng = np.random.default_rng(D)
    one = np.ones(D, np.int64)
    heavy = [one.copy() for _ in range(4)]
    for each, at in zip(heavy, (0, D - 1, D // 2, D // 3), strict=True):
        each[at] = FINEST
    falling = (FINEST / 2.0 ** np.arange(D)).astype(np.int64) + 1
    random = rng.integers(1, FINEST, D)
    for weights in (one, *heavy, falling, falling[::-1], random, random * (rng.random(D) < 0.1)):
        for groups in {1, 2, D // 2, D // 2 + 1, D - 1, D} & set(range(1, D + 1)):
            found = edges(weights + 1, groups)
            assert len(found) == groups + 1 and found[0] == 0 and found[-1] == D
            assert (np.diff(found) >= 1).all()
    for groups in {1, D // 8, D // 3} - {0}:
        # No group of even weights is heavier than its share and one dimension.
        sums = np.add.reduceat(one, edges(one, groups)[:-1])
        assert sums.max() <= D / groups + 1
        sums = np.add.reduceat(random, edges(random, groups)[:-1])
        assert sums.max() <= random.sum() / groups + random.max()


def test_levels_say_the_groups_that_an_image_needs():
    nominal, D = 20, 10_000
    levels = np.arange(-MOST, MOST + 1)
    groups = groups_at(nominal, levels, D)
    expected = np.floor(nominal * 2.0 ** (levels / 2) + 0.5)
    np.testing.assert_array_equal(groups, np.clip(expected, 1, D))
    np.testing.assert_array_equal(groups_at(nominal, levels, 7), np.minimum(groups, 7))
    before = np.zeros(6, np.int64)
    bits = np.array([0.0, 80.0, 160.0, 200.1, 1600.0, 1e9])
    found = next_levels(bits, nominal, 8, before, D)
    np.testing.assert_array_equal(found, [-MOST, 0, 0, 1, 7 - 1 + (1600 / 8 / 20 > 2**3.25), MOST])
    # One group stays one group, whatever the level.
    np.testing.assert_array_equal(next_levels(np.zeros(3), 1, 8, np.zeros(3, int), D), 0)


def sent_of(rng, images, nominal, dimensions):
    levels = rng.integers(-MOST, MOST + 1, images)
    groups = groups_at(nominal, levels, dimensions)
    return Sent(levels, [numbers_of(rng, int(count)) for count in groups])


def test_layers_are_read_as_they_were_written():
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        images = int(rng.integers(1, 9))
        steps = [(int(nominal), sent_of(rng, images, int(nominal), 48)) for nominal in (1, 3, 48)]
        ours, theirs = Layers(images, 18, 48), Layers(images, 18, 48)
        total = 0.0
        for nominal, sent in steps:
            payload, bits = ours.write(sent)
            assert bits.shape == (images,)
            total += bits.sum()
            found = theirs.read(payload, nominal)
            np.testing.assert_array_equal(found.levels, sent.levels)
            for one, other in zip(found.numbers, sent.numbers, strict=True):
                np.testing.assert_array_equal(one, other)
            assert abs(8 * len(payload) - bits.sum()) < 48


# The lossless layer.

OFFSETS = np.array([-2, -1.01, -1, -0.99, -0.51, -1e-3, -1e-12, 0, 1e-12, 1e-3, 0.5, 0.99, 1, 1.5])


def test_the_receiver_finds_the_senders_levels_near_every_boundary():
    boundaries = np.arange(255) + 0.5
    means = (boundaries[:, None] + NEAR * OFFSETS).reshape(-1)
    means = np.concatenate([means, np.arange(256.0), np.linspace(0, 255, 997), [0, 1e-12, 255]])
    levels, symbols = rounded(means)
    assert np.abs(levels - means).max() <= 0.5 + 1e-9
    assert levels.min() == 0 and levels.max() == 255
    distance = np.abs(means - np.floor(means) - 0.5)
    np.testing.assert_array_equal(symbols == SAFE, distance >= NEAR)
    for change in (-0.499, -0.25, -1e-9, 0, 1e-9, 0.25, 0.499):
        other = np.clip(means + change * NEAR, 0, 255)
        np.testing.assert_array_equal(resolved(other, symbols), levels)


def test_level_means_are_those_of_the_pictures_that_are_made():
    x = np.float32([-3, -1, -1 / 255, 1 / 255, 0, 1, 2])
    np.testing.assert_allclose(level_means(x), [0, 0, 127, 128, 127.5, 255, 255], atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_exact_with_other_floats_and_cost_little_where_means_are_close(channels):
    rng = np.random.default_rng(channels)
    ours, theirs, writer = Pixels(), Pixels(), Writer()
    shape = (8, 4, channels)
    images, means = [], []
    for kind in range(8):
        image = rng.integers(0, 256, shape, dtype=np.uint8)
        if kind == 0:
            image[:] = 255
        if kind == 1:
            image[:] = 0
        mean = image / 127.5 - 1 + (kind % 4) ** 3 / 50 * rng.normal(size=shape)
        if kind == 7:  # The other end of the range: whatever the model says, the image is exact.
            mean = -np.sign(mean) * 5
        means.append(mean.astype(np.float32))
        images.append(image)
        ours.write(writer, images[-1], means[-1])
    reader = Reader(writer.bytes())
    for image, mean in zip(images, means, strict=True):
        change = np.float32(0.49 * NEAR / 127.5 * rng.choice([-1, 1], shape))
        np.testing.assert_array_equal(theirs.read(reader, mean + change), image)
    np.testing.assert_array_equal(ours.squares, theirs.squares)
    np.testing.assert_array_equal(ours.counts, theirs.counts)


def test_pixels_learn_how_far_the_means_are_off():
    """Errors of a standard deviation of 3 levels: log2(3 sqrt(2 pi e)) bits for each pixel."""
    rng = np.random.default_rng(0)
    pixels, writer = Pixels(), Writer()
    for _ in range(100):
        levels = rng.integers(40, 200) + np.zeros((16, 16, 1))
        image = np.rint(levels + 3 * rng.normal(size=levels.shape)).astype(np.uint8)
        pixels.write(writer, image, (levels / 127.5 - 1).astype(np.float32))
    entropy = np.log2(3 * np.sqrt(2 * np.pi * np.e))
    np.testing.assert_allclose(writer.bits / (100 * 16 * 16), entropy, rtol=0.02)
