"""Checks of a TIFF before its pixels are read: that it can be decoded, and that it is complete.

Tifffile reads tiles beyond the end of a file as empty, which some decoders turn into pixels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from tifffile import COMPRESSION, TIFF, TiffFile, TiffPage, TiffPageSeries

from streamcnn.errors import CorruptImage, DatasetMismatch
from streamcnn.support.extras import require

if TYPE_CHECKING:
    from tifffile import TiffFrame

_HEADER_BYTES = 8
_ADVICE = "it was cut short or damaged, copy it again"


def check_decodable(name: str, page: TiffPage) -> None:
    """Raise if the pixels cannot be decoded.

    Raises
    ------
    MissingExtra
        If their compression needs a package that is not installed.
    DatasetMismatch
        If there is no decoder for it.
    """
    try:
        TIFF.DECOMPRESSORS[page.compression]
        if page.predictor != 1 and page.compression not in TIFF.IMAGE_COMPRESSIONS:
            TIFF.UNPREDICTORS[page.predictor]
    except KeyError as error:
        require("imagecodecs", extra="tiff")
        raise DatasetMismatch(
            f"{name} is compressed with {COMPRESSION(page.compression).name}, which cannot be decoded "
            f"({error.args[0]}): allowed is what imagecodecs decodes, such as DEFLATE, LZW, ZSTD and JPEG"
        ) from error


def check_directories(name: str, file: TiffFile) -> None:
    """Raise `CorruptImage` if the chain of the file's directories is empty or broken."""
    if not file.pages:
        raise CorruptImage(f"{name} has no directory of images; {_ADVICE}")
    last = file.pages[len(file.pages) - 1]
    following = last._nextifd()
    if following >= file.filehandle.size:
        raise CorruptImage(
            f"{name} ends at byte {file.filehandle.size}, its directory goes on at {following}; {_ADVICE}"
        )


def check_complete(name: str, series: TiffPageSeries) -> None:
    """Raise `CorruptImage` if a tile or strip of a level is beyond the end of its file; the text names it."""
    if series.dataoffset is not None:
        _check_contiguous(name, series)
        return
    for number, page in enumerate(series):
        if page is None:
            raise CorruptImage(
                f"{name} lacks its plane {number}: the file that holds it is not there; {_ADVICE}"
            )
        _check_page(name, page)


def _check_contiguous(name: str, series: TiffPageSeries) -> None:
    assert series.dataoffset is not None
    size = series.keyframe.parent.filehandle.size
    shape = series.get_shape(False)
    there = max(0, size - series.dataoffset) // series.dtype.itemsize
    if there < math.prod(shape):
        place = np.unravel_index(there, shape)
        row = int(place[series.get_axes(False).index("Y")])
        raise CorruptImage(f"{name} ends at byte {size}, in row {row} of its pixels; {_ADVICE}")


def _check_page(name: str, page: TiffPage | TiffFrame) -> None:
    frame, size = page.keyframe, page.parent.filehandle.size
    assert frame is not None
    offsets = np.array(page.dataoffsets, np.uint64)
    counts = np.array(page.databytecounts, np.uint64)
    needed = math.prod(frame.chunked)
    if min(len(offsets), len(counts)) < needed:
        raise CorruptImage(
            f"{name} says where {min(len(offsets), len(counts))} tiles or strips are, and has {needed}; "
            f"{_ADVICE}"
        )
    offsets, counts = offsets[:needed], counts[:needed]
    # Without sums, which may overflow for a damaged file.
    beyond = (offsets > size) | (counts > size - np.minimum(offsets, size))
    lost = np.flatnonzero((counts > 0) & (beyond | (offsets < _HEADER_BYTES)))
    if lost.size:
        first = int(lost[0])
        raise CorruptImage(
            f"{name} has {size} bytes, its {_place(frame, first)} would be {counts[first]} bytes at "
            f"{offsets[first]}; {_ADVICE}"
        )


def _place(page: TiffPage, index: int) -> str:
    """The rows and columns of a tile or strip."""
    height, width = chunk_size(page)
    across = math.ceil(page.imagewidth / width)
    down = math.ceil(page.imagelength / height)
    row, col = divmod(index % (across * down), across)
    top, left = row * height, col * width
    bottom, right = min(top + height, page.imagelength), min(left + width, page.imagewidth)
    return f"{'tile' if page.is_tiled else 'strip'} of rows {top}..{bottom}, cols {left}..{right}"


def chunk_size(page: TiffPage) -> tuple[int, int]:
    """Height and width in pixels of a tile or strip."""
    if page.is_tiled:
        return page.tilelength, page.tilewidth
    return min(page.rowsperstrip, page.imagelength), page.imagewidth
