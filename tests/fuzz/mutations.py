"""Change files: bytes, and the content of JSON, CSV, TIFF, PNG and other files."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from .values import NAMES, NUMBERS, changed

Mutation = Callable[[Random, bytes], bytes]

_TIFF_TAGS = (
    *(
        254,
        256,
        257,
        258,
        259,
        262,
        266,
        270,
        273,
        274,
        277,
        278,
        279,
        284,
        306,
        317,
        320,
        322,
        323,
        324,
        325,
    ),
    *(330, 338, 339, 347, 34665, 42112, 50838),
)
_TIFF_VALUES = (
    0,
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    16,
    32,
    64,
    255,
    1000,
    34892,
    50000,
    65535,
    2**20,
    2**31,
    2**32 - 1,
)


def mutate(random: Random, folder: Path, files: list[Path]) -> str:
    """Change one or two of the files in place, and describe the changes in words."""
    done = []
    for _ in range(random.choice([1, 1, 1, 2])):
        path = random.choice(files)
        content = path.read_bytes()
        ways = [*_WAYS.get(path.suffix, []), *_WAYS.get(path.name, [])]
        way = random.choice(ways) if ways and random.random() < 0.75 else random.choice(_OF_BYTES)
        try:
            found = way(random, content)
        except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError, struct.error):
            way = _flip  # what was changed before is no JSON, CSV or TIFF any more
            found = way(random, content)
        path.write_bytes(found)
        done.append(f"{way.__name__.removeprefix('_')} {path.relative_to(folder)}")
    return ", ".join(done)


def _flip(random: Random, content: bytes) -> bytes:
    found = bytearray(content)
    for _ in range(random.choice([1, 1, 2, 8])):
        if found:
            found[random.randrange(len(found))] = random.choice([0, 255, 128, random.randrange(256)])
    return bytes(found)


def _truncate(random: Random, content: bytes) -> bytes:
    return content[: random.randrange(len(content) + 1)]


def _splice(random: Random, content: bytes) -> bytes:
    """Move, double or remove a part of the content."""
    start, stop = sorted(random.randrange(len(content) + 1) for _ in range(2))
    to = random.randrange(len(content) + 1)
    part = content[start:stop]
    return random.choice(
        [content[:to] + part + content[to:], content[:start] + content[stop:], content + part, part]
    )


def _number(random: Random, content: bytes) -> bytes:
    """Overwrite two, four or eight bytes by a number that programs trip over."""
    if len(content) < 8:
        return content
    at, size = random.randrange(len(content) - 7), random.choice(["H", "I", "Q"])
    value = random.choice([0, 1, 2, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**40, 2**63])
    packed = struct.pack(random.choice("<>") + size, value % 2 ** (8 * struct.calcsize(size)))
    return content[:at] + packed + content[at + len(packed) :]


_OF_BYTES: list[Mutation] = [_flip, _flip, _truncate, _splice, _number]


def _json(random: Random, content: bytes) -> bytes:
    return json.dumps(changed(random, json.loads(content))).encode()


def _json_lines(random: Random, content: bytes) -> bytes:
    lines = content.splitlines()
    at = random.randrange(len(lines))
    lines[at] = random.choice([_json(random, lines[at]), lines[random.randrange(len(lines))]])
    return b"\n".join(lines) + b"\n"


def _json_text(random: Random, content: bytes) -> bytes:
    """What no value becomes: keys that come twice, depth, numbers without end, other encodings."""
    text = content.decode()
    return random.choice(
        [
            lambda: (text.replace("{", '{"": 1, "": 2,', 1)).encode(),
            lambda: text.replace(":", ":" + "[" * 10_000, 1).encode(),
            lambda: text.replace("1", "9" * 5000, 1).encode(),
            lambda: text.encode("utf-16"),
            lambda: ("\ufeff" + text).encode(),
            lambda: b"[" * 100_000,
            lambda: text.encode().replace(b'"', b'"\xff', 2),
            lambda: text.replace('"', '"\\ud800', 2).encode(),
        ]
    )()


def _csv(random: Random, content: bytes) -> bytes:
    """Change, double or remove cells, columns and rows."""
    rows = [line.split(",") for line in content.decode().splitlines()]
    for _ in range(random.choice([1, 1, 2, 3])):
        row = random.choice(rows)
        at = random.randrange(len(row)) if row else 0
        cell = str(random.choice([*NUMBERS[:-6], *NAMES, '"', '"a\nb"', "1.0", "01", "٣", "²", " ", "=1+1"]))
        random.choice(
            [
                lambda row=row, at=at, cell=cell: row.insert(at, cell),
                lambda row=row, at=at: row and row.pop(at),
                lambda row=row, at=at, cell=cell: row and row.__setitem__(at, cell),
                lambda row=row, at=at, cell=cell: row and row.__setitem__(at, cell),
                lambda row=row: rows.append(list(row)),
            ]
        )()
    ending = random.choice(["\n", "\n", "\r\n", "\r", "\n\n"])
    return ending.join(",".join(row) for row in rows).encode(
        random.choice(["utf-8", "utf-8", "utf-16", "utf-8-sig"])
    )


def _xml(random: Random, content: bytes) -> bytes:
    """Change an attribute of XML anywhere in the file; half of the time the rest stays where it is."""
    at = content.find(b"<OME")
    spots = [i for i in range(max(at, 0), len(content)) if content.startswith(b'="', i)]
    if at < 0 or not spots:
        return _flip(random, content)
    start = random.choice(spots) + 2
    stop = content.find(b'"', start)
    value = str(random.choice([*NUMBERS[:-7], *NAMES])).encode("utf-8", "replace").replace(b'"', b"")
    if random.random() < 0.5:  # as long as before, so that no offset changes
        value = value[: stop - start].ljust(stop - start, random.choice([b"0", b" ", b"9"]))
    return content[:start] + value + content[stop:]


def _tiff(random: Random, content: bytes) -> bytes:
    """Give entries of the first directories another tag, type, count or value."""
    found = bytearray(content)
    order = "<" if content[:2] == b"II" else ">"
    big = len(content) > 16 and content[2:4] in (b"+\0", b"\0+")
    step, head, offset = (20, "Q", 8) if big else (12, "H", 4)
    try:
        (at,) = struct.unpack_from(order + ("Q" if big else "I"), content, offset)
        (count,) = struct.unpack_from(order + head, content, at)
        first = at + struct.calcsize(head)
        for _ in range(random.choice([1, 1, 2, 3])):
            entry = first + step * random.randrange(max(1, min(count, 64)))
            _change_entry(random, found, entry, order, big)
    except struct.error:
        return _flip(random, content)
    return bytes(found)


def _change_entry(random: Random, found: bytearray, entry: int, order: str, big: bool) -> None:
    match random.randrange(6):
        case 0:
            struct.pack_into(order + "H", found, entry, random.choice(_TIFF_TAGS))
        case 1:
            struct.pack_into(order + "H", found, entry + 2, random.choice([1, 2, 3, 4, 5, 7, 11, 12, 16, 99]))
        case 2:
            struct.pack_into(order + ("Q" if big else "I"), found, entry + 4, random.choice(_TIFF_VALUES))
        case _:
            value = random.choice(_TIFF_VALUES)
            (kind,) = struct.unpack_from(order + "H", found, entry + 2)
            place = entry + (12 if big else 8)
            if kind == 3:
                struct.pack_into(order + "H", found, place, value & 0xFFFF)
            else:
                struct.pack_into(order + "I", found, place, value)


def _png(random: Random, content: bytes) -> bytes:
    """Double, remove, change or move chunks of a PNG, with correct checksums."""
    chunks, at = [], 8
    while at + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, at)
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    if not chunks:
        return _flip(random, content)
    place = random.randrange(len(chunks))
    name, data = chunks[place]
    match random.randrange(6):
        case 0:
            del chunks[place]
        case 1:
            chunks.insert(random.randrange(len(chunks) + 1), (name, data))
        case 2:
            kind = random.choice(
                [b"tRNS", b"PLTE", b"eXIf", b"acTL", b"fcTL", b"iCCP", b"zTXt", b"sBIT", b"iTXt"]
            )
            bomb = b"x\0\0" + zlib.compress(bytes(2**24))
            chunks.insert(1, (kind, random.choice([b"", bytes(3), random.randbytes(40), bomb])))
        case 3 if name == b"IHDR":
            fields = list(struct.unpack(">IIBBBBB", data[:13]))
            fields[random.randrange(7)] = random.choice([0, 1, 2, 3, 4, 6, 8, 16, 255])
            if random.random() < 0.5:
                fields[random.randrange(2)] = random.choice([0, 1, 10**4, 2**20, 2**31 - 1, 2**31])
            chunks[place] = (name, struct.pack(">IIBBBBB", *fields))
        case _:
            chunks[place] = (name, _flip(random, data))
    parts = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return content[:8] + b"".join(parts)


def _npy(random: Random, content: bytes) -> bytes:
    """Change the header of a ``.npy`` file."""
    header = random.choice(
        [
            "{'descr': '<f4', 'fortran_order': False, 'shape': (%s, 4, 4), }",
            "{'descr': '%s', 'fortran_order': False, 'shape': (3, 40, 30), }",
            "{'descr': '|u1', 'fortran_order': True, 'shape': (3, %s, 30), }",
            "{'descr': [('a', '<u2'), ('b', '%s')], 'fortran_order': 0, 'shape': (3, 40, 30), }",
            "%s",
        ]
    ) % random.choice([*NUMBERS, "|O", "<M8[s]", "V2000000000", "(" * 200, "u8"])
    text = header.encode("latin-1", "replace").ljust(118) + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text) & 0xFFFF) + text + content[128:]


_WAYS: dict[str, list[Any]] = {
    ".json": [_json, _json, _json, _json_text],
    ".zattrs": [_json, _json, _json_text],
    ".zarray": [_json, _json, _json_text],
    ".zgroup": [_json],
    ".zmetadata": [_json, _json],
    ".jsonl": [_json_lines, _json_lines, _json_text],
    ".csv": [_csv, _csv, _csv],
    ".tif": [_tiff, _tiff, _tiff, _xml],
    ".png": [_png, _png],
    ".npy": [_npy],
    ".xml": [_xml],
}
