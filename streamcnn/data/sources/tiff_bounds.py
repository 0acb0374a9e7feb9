"""Checks of the sizes that a TIFF claims, before memory is allocated for them.

Tifffile creates a list of as many planes as OME-XML claims, opens the files that it names wherever they are,
and lets picture codecs decode a tile's content of any size.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tifffile import TiffFile, TiffPage, read_ndtiff_index

from streamcnn.data.sources.files import check_piece, is_there, regular
from streamcnn.data.sources.picture_heads import picture_size
from streamcnn.errors import CorruptImage, DatasetMismatch
from streamcnn.support.documents import require_within

_MOST_PLANES = 2**20
"""Largest number of planes, and of parts of a file that hold planes."""
_SLACK_PIXELS = 2**16
"""Pixels by which a tile's own picture may exceed twice the tile."""
_COUNTS = {"IFD", "FirstC", "FirstT", "FirstZ", "SamplesPerPixel"}
_STEPS = ("Start", "End", "Step")


def check_ome(name: str, file: TiffFile) -> None:
    """Raise if a file's OME-XML claims impossible sizes, or names files that must not be opened.

    Raises
    ------
    CorruptImage
        If it is not XML, or a number or a name in it is invalid.
    DatasetMismatch
        If there are too many planes.
    """
    text = file.ome_metadata if file.is_ome else None
    if text is None:
        return
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise CorruptImage(f"{name} has a description in damaged OME-XML ({error}); copy it again") from error
    num_parts = 0
    for element in root.iter():
        kind = str(element.tag).rpartition("}")[2]
        if kind == "Pixels":
            num_planes, num_pixels = (
                math.prod(_number(name, element, f"Size{axis}") for axis in axes) for axes in ("CTZ", "YX")
            )
            _check_planes(name, num_planes)
            # The number of planes of the first page's size in all pixels.
            _check_planes(name, num_planes * num_pixels // max(1, file.pages.first.size))
        if kind == "TiffData":
            num_parts += max(1, *(_number(name, element, key) for key in ("NumPlanes", "PlaneCount")))
        if kind.startswith("ModuloAlong"):
            _check_planes(name, _num_steps(name, element))
        for key in _COUNTS & element.attrib.keys():
            _check_planes(name, _number(name, element, key))
        if kind == "UUID" and "FileName" in element.attrib:
            _check_companion(Path(file.filehandle.path), element.attrib["FileName"])
    _check_planes(name, num_parts)


def check_micromanager(name: str, file: TiffFile) -> None:
    """Raise if a Micro-Manager file continues in files that must not be opened.

    Raises
    ------
    CorruptImage
        If one is in another folder, or is a pipe, a socket or a device.
    DatasetMismatch
        If there are too many planes.
    """
    main = Path(file.filehandle.path)
    if file.is_ndtiff:
        index = main.parent / "NDTiff.index"
        _check_companion(main, index.name)
        for count, (_, other, *_) in enumerate(read_ndtiff_index(index)):
            _check_planes(name, count)
            _check_companion(main, other)
    if file.is_mmstack:
        for path in main.parent.glob("*_MMStack*.tif"):
            _check_companion(main, path.name)


def _number(name: str, element: ElementTree.Element, key: str) -> int:
    """An integer among an element's attributes; 0 if it is missing."""
    text = element.get(key, "0")
    if not (text.isascii() and text.removeprefix("-").isdecimal() and len(text) <= 18):
        raise CorruptImage(f"{name} has OME-XML in which {key} is {text[:80]!r}: allowed are whole numbers")
    return int(text)


def _num_steps(name: str, element: ElementTree.Element) -> int:
    try:
        start, end, step = (float(element.get(key, other)) for key, other in zip(_STEPS, "001", strict=True))
        return math.ceil((end - start) / step)
    except (ArithmeticError, ValueError) as error:
        raise CorruptImage(f"{name} has OME-XML with steps that are none ({error}); copy it again") from error


def _check_planes(name: str, count: int) -> None:
    if count > _MOST_PLANES:
        raise DatasetMismatch(
            f"{name} has metadata that tell of {count} planes or parts: allowed are {_MOST_PLANES}; they "
            "are damaged, or the image has to be divided"
        )


def _check_companion(main: Path, other: str) -> None:
    """Make sure that a further file of an image is a regular file in the image's folder."""
    path = main.parent / other
    if "\0" in other:
        raise CorruptImage(f"{main} names {other[:80]!r} as a part of its image: allowed are files beside it")
    require_within(main.parent, path, error=CorruptImage)
    if is_there(path):
        regular(path)


def check_chunk(name: str, page: TiffPage, size: tuple[int, int], max_pixels: int) -> None:
    """Raise `DatasetMismatch` if a tile or strip of ``size`` (H, W) is too large to be decoded whole."""
    samples = page.samplesperpixel if page.planarconfig == 1 else 1
    depth = page.tiledepth if page.is_tiled else 1
    check_piece(name, "tiles" if page.is_tiled else "strips", size, samples * depth, max_pixels)


def bound_pictures(name: str, page: TiffPage, size: tuple[int, int]) -> None:
    """Let the page's decoder refuse a tile whose own picture has over twice the pixels of ``size`` (H, W).

    Reading such a tile raises `CorruptImage`.
    """
    unbounded: Any = page.decode
    limit = 2 * math.prod(size) + _SLACK_PIXELS

    def decode(data: bytes | None, *args: Any, **options: Any) -> Any:
        found = None if data is None else picture_size(bytes(data), page.compression)
        if found is not None and math.prod(found) > limit:
            raise CorruptImage(
                f"a tile or strip of {name} holds a picture of {found[0]} x {found[1]} pixels, its place has "
                f"{size[0]} x {size[1]}; copy the image again"
            )
        return unbounded(data, *args, **options)

    page.__dict__["decode"] = decode  # where tifffile caches the decoder
