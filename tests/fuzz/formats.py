"""Random edits that know a format, and leave whole what would hide them, such as a checksum."""

import io
import json
import re
import struct
import zipfile
import zlib

from fuzz.edits import MOST, edit_bytes, put_integer
from fuzz.json_edits import edit_json

# Offsets and sizes of the fields behind each signature of a zip.
ZIP_FIELDS = {
    b"PK\x03\x04": ((4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)),
    b"PK\x01\x02": (
        *((6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2)),
        *((34, 2), (36, 2), (38, 4), (42, 4)),
    ),
    b"PK\x05\x06": ((4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)),
}
DTYPES = ("F64", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "C64", "X")
"""Of safetensors."""
NAMES = ("", "/", "../x.png", "/x.png", "a\\b.png", "x" * 300 + ".png", "caf\u00e9.png", "\n.png")
SHAPES = ("()", "(0,)", "(1,)", "(-1, 8, 8, 1)", "(2**40,)", "[6, 8]", "None", "True", "6", "x")
DESCRS = (
    *("|O", "|u1", "<u2", ">u2", "<i8", "<f2", "<f4", ">f8", "<c16", "|b1", "|S4", "<U4", "|V4"),
    *("<M8[s]", "|S0", "<U1000000000", "|V4000000000", "", "x", "\n"),
)


def edit_npz(rng, content):
    """An edit of a zip whose members are arrays."""
    return edit_zip(rng, content, edit_npy)


def edit_zip(rng, content, edit_member=edit_bytes):
    """An edit of its bytes, of its headers' fields, or of a member, with the right checksum."""
    if rng.random() < 0.6:
        return _edit_members(rng, content, edit_member)
    return rng.choice((edit_bytes, _edit_fields))(rng, content)


def _edit_members(rng, content, edit_member):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    chosen = rng.randrange(len(members))
    name, inside = members[chosen]
    action = rng.randrange(10)
    if action == 0:
        del members[chosen]
    elif action == 1:
        members[chosen] = (rng.choice((*NAMES, *(name for name, _ in members))), inside)
    elif action == 2:
        members.append((rng.choice((*NAMES, name + "/", name + ".npy")), inside))
    else:
        members[chosen] = (name, edit_member(rng, inside))
    return make_zip(members, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))[:MOST]


def make_zip(members, method=zipfile.ZIP_STORED):
    """The bytes of a zip of `members`, pairs of a name and its content; names may repeat."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name or "x", (2020, 1, 1, 0, 0, 0))
            info.filename = name
            info.compress_type = method
            if any(info.filename == other.filename for other in archive.filelist):
                archive.NameToInfo.pop(info.filename)  # It would warn.
            archive.writestr(info, content)
    return file.getvalue()


def _edit_fields(rng, content):
    for _ in range(rng.choice((1, 1, 2))):
        signature = rng.choice(list(ZIP_FIELDS))
        places = [match.start() for match in re.finditer(re.escape(signature), content)]
        if places:
            offset, size = rng.choice(ZIP_FIELDS[signature])
            content = put_integer(rng, content, rng.choice(places) + offset, size, "little")
    return content


def edit_npy(rng, content):
    """An edit of an array's shape, type, order, version or length of header, or of its bytes."""
    action = rng.randrange(6)
    if action == 0 or content[:6] != b"\x93NUMPY":
        return edit_bytes(rng, content)
    if action == 1:
        return put_integer(rng, content, rng.choice((6, 7, 8)), rng.choice((1, 2, 4)))
    end = 10 + int.from_bytes(content[8:10], "little")
    header = content[10:end].decode().strip()
    if action == 2:
        header = re.sub(r"'descr': '.*?'", f"'descr': {rng.choice(DESCRS)!r}", header)
    elif action in (3, 4):
        header = re.sub(r"'shape': \(.*?\)", f"'shape': {_shape(rng, header)}", header)
    else:
        header = rng.choice(
            (
                header.replace("False", "True"),
                header.replace("'descr'", "'x'"),
                header[:-1] + ", 'x': 1}",
                "(" * 5000 + header,
                "-" * 9000 + "1",
                edit_bytes(rng, header.encode()).decode("latin-1"),
            )
        )
    return _npy(header, content[end:])


