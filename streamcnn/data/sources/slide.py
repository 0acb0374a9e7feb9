"""Whole-slide images in vendors' formats, through OpenSlide."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from streamcnn.data.sources.base import FileSource
from streamcnn.data.sources.files import FileStamp, PerProcess, opening
from streamcnn.data.sources.layout import torch_dtype
from streamcnn.errors import CorruptImage, DatasetMismatch
from streamcnn.geometry.regions import Interval, Region
from streamcnn.plan.reading import ReadingCost
from streamcnn.support.extras import require

_WHITE = "FFFFFF"
_BLOCK = 256
_CACHE_BYTES = 2**25
"""Bytes of decoded tiles that OpenSlide keeps for each open slide."""
_PIXEL_BYTES = 20
"""Bytes for each pixel: RGBA, RGB in four bytes, its bytes in pieces and joined, the region, and the region
with channels first."""
_CODEC_BYTES = 2**23
"""Bytes for the tile being decoded."""


@final
class SlideSource(FileSource):
    """One level of a whole-slide image as RGB in uint8, over the slide's background colour.

    OpenSlide takes positions in pixels of level 0. If a level's pixel is not a whole number of those,
    positions are exact only to half a pixel of level 0, and colours are interpolated. To give every pixel the
    same value in every region, such a level is read in blocks at fixed positions.

    Parameters
    ----------
    path : file
    level : resolution; 0 is full

    Raises
    ------
    CorruptImage
        If there is no such file, or OpenSlide cannot open it.
    DatasetMismatch
        If there is no such level.
    MissingExtra
        If OpenSlide is not installed.
    """

    def __init__(self, path: str | Path, *, level: int = 0) -> None:
        name = str(path)
        self._request = (name, level)
        with opening(name, "slide"):
            self._stamp = FileStamp.of(name)
            self._slides = PerProcess(functools.partial(_open, name))
            slide = self._slides.get()
        if not 0 <= level < slide.level_count:
            raise DatasetMismatch(f"{name} has no level {level}: allowed are 0..{slide.level_count - 1}")
        width, height = slide.level_dimensions[level]
        self._level = level
        self._downsample = float(slide.level_downsamples[level])
        self._background = f"#{slide.properties.get('openslide.background-color', _WHITE)}"
        super().__init__((3, height, width), torch_dtype(name, np.dtype("u1")), name)

    @property
    def pieces(self) -> str:
        """Text on the kind of file."""
        return "a slide that OpenSlide reads, with a cache of decoded tiles"

    @property
    def reading_cost(self) -> ReadingCost:
        """The region in Pillow's memory and as an array, and OpenSlide's cache."""
        return ReadingCost(self.shape[1:], held=_CACHE_BYTES, pixel=_PIXEL_BYTES, fixed=_CODEC_BYTES)

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, self._request

    def _load(self, region: Region) -> NDArray[Any]:
        self._stamp.check()
        out = np.empty((*region.size, 3), np.uint8)
        try:
            for block in self._blocks(region):
                self._draw(block, region, out)
        except Exception:
            self._slides.forget()  # after an error, OpenSlide refuses all further calls
            raise
        return out.transpose(2, 0, 1)

    def _blocks(self, region: Region) -> list[Region]:
        """The blocks to read; each covers the part of ``region`` that lies in it."""
        if self._downsample.is_integer():
            return [region]
        rows, cols = (
            [Interval(start, min(start + _BLOCK, axis.stop)) for start in _starts(axis)] for axis in region
        )
        return [Region(*pair) for pair in itertools.product(rows, cols)]

    def _draw(self, block: Region, region: Region, out: NDArray[np.uint8]) -> None:
        from PIL import Image

        place = (round(block.cols.start * self._downsample), round(block.rows.start * self._downsample))
        height, width = block.size
        drawn = self._slides.get().read_region(place, self._level, (width, height))
        opaque = Image.new("RGB", drawn.size, self._background)
        opaque.paste(drawn, mask=drawn)
        parts = [axis.intersect(wanted) for axis, wanted in zip(block, region, strict=True)]
        there = tuple(part.slice_in(wanted) for part, wanted in zip(parts, region, strict=True))
        here = tuple(part.slice_in(axis) for part, axis in zip(parts, block, strict=True))
        out[there] = np.asarray(opaque)[here]


def _starts(axis: Interval) -> range:
    return range(axis.start // _BLOCK * _BLOCK, axis.stop, _BLOCK)


def slide_levels(path: str) -> tuple[tuple[int, int], ...]:
    """Height and width in pixels of each resolution of a slide, the full one first.

    Raises
    ------
    CorruptImage
        If OpenSlide cannot open it.
    """
    with opening(path, "slide"), _open(path) as slide:
        return tuple((height, width) for width, height in slide.level_dimensions)


def _open(path: str) -> Any:
    openslide = require("openslide", extra="slides")
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        if not path.lower().endswith(".dcm"):
            raise
        raise CorruptImage(
            f"{path} is no whole slide (VL Whole Slide Microscopy) that OpenSlide knows, or is damaged: of "
            "DICOM files only these can be read, no slices of CT or MR; write each image as a TIFF or a zarr "
            "array"
        ) from error


def _reopen(path: str, level: int) -> SlideSource:
    return SlideSource(path, level=level)
