"""Random edits of JSON: other types, extreme numbers, deep nesting, missing and new fields."""

import json

from fuzz.edits import MOST, edit_bytes

NUMBERS = (
    *(0, -1, 1, 2, 3, 7, 1000, 10**6, 2**31, 2**45, 2**63, 2**64, -(2**63), 10**30),
    *(0.5, -0.5, 1e-300, 1e-30, 1e308),
)
TEXTS = ("", "\0", "\n", "\x1b[2J", "a" * 5000, "../../x", "/", "caf\u00e9", "\ud800", "NaN", "1")
RAW = ("NaN", "Infinity", "-Infinity", "1e999", "1" * 5000, "[" * 200_000, '{"a":' * 100_000)
"""Text in the place of a value, valid or not, that json.dumps would not write."""
NESTED = "[" * 200_000 + "]" * 200_000


def edit_json(rng, content):
    """Up to five changes of nodes; in one case of four an edit of the bytes or the encoding."""
    if rng.random() < 0.25:
        return rng.choice((edit_bytes, edit_bytes, _other_encoding))(rng, content)
    tree = json.loads(content)
    raw = {}
    for _ in range(rng.choice((1, 1, 2, 5))):
        tree = _edit_tree(rng, tree, raw)
    text = json.dumps(tree)
    for mark, value in raw.items():
        text = text.replace(f'"{mark}"', value)
    return text.encode()[:MOST]


def _edit_tree(rng, tree, raw):
    """The tree with one node changed by its parent; `raw` gets the text that a mark stands for."""
    parents = [node for node in _nodes(tree) if isinstance(node, (dict, list)) and node]
    if not parents or rng.random() < 0.03:
        return _other_value(rng, tree, raw)
    numbers = [(parent, key) for parent in parents for key in _numbers_in(parent)]
    if numbers and rng.random() < 0.25:
        parent, key = rng.choice(numbers)
        parent[key] = rng.choice(NUMBERS)
        return tree
    parent = rng.choice(parents)
    key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    action = rng.randrange(8)
    if action == 0:
        del parent[key]
    elif action == 1 and isinstance(parent, dict):
        parent[rng.choice((*TEXTS, *parent))] = parent.pop(key)
    elif action == 2 and isinstance(parent, dict):
        parent[rng.choice((*TEXTS, "x"))] = _other_value(rng, parent[key], raw)
    elif action == 3 and isinstance(parent, list):
        parent *= rng.choice((2, 3, 1000 if len(parent) < 10 else 2))
    else:
        parent[key] = _other_value(rng, parent[key], raw)
    return tree


def _nodes(tree):
    yield tree
    inside = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    for node in inside:
        yield from _nodes(node)


def _numbers_in(parent):
    pairs = parent.items() if isinstance(parent, dict) else enumerate(parent)
    return [key for key, value in pairs if type(value) in (int, float)]


def _other_value(rng, value, raw):
    """Of another type, extreme, nested, or near the old one."""
    number = isinstance(value, (int, float))
    near = [value + 1, -value, value * 2, float(value)] if number else [value]
    mark = f"<{len(raw)}>"
    chosen = rng.choice(
        (
            rng.choice((None, True, False, [], {}, "x", [[]], {"x": {}})),
            rng.choice(NUMBERS),
            rng.choice(NUMBERS),
            rng.choice(TEXTS),
            rng.choice(near),
            [value],
            {"x": value},
            str(value)[:1000],
            mark,
        )
    )
    if chosen == mark:
        raw[mark] = rng.choice((*RAW, NESTED))
    return chosen


def _other_encoding(rng, content):
    text = content.decode()
    return rng.choice(
        (
            b"\xef\xbb\xbf" + content,
            text.encode("utf-16"),
            content + b"\xff",
            text.replace('"', "'").encode(),
            content + content,
            rng.choice((b"", b"null", b"[]", b"{}", b"1", b'"x"', b"NaN", b"[" * 200_000)),
        )
    )
