"""Deep Zoom pyramids: a picture as small files at every resolution, of which a viewer loads the visible ones.

Level 0 is one pixel, and each level has twice the height and width of the one before. ``name.dzi`` gives the
size of the last level; ``name_files/<level>/<column>_<row>.<ending>`` are the tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamcnn.attribution.heat_map import HeatMap, coloured, strongest
from streamcnn.data.sources import ImageSource
from streamcnn.data.thumbnails import block_means, colours
from streamcnn.geometry.regions import Interval, Region
from streamcnn.support.extras import require

TILE = 512
"""Edge of a tile in pixels."""
_JPEG = {"quality": 90, "subsampling": 0}
"""Colours keep full resolution."""


@dataclass(frozen=True, slots=True)
class Pyramid:
    """The facts about a pyramid that a viewer needs."""

    name: str
    ending: str
    """File ending of its tiles, which is their format."""
    size: tuple[int, int]
    """(H, W) of the last level in pixels."""

    @property
    def last(self) -> int:
        """The level of full resolution."""
        return (max(self.size) - 1).bit_length()

    def size_of(self, level: int) -> tuple[int, int]:
        """(H, W) of a level in pixels."""
        height, width = (-(-extent // 2 ** (self.last - level)) for extent in self.size)
        return height, width

    def region(self, level: int, row: int, col: int) -> Region:
        """The region of a tile in its level."""
        height, width = self.size_of(level)
        rows, cols = (
            Interval(at * TILE, min((at + 1) * TILE, extent)) for at, extent in ((row, height), (col, width))
        )
        return Region(rows, cols)

    def to_xml(self) -> str:
        """The text of ``name.dzi``."""
        height, width = self.size
        return (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            f'<Image xmlns="http://schemas.microsoft.com/deepzoom/2008" Format="{self.ending}" Overlap="0" '
            f'TileSize="{TILE}"><Size Width="{width}" Height="{height}"/></Image>\n'
        )


def write_image_pyramid(folder: Path, name: str, source: ImageSource) -> Pyramid:
    """Write an image as JPEG tiles, reading every pixel once and holding a few tiles for each level."""
    pyramid = Pyramid(name, "jpg", source.shape[1:])
    save = _saver(folder, pyramid)

    def tile(level: int, row: int, col: int) -> NDArray[np.float32]:
        """The pixels (3, h, w) of a tile; writes the tile and all tiles of which it is the mean."""
        if level == pyramid.last:
            pixels = colours(source, pyramid.region(level, row, col))
        else:
            pixels = block_means(below(level + 1, 2 * row, 2 * col), 2)
        save(level, row, col, pixels.round().astype(np.uint8).transpose(1, 2, 0))
        return pixels

    def below(level: int, row: int, col: int) -> NDArray[np.float32]:
        """Up to four tiles, from (row, col) on, joined."""
        height, width = pyramid.size_of(level)
        rows = [each for each in (row, row + 1) if each * TILE < height]
        cols = [each for each in (col, col + 1) if each * TILE < width]
        return np.concatenate([np.concatenate([tile(level, r, c) for c in cols], 2) for r in rows], 1)

    tile(0, 0, 0)
    return pyramid


def write_heat_pyramid(folder: Path, name: str, heat: HeatMap, table: NDArray[np.uint8]) -> Pyramid:
    """Write a heat map as PNG tiles, with each level's own colour range, as means are weaker than peaks."""
    height, width = heat.values.shape
    pyramid = Pyramid(name, "png", (height, width))
    save = _saver(folder, pyramid)
    for level, values in zip(range(pyramid.last, -1, -1), heat.halvings(), strict=True):
        limit = strongest(values)
        rows, cols = (-(-extent // TILE) for extent in values.shape)
        for row in range(rows):
            for col in range(cols):
                region = pyramid.region(level, row, col)
                part = values[region.rows.start : region.rows.stop, region.cols.start : region.cols.stop]
                save(level, row, col, coloured(part, limit, table))
    return pyramid


def _saver(folder: Path, pyramid: Pyramid) -> Callable[[int, int, int, NDArray[np.uint8]], None]:
    """Write ``name.dzi``; return a function that writes a tile (h, w, 3 or 4) at (level, row, column)."""
    pillow: Any = require("PIL.Image", extra="plots")
    (folder / f"{pyramid.name}.dzi").write_text(pyramid.to_xml())
    files = folder / f"{pyramid.name}_files"
    for level in range(pyramid.last + 1):
        (files / str(level)).mkdir(parents=True)

    def save(level: int, row: int, col: int, pixels: NDArray[np.uint8]) -> None:
        picture = pillow.fromarray(np.ascontiguousarray(pixels))
        options = _JPEG if pyramid.ending == "jpg" else {}
        picture.save(files / str(level) / f"{col}_{row}.{pyramid.ending}", **options)

    return save
