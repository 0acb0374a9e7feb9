"""Fingerprints of files, which show whether files have changed without reading all of them.

`fingerprint` is quick and changes with a file's time. `content_digest` depends on bytes alone, so files that
were copied, moved or touched keep it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from streamcnn.data.sources.files import comparing
from streamcnn.data.sources.places import METADATA_BYTES
from streamcnn.errors import CorruptImage
from streamcnn.support.documents import open_regular, read_regular

BLOCK = 2**16
"""Bytes of a block."""
WHOLE_BYTES = 2**23
"""Largest image in bytes that is read completely."""
NUM_BLOCKS = 32
"""Number of blocks that are read of a larger image."""
_END_BYTES = 2**16
_ZARR_METADATA = {".zarray", ".zattrs", ".zgroup", "zarr.json"}


def fingerprint(paths: Sequence[Path]) -> str:
    """A SHA-256 of the sizes, modification times and some content of files, and of all files in folders.

    Of a given file, the first and the last 64 KiB are read; of files in a folder, only zarr's metadata. A
    change in the middle of a file that keeps size and time goes unnoticed.

    Raises
    ------
    CorruptImage
        If a file cannot be read.
    """
    known = hashlib.sha256()
    with comparing():
        for path in paths:
            for part in _of_folder(path) if path.is_dir() else _of_file(path):
                known.update(part)
    return known.hexdigest()


def content_digest(paths: Sequence[Path]) -> str:
    """A SHA-256 of the content of one image's files, and of all files in folders, without times and paths.

    It covers all sizes, names within folders, and zarr's metadata. Of other bytes it covers all in an image
    of up to 8 MiB; in a larger one, 32 blocks of 64 KiB, spread evenly from the first to the last. So it
    notices another picture of the same size, but may miss some changed pixels in a large file.

    Raises
    ------
    CorruptImage
        If a file cannot be read.
    """
    known = hashlib.sha256()
    with comparing():
        files = [each for path in paths for each in _files(path)]
        sizes = [path.stat().st_size for _, path in files]
        for (name, path), size in zip(files, sizes, strict=True):
            known.update(os.fsencode(f"{name}\0{size}\n"))
            if path.name in _ZARR_METADATA:
                known.update(read_regular(path, error=CorruptImage, most_bytes=METADATA_BYTES))
        for at, start in _places(sizes):
            with open_regular(files[at][1], error=CorruptImage) as file:
                file.seek(start)
                known.update(file.read(BLOCK))
    return known.hexdigest()


def _places(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The blocks to read: index of the file, and offset in bytes."""
    total = sum(sizes)
    if total <= WHOLE_BYTES:
        for at, size in enumerate(sizes):
            yield from ((at, start) for start in range(0, size, BLOCK))
        return
    at, before = 0, 0
    for number in range(NUM_BLOCKS):
        place = number * (total - 1) // (NUM_BLOCKS - 1)
        while place >= before + sizes[at]:
            before += sizes[at]
            at += 1
        # The last block is read whole.
        yield at, max(0, min(place - before, sizes[at] - BLOCK))


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """Files with their names within a folder; a given file has no name, as only size and bytes count."""
    if not path.is_dir():
        yield "", path
        return
    for place, names in _walk(path):
        for name in names:
            file = Path(place, name)
            yield file.relative_to(path).as_posix(), file


def _walk(folder: Path) -> Iterator[tuple[str, Iterable[str]]]:
    for place, folders, names in os.walk(folder, onerror=_raise):
        folders.sort()
        yield place, sorted(names)


def _of_file(path: Path) -> Iterator[bytes]:
    with open_regular(path, error=CorruptImage) as file:
        found = os.fstat(file.fileno())
        yield _line(path.name, found)
        yield file.read(_END_BYTES)
        file.seek(max(_END_BYTES, found.st_size - _END_BYTES))
        yield file.read()


def _of_folder(folder: Path) -> Iterator[bytes]:
    for place, names in _walk(folder):
        for name in names:
            path = Path(place, name)
            yield _line(path.relative_to(folder).as_posix(), path.stat())
            if name in _ZARR_METADATA:
                yield read_regular(path, error=CorruptImage, most_bytes=METADATA_BYTES)


def _raise(error: OSError) -> None:
    raise error


def _line(name: str, found: os.stat_result) -> bytes:
    return os.fsencode(f"{name}\0{found.st_size} {found.st_mtime_ns}\n")
