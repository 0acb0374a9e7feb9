"""The classes in masks, found by reading all pixels, a part at a time."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from streamcnn.data.sources import ImageSource, open_image
from streamcnn.data.sources.guard import MissingChunks
from streamcnn.geometry.regions import Interval, Region

_ROWS, _COLUMNS = 512, 2**15
"""Largest rows and columns that are read at a time: whole tiles of most files."""
_SMALL_KINDS = ("uint8", "uint16")
"""Dtypes whose values are counted in a table of all values."""


def values_of(mask: ImageSource) -> Counter[int]:
    """Count the pixels of each value in a mask (1, H, W) of integers.

    Raises
    ------
    CorruptImage
        If the pixels cannot be read.
    """
    found: Counter[int] = Counter()
    for region in _parts(mask):
        for row in mask.read(region)[0].numpy():
            if row.dtype.name in _SMALL_KINDS:
                counts = np.bincount(row)
                values = np.flatnonzero(counts)
                counts = counts[values]
            else:
                values, counts = np.unique(row, return_counts=True)
            found.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    return found


def _parts(mask: ImageSource) -> Iterator[Region]:
    _, height, width = mask.shape
    for top in range(0, height, _ROWS):
        for left in range(0, width, _COLUMNS):
            yield Region(Interval(top, min(top + _ROWS, height)), Interval(left, min(left + _COLUMNS, width)))


def values_of_file(path: Path, missing_chunks: MissingChunks = "some") -> Mapping[int, int]:
    """`values_of` the mask in a file, cached until the file changes.

    Raises
    ------
    CorruptImage
        If the file cannot be read.
    """
    if path.is_dir():
        return MappingProxyType(values_of(open_image(path, missing_chunks=missing_chunks)))
    found = path.stat()
    return _values_of_file(path, missing_chunks, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=2**12)
def _values_of_file(
    path: Path, missing_chunks: MissingChunks, size: int, modified_ns: int
) -> Mapping[int, int]:
    return MappingProxyType(values_of(open_image(path, missing_chunks=missing_chunks)))
