"""Geometry of a map divided into strips of columns: the ranges of bytes of a file that hold a region.

H is the slowest axis of a strip, so any of its rows are one range of bytes. Reading a tile then moves no rows
beyond its halo, and at most a strip's width more on either side; a band of full rows moves nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from streamcnn.geometry.regions import Interval, Region
from streamcnn.stores.base import StoreSpec

BLOCK_NBYTES = 2**20
"""Bytes moved at once: enough to make a call's overhead small, few enough to stay in a core's cache."""
_STRIPS_PER_TILE = 8
"""Strips across a tile that is no band of full rows; a tile reads at most two strips' width in vain."""
_NARROWEST, _WIDEST = 16, 64
"""Columns of a strip: shorter runs are copied slowly, longer ones read more than a halo needs."""


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of one strip, which are one range of bytes, and their intersection with a region."""

    offset: int
    """First byte, counted from the start of the first strip."""
    covered: Region
    """The rows over the strip's whole width; the last strip may reach beyond the map."""
    part: Region
    """The intersection of the region with ``covered``."""

    @property
    def is_whole(self) -> bool:
        """Whether the region covers the whole block, so that its old values do not matter."""
        return self.part == self.covered


@dataclass(frozen=True, slots=True)
class Strips:
    """A map divided into strips of equal width; the last strip may reach beyond the map."""

    spec: StoreSpec
    """The map."""
    width: int
    """Columns of a strip."""
    row_nbytes: int
    """Bytes of one row of a strip."""

    @classmethod
    def suited(cls, spec: StoreSpec, tile_hint: tuple[int, int]) -> Strips:
        """The strips of a map that is read and written by tiles of about ``tile_hint`` (H, W)."""
        width, tile_width = spec.size[1], tile_hint[1]
        if tile_width < width:
            width = min(width, max(_NARROWEST, min(_WIDEST, tile_width // _STRIPS_PER_TILE)))
        # A map may have no elements.
        width = max(1, min(width, BLOCK_NBYTES // max(1, spec.position_nbytes)))
        return cls(spec, width, width * spec.position_nbytes)

    @property
    def count(self) -> int:
        """Number of strips."""
        return math.ceil(self.spec.size[1] / self.width)

    @property
    def nbytes(self) -> int:
        """Bytes of a strip."""
        return self.spec.size[0] * self.row_nbytes

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents of a strip, per axis of the map."""
        return self.spec.tile_shape(Region(Interval(0, self.spec.size[0]), Interval(0, self.width)))

    @property
    def file_order(self) -> tuple[int, ...]:
        """Axes of the map in the order in which a strip stores them, slowest first."""
        height = self.spec.axes[0]
        return (height, *(axis for axis in range(len(self.spec.shape)) if axis != height))

    def blocks(self, region: Region) -> Iterator[Block]:
        """The rows of strips that ``region`` meets, each once, in blocks of about `BLOCK_NBYTES`."""
        rows, cols = region
        num_rows = self._most_rows()
        for index in range(cols.start // self.width, math.ceil(cols.stop / self.width)):
            strip = Interval(index * self.width, (index + 1) * self.width)
            common = strip.intersect(cols)
            for start in range(rows.start, rows.stop, num_rows):
                some = Interval(start, min(start + num_rows, rows.stop))
                yield Block(
                    offset=index * self.nbytes + start * self.row_nbytes,
                    covered=Region(some, strip),
                    part=Region(some, common),
                )

    def largest_block(self, region: Region) -> int:
        """Bytes of the largest block that ``region`` meets."""
        return min(self._most_rows(), region.rows.size) * self.row_nbytes

    def _most_rows(self) -> int:
        return max(1, BLOCK_NBYTES // max(1, self.row_nbytes))

    def block_nbytes(self, block: Block) -> int:
        """Bytes of a block."""
        return block.covered.rows.size * self.row_nbytes