def _npy(header, data):
    encoded = header.encode("latin-1", "replace")[:65000]
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(encoded)) + encoded + data


def _shape(rng, header):
    """Another shape: one of SHAPES, or the old one with a size or its order changed."""
    old = re.search(r"'shape': \((.*?)\)", header)
    sizes = [int(size) for size in re.findall(r"\d+", old[1])] if old else []
    if not sizes or rng.random() < 0.3:
        return rng.choice(SHAPES)
    at = rng.randrange(len(sizes))
    sizes[at] = rng.choice((0, 1, -1, sizes[at] * 2, 2**31, 2**40, 2**62, 2**64, 10**30))
    if rng.random() < 0.3:
        rng.shuffle(sizes)
    return f"({', '.join(map(str, sizes))},)"


def edit_safetensors(rng, content):
    """An edit of the header, its length corrected, of that length, or of the bytes."""
    action = rng.randrange(5)
    if action == 0:
        return edit_bytes(rng, content)
    if action == 1:
        return put_integer(rng, content, 0, 8, "little")
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length]
    edit = rng.choice((edit_json, _edit_tensor, _edit_tensor, _edit_metadata))
    header = edit(rng, header)
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def _edit_tensor(rng, header):
    tensors = json.loads(header)
    name = rng.choice([name for name in tensors if name != "__metadata__"])
    tensor = tensors[name]
    start, stop = tensor["data_offsets"]
    change = rng.choice(
        (
            {
                "dtype": rng.choice(
                    ("F64", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "X", "C64")
                )
            },
            {"shape": rng.choice(([], [0], [2**40], [2**63], [-1], [1] + tensor["shape"]))},
            {"shape": tensor["shape"][::-1]},
            {
                "data_offsets": rng.choice(
                    ([0, 0], [stop, start], [start, 2**63], [start + 1, stop])
                )
            },
        )
    )
    tensors[name] = tensor | change
    return json.dumps(tensors).encode()


def _edit_metadata(rng, header):
    """The JSON inside a JSON string, in which `ddpm-jax export` describes the model."""
    tensors = json.loads(header)
    metadata = tensors.get("__metadata__") or {"x": "{}"}
    name = rng.choice(list(metadata))
    if metadata[name].startswith("{"):
        metadata[name] = edit_json(rng, metadata[name].encode()).decode(errors="replace")
    tensors["__metadata__"] = metadata
    return json.dumps(tensors).encode()


def edit_png(rng, content):
    """An edit of the chunks, or of the pixels before compression, with the right checksums."""
    if rng.random() < 0.3 or content[:4] != b"\x89PNG":
        return edit_bytes(rng, content)
    chunks = list(_chunks(content))
    at = rng.randrange(len(chunks))
    kind, data = chunks[at]
    action = rng.randrange(6)
    if action == 0:
        del chunks[at]
    elif action == 1:
        chunks.insert(rng.randrange(len(chunks) + 1), chunks[at])
    elif action == 2:
        chunks[0] = (b"IHDR", put_integer(rng, chunks[0][1], rng.choice((0, 4)), 4, "big"))
    elif action == 3:
        chunks[0] = (b"IHDR", put_integer(rng, chunks[0][1], rng.randrange(8, 13), 1))
    elif action == 4 and kind == b"IDAT":
        chunks[at] = (kind, zlib.compress(edit_bytes(rng, zlib.decompress(data))))
    else:
        kinds = (b"tRNS", b"PLTE", b"iCCP", b"tEXt", b"zTXt", b"eXIf", b"acTL", b"fcTL", b"pHYs")
        chunks[at] = (rng.choice((kind, kind, *kinds)), edit_bytes(rng, data))
    return content[:8] + b"".join(_chunk(*chunk) for chunk in chunks)


def _chunks(content):
    at = 8
    while at < len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        yield kind, content[at + 8 : at + 8 + length]
        at += 12 + length


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
