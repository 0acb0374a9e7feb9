"""Reading of regions of a memory-mapped file, without its pages staying resident."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamcnn.data.sources.layout import Layout
from streamcnn.geometry.regions import Interval, Region

BAND_BYTES = 2**22
"""Bytes of the file that are resident at a time; at least one row."""
_AROUND = 2**16
"""Bytes that the kernel maps around a touched page."""


def copied(array: NDArray[Any], layout: Layout, region: Region) -> NDArray[Any]:
    """The pixels ``(C, h, w)`` of a region, copied in bands of rows.

    Touched pages of a mapped file count as resident memory, so a band's pages are dropped before the next
    band is read. They stay in the kernel's page cache, which does not count as the process's memory.
    """
    channels = layout.image_shape(array.shape)[0]
    pixels = np.empty((channels, *region.size), array.dtype)
    rows, cols = region
    height = max(1, BAND_BYTES // _row_bytes(array, layout, cols.size))
    for top in range(rows.start, rows.stop, height):
        band = Interval(top, min(top + height, rows.stop))
        part = array[layout.window(Region(band, cols))]
        pixels[:, band.slice_in(rows)] = layout.channels_first(part)
        let_go(array)
    return pixels


def mapped_bytes(array: NDArray[Any], layout: Layout) -> int:
    """Largest number of the file's bytes that are resident while `copied` reads any region."""
    # Measured: for a region of 1000 x 1000 of three planes it took a band more than its copy and one band.
    return 2 * max(BAND_BYTES, _row_bytes(array, layout, layout.image_shape(array.shape)[2]))


def _row_bytes(array: NDArray[Any], layout: Layout, width: int) -> int:
    """Bytes mapped for a row of a region: each plane's part of it, and the surrounding pages."""
    channels = layout.image_shape(array.shape)[0]
    return channels * (width * array.dtype.itemsize + _AROUND)


def lets_go(array: NDArray[Any]) -> bool:
    """Whether an array is a memory map whose pages may be dropped, as they cannot be written to."""
    return isinstance(array, np.memmap) and array.mode == "r" and _map_of(array) is not None


def let_go(array: NDArray[Any]) -> None:
    """Let the kernel drop a map's pages from the process; touching them again reads the file."""
    mapping = _map_of(array)
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def _map_of(array: Any) -> mmap.mmap | None:
    while isinstance(array, np.ndarray):
        array = array.base
    return array if isinstance(array, mmap.mmap) else None
