"""Orientation of stored pixels: the eight orientations of TIFF and EXIF, made upright."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from streamcnn.geometry.regions import Interval, Region

_TRANSPOSED = (5, 6, 7, 8)
_UPSIDE_DOWN = (3, 4, 7, 8)
_MIRRORED = (2, 3, 6, 7)


@dataclass(frozen=True, slots=True)
class Orientation:
    """An orientation of stored pixels; ``tag`` as in TIFF's tag 274.

    Invalid numbers, which some cameras write, count as upright.
    """

    tag: int = 1

    @property
    def is_upright(self) -> bool:
        """Whether stored pixels are upright."""
        return self.tag not in (*_TRANSPOSED, *_UPSIDE_DOWN, *_MIRRORED)

    def size(self, stored: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the upright image, given those in the file."""
        height, width = stored
        return (width, height) if self.tag in _TRANSPOSED else (height, width)

    def stored_region(self, region: Region, stored: tuple[int, int]) -> Region:
        """The region in the file, whose image has size ``stored`` (H, W), of an upright region."""
        height, width = self.size(stored)
        rows = _reversed(region.rows, height) if self.tag in _UPSIDE_DOWN else region.rows
        cols = _reversed(region.cols, width) if self.tag in _MIRRORED else region.cols
        return Region(cols, rows) if self.tag in _TRANSPOSED else Region(rows, cols)

    def upright(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """A view of stored pixels ``(C, h, w)`` that is upright."""
        if self.tag in _TRANSPOSED:
            pixels = pixels.transpose(0, 2, 1)
        if self.tag in _UPSIDE_DOWN:
            pixels = pixels[:, ::-1]
        return pixels[:, :, ::-1] if self.tag in _MIRRORED else pixels


def _reversed(axis: Interval, extent: int) -> Interval:
    return Interval(extent - axis.stop, extent - axis.start)
