"""Detection of images that occur several times, byte for byte, under different names.

Files of equal size are compared piece by piece, up to the first difference, so that few bytes are read of
images that differ.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path

from streamcnn.data.sources.files import comparing
from streamcnn.errors import DatasetMismatch

LEAST_BYTES = 2**12
"""Least bytes of an image to be compared: smaller ones are empty, and often equal."""
_PROBE_BYTES = 2**12
_PIECE_BYTES = 2**22

Piece = tuple[int, int, int]
"""Index of an image's file, first byte, and number of bytes."""


def check_copies(
    where: str | Path,
    names: Sequence[str],
    splits: Sequence[str],
    groups: Iterable[Sequence[int]],
    labels: Sequence[object] | None = None,
) -> None:
    """Refuse an image that occurs in two splits, and warn of one that occurs several times in a split.

    Parameters
    ----------
    where
        Name of the data set in messages.
    names, splits, labels
        Names, splits and labels of all images.
    groups
        Positions of equal images, as from `same_files` and `same_keys`.

    Raises
    ------
    DatasetMismatch
        If two splits have the same image.
    """
    twice = []
    for group in groups:
        first = group[0]
        other = next((at for at in group if splits[at] != splits[first]), None)
        if other is not None:
            raise DatasetMismatch(
                f"{where} has {names[first]!r} in {splits[first]} and {names[other]!r} in {splits[other]}, "
                "which are the same image, byte for byte: allowed is an image in one split; take one of them "
                "out"
            )
        differ = labels is not None and len({labels[at] for at in group}) > 1
        described = " = ".join(repr(names[at]) for at in group[:3]) + (" = ..." if len(group) > 3 else "")
        twice.append(f"{described}{' (with different labels)' if differ else ''}")
    if twice:
        shown = "; ".join(twice[:5]) + (f" and {len(twice) - 5} more" if len(twice) > 5 else "")
        warnings.warn(
            f"{where} has images that are the same, byte for byte: {shown}. Each counts as often as it is "
            "there, and what is set aside for validation may be trained on too; keep one of each",
            stacklevel=3,
        )


def same_keys(keys: Iterable[Hashable | None]) -> list[list[int]]:
    """Groups of positions with equal keys, of two and more; None does not count as a key."""
    found: dict[Hashable, list[int]] = {}
    for at, key in enumerate(keys):
        if key is not None:
            found.setdefault(key, []).append(at)
    return [group for group in found.values() if len(group) > 1]


def same_files(images: Sequence[Sequence[Path]]) -> list[list[int]]:
    """Groups of positions of images of at least 4 KiB whose files are byte for byte equal.

    Parameters
    ----------
    images
        The files and folders of each image. Names count only for files within a folder.

    Raises
    ------
    CorruptImage
        If a file cannot be read.
    """
    groups = []
    with comparing():
        for alike in same_keys(map(_listing, images)):
            files = [list(_files_of(images[at])) for at in alike]
            pieces = _pieces([size for _, _, size in files[0]])
            same = _refined([[path for path, _, _ in image] for image in files], pieces)
            groups += [[alike[place] for place in group] for group in same]
    return sorted(groups)


def _listing(paths: Sequence[Path]) -> bytes | None:
    """A digest of names and sizes of an image's files; None for a small image."""
    known, total = hashlib.sha256(), 0
    for _, name, size in _files_of(paths):
        known.update(os.fsencode(f"{name}\0{size}\n"))
        total += size
    return known.digest() if total >= LEAST_BYTES else None


def _files_of(paths: Sequence[Path]) -> Iterator[tuple[Path, str, int]]:
    """Files, each with its name within the given folder, and its size in bytes."""
    for path in paths:
        if not path.is_dir():
            yield path, "", path.stat().st_size
            continue
        for place, folders, names in os.walk(path):
            folders.sort()
            for name in sorted(names):
                file = Path(place, name)
                yield file, file.relative_to(path).as_posix(), file.stat().st_size


def _pieces(sizes: Sequence[int]) -> Iterator[Piece]:
    """Pieces that cover files of these sizes, starting in the middle, as heads are often alike."""
    middle = len(sizes) // 2
    if sizes:
        yield middle, sizes[middle] // 2, _PROBE_BYTES
    for index, size in enumerate(sizes):
        for start in range(0, size, _PIECE_BYTES):
            yield index, start, _PIECE_BYTES


def _refined(files: Sequence[Sequence[Path]], pieces: Iterable[Piece]) -> list[list[int]]:
    """Groups of positions of images whose files agree in all ``pieces``."""
    groups = [list(range(len(files)))]
    for index, start, nbytes in pieces:
        divided = []
        for group in groups:
            digests = [_digest(files[at][index], start, nbytes) for at in group]
            divided += [[group[place] for place in same] for same in same_keys(digests)]
        groups = divided
        if not groups:
            break
    return groups


def _digest(path: Path, start: int, nbytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.sha256(file.read(nbytes)).digest()
