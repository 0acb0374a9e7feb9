"""Which series a DICOM file belongs to, read from its head."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

_PREAMBLE = 128
_HEAD_BYTES = 2**20
"""Number of bytes read from a file: the series comes before the pixels."""
_IMPLICIT = "1.2.840.10008.1.2"
_SYNTAX = (0x0002, 0x0010)
_SERIES = (0x0020, 0x000E)
_ITEM, _ITEM_END, _SEQUENCE_END = (0xFFFE, 0xE000), (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)
_UNDEFINED = 0xFFFFFFFF
_LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
"""Value representations whose length takes four bytes, after two unused ones."""

Tag = tuple[int, int]


def is_dicom(path: Path) -> bool:
    """Whether a file has the head of a DICOM file."""
    with path.open("rb") as file:
        return file.read(_PREAMBLE + 4)[_PREAMBLE:] == b"DICM"


def series_uid(path: Path) -> str | None:
    """The SeriesInstanceUID of a little-endian DICOM file; None if there is none.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if head[_PREAMBLE : _PREAMBLE + 4] != b"DICM":
        return None
    try:
        for tag, value in _elements(head, _PREAMBLE + 4):
            if tag == _SERIES:
                return value.decode("ascii").strip("\0 ") or None
            if tag > _SERIES:
                return None
    except (struct.error, UnicodeDecodeError, RecursionError):
        return None  # opening the file will show what is wrong with it
    return None


def _elements(head: bytes, at: int) -> Iterator[tuple[Tag, bytes]]:
    """Tags and values outside of sequences, in order."""
    explicit, described_explicit = True, True
    while at < len(head):
        (group,) = struct.unpack_from("<H", head, at)
        if group != 0x0002:  # the transfer syntax of the first group applies from here on
            explicit = described_explicit
        tag, start, length = _element(head, at, explicit)
        if length == _UNDEFINED:
            at = _end(head, start, explicit, _SEQUENCE_END)
            continue
        value = head[start : start + length]
        if tag == _SYNTAX:
            described_explicit = value.decode("ascii").strip("\0 ") != _IMPLICIT
        yield tag, value
        at = start + length


def _element(head: bytes, at: int, explicit: bool) -> tuple[Tag, int, int]:
    """An element's tag, and start and length of its value."""
    group, number = struct.unpack_from("<HH", head, at)
    if not explicit or group == 0xFFFE:
        (length,) = struct.unpack_from("<I", head, at + 4)
        return (group, number), at + 8, length
    if head[at + 4 : at + 6] in _LONG:
        (length,) = struct.unpack_from("<I", head, at + 8)
        return (group, number), at + 12, length
    (length,) = struct.unpack_from("<H", head, at + 6)
    return (group, number), at + 8, length


def _end(head: bytes, at: int, explicit: bool, ending: Tag) -> int:
    """The end of a sequence or an item of undefined length."""
    while True:
        tag, start, length = _element(head, at, explicit)
        if tag == ending:
            return start
        if length == _UNDEFINED:
            at = _end(head, start, explicit, _ITEM_END if tag == _ITEM else _SEQUENCE_END)
        else:
            at = start + length
