"""Integer geometry of a map cut into strips of columns: which ranges of bytes of a file hold a region.

In a strip H runs slowest, so any rows of it are one range of bytes. A tile's halo then costs only its own
rows above and below, and a strip's width on either side; a band of full rows costs nothing but itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from streamcnn.geometry.regions import Interval, Region
from streamcnn.stores.base import StoreSpec

BLOCK_NBYTES = 2**20
"""Bytes moved at once: enough that the call costs little, few enough to stay in a core's cache."""
_STRIPS_PER_TILE = 8
"""Strips across a tile that is no band of full rows: of these, its halo reads two more in vain at most."""
_NARROWEST, _WIDEST = 16, 64
"""Columns of a strip: shorter runs are copied slowly, longer ones read more than a halo needs."""


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of one strip, which are one range of bytes, and what a region has in common with them."""

    offset: int
    """First byte, counted from the first of the first strip."""
    covered: Region
    """All of those rows; the last strip may reach beyond the map."""
    part: Region
    """What the region has of them."""

    @property
    def is_whole(self) -> bool:
        """Whether the region has all of them, so that their old values do not matter."""
        return self.part == self.covered


@dataclass(frozen=True, slots=True)
class Strips:
    """A map cut into strips of equal width; the last one may reach beyond its end."""

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
        position_nbytes = spec.nbytes // math.prod(spec.size)
        width = max(1, min(width, BLOCK_NBYTES // position_nbytes))
        return cls(spec, width, width * position_nbytes)

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
        return max(1, BLOCK_NBYTES // self.row_nbytes)

    def block_nbytes(self, block: Block) -> int:
        """Bytes of a block."""
        return block.covered.rows.size * self.row_nbytes
