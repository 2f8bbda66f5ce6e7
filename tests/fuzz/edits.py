"""Random edits of bytes: functions of (rng, content), the damaged content their result.

`rng` is a random.Random, so that the same seed gives the same edit on every machine.
"""

MOST = 2**20
"""Bytes of the largest file that is made. A reader's work is bounded by it, not by a clock."""

EXTREMES = (
    0,
    1,
    127,
    128,
    255,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**64 - 1,
)


def random_bytes(rng, content=b""):
    """Noise, at times after the first bytes of `content`, which say what kind of file it is."""
    head = content[: rng.choice((0, 0, 4, 8, 16, 64))]
    return head + rng.randbytes(rng.choice((0, 1, 7, 64, 500, 4000)))


def edit_bytes(rng, content):
    """One to four of the edits below, one after another; one of ten is noise."""
    if rng.random() < 0.1:
        return random_bytes(rng, content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        content = rng.choice(EDITS)(rng, content)
    return content[:MOST]


def put_integer(rng, content, at, size=None, order=None):
    """An extreme integer of 1 to 8 bytes at index `at`, as in a field for a length."""
    size = size or rng.choice((1, 2, 2, 4, 4, 4, 8))
    value = rng.choice(EXTREMES) % 256**size
    field = value.to_bytes(size, order or rng.choice(("little", "big")))
    return content[:at] + field + content[at + size :]


def _flip_bits(rng, content):
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if content else 0):
        changed[_place(rng, content)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _replace_run(rng, content):
    start, stop = _span(rng, content)
    same = rng.choice((b"\0", b"\xff", b"\x80", b" ", b"9")) * (stop - start)
    return content[:start] + rng.choice((same, rng.randbytes(stop - start))) + content[stop:]


def _truncate(rng, content):
    return content[: _place(rng, content)]


def _cut_out(rng, content):
    start, stop = _span(rng, content)
    return content[:start] + content[stop:]


def _duplicate(rng, content):
    start, stop = _span(rng, content)
    return content[:stop] + content[start:stop] * rng.choice((1, 1, 2, 50)) + content[stop:]


def _insert(rng, content):
    at = _place(rng, content)
    return content[:at] + rng.randbytes(rng.choice((1, 2, 4, 100))) + content[at:]


def _swap(rng, content):
    a, b, c, d = sorted(_place(rng, content) for _ in range(4))
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def _extreme_integer(rng, content):
    return put_integer(rng, content, _place(rng, content))


def _append(rng, content):
    return content + rng.choice((rng.randbytes(40), bytes(1000), content))


EDITS = (
    _flip_bits,
    _flip_bits,
    _replace_run,
    _truncate,
    _cut_out,
    _duplicate,
    _insert,
    _swap,
    _extreme_integer,
    _extreme_integer,
    _append,
)


def _place(rng, content):
    """The index of a byte: half of the time one of the first 64, where most headers are."""
    if not content:
        return 0
    return rng.randrange(min(len(content), 64) if rng.random() < 0.5 else len(content))


def _span(rng, content):
    start = _place(rng, content)
    return start, min(start + rng.choice((1, 2, 4, 16, 100, 1000)), len(content))
