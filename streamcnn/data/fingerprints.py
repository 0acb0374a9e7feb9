"""What tells whether files are still those that were read, without reading all of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from streamcnn.errors import CorruptImage

_END_BYTES = 2**16
_ZARR_METADATA = {".zarray", ".zattrs", ".zgroup", "zarr.json"}


def fingerprint(paths: Sequence[Path]) -> str:
    """A SHA-256 of sizes, times of writing and some content of files, and of all files in folders.

    Of a file that is given, the first and the last 64 KiB are read; of a file in a folder, nothing but zarr's
    metadata. A file that was changed within, and keeps its size and its time, is not noticed.

    Raises
    ------
    CorruptImage
        If one cannot be read.
    """
    known = hashlib.sha256()
    try:
        for path in paths:
            for part in _of_folder(path) if path.is_dir() else _of_file(path):
                known.update(part)
    except OSError as error:
        raise CorruptImage(
            f"cannot read {error.filename}: {error.strerror}; see that it is there and that you may read it"
        ) from error
    return known.hexdigest()


def _of_file(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        yield _line(path.name, found)
        yield file.read(_END_BYTES)
        file.seek(max(_END_BYTES, found.st_size - _END_BYTES))
        yield file.read()


def _of_folder(folder: Path) -> Iterator[bytes]:
    for place, folders, names in os.walk(folder, onerror=_raise):
        folders.sort()
        for name in sorted(names):
            path = Path(place, name)
            yield _line(path.relative_to(folder).as_posix(), path.stat())
            if name in _ZARR_METADATA:
                yield path.read_bytes()


def _raise(error: OSError) -> None:
    raise error


def _line(name: str, found: os.stat_result) -> bytes:
    return os.fsencode(f"{name}\0{found.st_size} {found.st_mtime_ns}\n")
