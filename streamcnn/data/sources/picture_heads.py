"""Sizes of pictures within a TIFF's tiles, from their heads: decoders would allocate that much."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator

from tifffile import COMPRESSION

_JPEG = frozenset({COMPRESSION.OJPEG, COMPRESSION.JPEG, COMPRESSION.JPEG_LOSSY, COMPRESSION.ALT_JPEG})
_HEAD_BYTES = 2**12
"""Bytes at the start of a file that contain the size, for all but JPEG."""
_JXL_BITS = (9, 13, 18, 30)
_JXL_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def picture_size(data: bytes, compression: int) -> tuple[int, int] | None:
    """Height and width in pixels of a picture in TIFF's ``compression``; None if unknown.

    They are known for JPEG, JPEG 2000, JPEG XL, JPEG XR, PNG, WebP and LERC.
    """
    try:
        return _size_of_jpeg(data) if compression in _JPEG else _size_by_magic(data[:_HEAD_BYTES])
    except struct.error:
        return None


def _size_of_jpeg(data: bytes) -> tuple[int, int] | None:
    """The largest size in any frame header, as a decoder may use any of them."""
    return max(_frames(data), key=math.prod, default=None)


def _frames(data: bytes) -> Iterator[tuple[int, int]]:
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF or data[at + 1] in (0x00, 0xFF, 0x01, *range(0xD0, 0xD9)):
            at += 1
            continue
        kind, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            yield struct.unpack_from(">HH", data, at + 5)
        if kind == 0xDA:  # entropy-coded data follow, without headers
            return
        at += 2 + length


def _size_by_magic(head: bytes) -> tuple[int, int] | None:
    if head.startswith(b"\x89PNG"):
        width, height = struct.unpack_from(">II", head, 16)
        return height, width
    if head.startswith(b"Lerc2 "):
        (version,) = struct.unpack_from("<i", head, 6)
        height, width = struct.unpack_from("<ii", head, 14 if version >= 3 else 10)
        return height, width
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return _size_of_webp(head)
    if head.startswith(b"II\xbc"):
        return _size_of_jpeg_xr(head)
    if head.startswith(b"\xff\x0a") or head[4:8] == b"JXL ":
        return _size_of_jpeg_xl(head)
    at = head.find(b"\xff\x4f\xff\x51")  # a codestream of JPEG 2000, alone or in its boxes
    if at >= 0:
        right, bottom, left, top = struct.unpack_from(">IIII", head, at + 8)
        return bottom - top, right - left
    return None


def _size_of_webp(head: bytes) -> tuple[int, int] | None:
    match head[12:16]:
        case b"VP8X" if len(head) >= 30:
            width, height = (int.from_bytes(head[at : at + 3], "little") + 1 for at in (24, 27))
        case b"VP8L":
            (bits,) = struct.unpack_from("<I", head, 21)
            width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 ":
            width, height = (each & 0x3FFF for each in struct.unpack_from("<HH", head, 26))
        case _:
            return None
    return height, width


def _size_of_jpeg_xr(head: bytes) -> tuple[int, int] | None:
    """The size from a directory like a TIFF's, with tags of its own."""
    (directory,) = struct.unpack_from("<I", head, 4)
    (count,) = struct.unpack_from("<H", head, directory)
    found: dict[int, int] = {}
    for at in range(directory + 2, directory + 2 + 12 * count, 12):
        tag, kind, _ = struct.unpack_from("<HHI", head, at)
        found[tag] = struct.unpack_from("<H" if kind == 3 else "<I", head, at + 8)[0]
    return (found[0xBC81], found[0xBC80]) if {0xBC80, 0xBC81} <= found.keys() else None


def _size_of_jpeg_xl(head: bytes) -> tuple[int, int] | None:
    """The size from the size header in ISO 18181-1, with the lowest bit of a byte first."""
    at = head.find(b"\xff\x0a")
    if at < 0 or len(head) < at + 12:
        return None
    bits = int.from_bytes(head[at + 2 : at + 12], "little")

    def take(count: int) -> int:
        nonlocal bits
        value, bits = bits & ((1 << count) - 1), bits >> count
        return value

    is_small = bool(take(1))
    height = _extent(take, is_small)
    ratio = take(3)
    if ratio == 0:
        return height, _extent(take, is_small)
    over, under = _JXL_RATIOS[ratio - 1]
    return height, height * over // under


def _extent(take: Callable[[int], int], is_small: bool) -> int:
    return 8 * (take(5) + 1) if is_small else take(_JXL_BITS[take(2)]) + 1
