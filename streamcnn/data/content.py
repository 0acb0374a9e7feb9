"""What tells a file's content from another's: a digest that does not depend on when it was written."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

BLOCK = 2**16
"""Bytes that are read at a place."""
MAX_BLOCKS = 128
"""Blocks that are read of one image: all of it up to 8 MiB, and evenly spread ones of more."""


def content_digest(path: Path) -> str:
    """A SHA-256 of a file, or of all files of a folder with their names.

    Names and sizes count, and up to 8 MiB of bytes per image: all bytes of smaller images; of larger ones 128
    blocks that are spread evenly, the first and the last among them. Another picture in the place of one is
    noticed, if it is not the same in all these blocks; a change of a few pixels in a large one may not be.

    Raises
    ------
    OSError
        If a file cannot be read.
    """
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    known = hashlib.sha256()
    for file in files:
        known.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode())
    chosen = _spread(len(files), MAX_BLOCKS)
    for index in chosen:
        _add(known, files[index], max(1, MAX_BLOCKS // len(chosen)))
    return known.hexdigest()


def _add(known: hashlib._Hash, path: Path, num_blocks: int) -> None:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for index in _spread(-(-size // BLOCK), num_blocks):
            file.seek(index * BLOCK)
            known.update(file.read(BLOCK))


def _spread(length: int, count: int) -> list[int]:
    """At most ``count`` of the numbers below ``length``, the first and the last among them."""
    if length <= count:
        return list(range(length))
    if count == 1:
        return [0]
    return [index * (length - 1) // (count - 1) for index in range(count)]
