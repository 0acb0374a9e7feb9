"""The orientation in a PNG's metadata before or after the pixels, found without decoding them."""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING, Any

from streamcnn.errors import CorruptImage
from streamcnn.support.extras import require

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile as Image

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEAD_BYTES = 8
_AROUND_BYTES = 12
"""Bytes of a chunk's length, kind and checksum."""
_TELLS = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
"""Kinds of chunks that may have an orientation: as EXIF, as XMP, or as ImageMagick's text."""
_MOST_BYTES = 2**24
"""Largest total size in bytes of such chunks after the pixels."""


def trailing_orientation(path: str, tag: int) -> int | None:
    """The orientation in chunks after the pixels; None if there is none.

    Parameters
    ----------
    path
        The PNG file.
    tag
        EXIF's tag of the orientation.

    Raises
    ------
    CorruptImage
        If these chunks are implausibly large.
    OSError
        If the file cannot be read.
    """
    chunks = _trailing_chunks(path)
    if not chunks:
        return None
    pillow: Any = require("PIL.Image", extra="pictures")
    # Parsed by Pillow, from a picture of one pixel with these chunks before the pixels.
    with pillow.open(io.BytesIO(_picture_of(chunks)), formats=("PNG",)) as image:
        return leading_orientation(image, tag)


def leading_orientation(image: Image, tag: int) -> int | None:
    """The orientation before the pixels of an open PNG; None if there is none."""
    pillow: Any = require("PIL.Image", extra="pictures")
    # Not the PNG's own method, which decodes the pixels to reach later chunks.
    found = pillow.Image.getexif(image).get(tag)
    return None if found is None else int(found)


def _trailing_chunks(path: str) -> list[bytes]:
    """The chunks after the pixels that may have an orientation, complete."""
    found: list[bytes] = []
    at, is_behind = len(_SIGNATURE), False
    with open(path, "rb", buffering=0) as file:
        while len(head := _read(file, at, _HEAD_BYTES)) == _HEAD_BYTES:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"IEND":
                break
            if is_behind and kind in _TELLS:
                if length + sum(map(len, found)) > _MOST_BYTES:
                    raise CorruptImage(
                        f"{path} has notes of {length} bytes behind its pixels ({kind.decode()}): allowed "
                        f"are {_MOST_BYTES}; write the picture again without them"
                    )
                found.append(_read(file, at, length + _AROUND_BYTES))
            is_behind = is_behind or kind == b"IDAT"
            at += length + _AROUND_BYTES
    return found


def _read(file: io.FileIO, at: int, count: int) -> bytes:
    file.seek(at)
    return file.read(count)


def _picture_of(chunks: list[bytes]) -> bytes:
    """A PNG of one pixel with these chunks."""
    pillow: Any = require("PIL.Image", extra="pictures")
    file = io.BytesIO()
    pillow.new("L", (1, 1)).save(file, "PNG")
    whole = file.getvalue()
    after_head = len(_SIGNATURE) + _AROUND_BYTES + 13
    return whole[:after_head] + b"".join(chunks) + whole[after_head:]
