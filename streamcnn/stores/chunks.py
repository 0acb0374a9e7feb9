"""Integer geometry of a map cut into chunks: which rows of which chunks hold a region.

Inside a chunk H runs slowest, so some rows of a chunk are one range of bytes. A tile's halo then
costs only its own rows in the chunks above and below, and a chunk's width in those beside it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from streamcnn.geometry.regions import Interval, Region
from streamcnn.stores.base import StoreSpec

_TARGET_NBYTES = 2**20
"""Bytes of a chunk: far more than opening a file costs, little enough to stay in a core's cache."""
_MIN_ROWS = 16
"""Rows below which a chunk is cut along batch and channels instead, so that files stay few."""
_COLUMNS_PER_TILE = 8
"""Chunks across one tile, unless it is a band of full rows: what a halo reads in vain is at most two more."""
_NARROWEST, _WIDEST = 16, 64
"""Columns of a chunk: shorter runs are copied slowly, longer ones read more than a halo needs."""


@dataclass(frozen=True, slots=True)
class ChunkPart:
    """What one chunk and one region have in common."""

    index: tuple[int, ...]
    """Position of the chunk in the grid, per axis of the map."""
    rows: Interval
    """Rows of the chunk that the region meets, counted from the chunk's first."""
    in_rows: tuple[slice, ...]
    """Where the region lies in an array of those rows, axes in the map's order."""
    in_tile: tuple[slice, ...]
    """Where they lie in a tile of the region."""
    fills_rows: bool
    """Whether the region covers all of those rows, so that their old values do not matter."""


@dataclass(frozen=True, slots=True)
class ChunkGrid:
    """A map cut into equal chunks; the last ones may reach beyond its end."""

    spec: StoreSpec
    """The map."""
    chunk: tuple[int, ...]
    """Extents of a chunk, per axis of the map."""

    @classmethod
    def suited(cls, spec: StoreSpec, tile_hint: tuple[int, int]) -> ChunkGrid:
        """The grid for a map that is read and written by tiles of about ``tile_hint`` (H, W)."""
        return cls(spec, _chunk_shape(spec, tile_hint))

    @property
    def file_order(self) -> tuple[int, ...]:
        """Axes of the map in the order in which a chunk stores them, slowest first."""
        height = self.spec.axes[0]
        return (height, *(axis for axis in range(len(self.chunk)) if axis != height))

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row of a chunk."""
        return self.nbytes // self.chunk[self.spec.axes[0]]

    @property
    def nbytes(self) -> int:
        """Bytes of a chunk."""
        return math.prod(self.chunk) * self.spec.dtype.itemsize

    def parts(self, region: Region) -> Iterator[ChunkPart]:
        """The chunks that ``region`` meets, each once."""
        cuts = [_cuts(*each) for each in zip(self._intervals(region), self.chunk, strict=True)]
        return (self._part(combination) for combination in itertools.product(*cuts))

    def _intervals(self, region: Region) -> list[Interval]:
        """What ``region`` covers of each axis of the map."""
        intervals = [Interval(0, extent) for extent in self.spec.shape]
        intervals[self.spec.axes[0]], intervals[self.spec.axes[1]] = region
        return intervals

    def _part(self, cuts: tuple[_Cut, ...]) -> ChunkPart:
        height = self.spec.axes[0]
        rows = cuts[height].inside
        in_rows = [slice(crop.inside.start, crop.inside.stop) for crop in cuts]
        in_rows[height] = slice(0, rows.size)
        return ChunkPart(
            index=tuple(crop.index for crop in cuts),
            rows=rows,
            in_rows=tuple(in_rows),
            in_tile=tuple(crop.in_tile for crop in cuts),
            fills_rows=all(
                crop.inside.size == extent
                for axis, (crop, extent) in enumerate(zip(cuts, self.chunk, strict=True))
                if axis != height
            ),
        )


@dataclass(frozen=True, slots=True)
class _Cut:
    """The common part of an interval and one chunk on one axis."""

    index: int
    inside: Interval
    in_tile: slice


def _cuts(interval: Interval, extent: int) -> list[_Cut]:
    """``interval`` cut where chunks of ``extent`` meet."""
    cuts = []
    for index in range(interval.start // extent, math.ceil(interval.stop / extent)):
        chunk = Interval(index * extent, (index + 1) * extent)
        common = interval.intersect(chunk)
        cuts.append(_Cut(index, common.shift(-chunk.start), common.slice_in(interval)))
    return cuts


def _chunk_shape(spec: StoreSpec, tile_hint: tuple[int, int]) -> tuple[int, ...]:
    """Extents of a chunk of about the target size."""
    height, width = spec.size
    tallest = min(height, tile_hint[0])
    chunk = list(spec.shape)
    chunk[spec.axes[0]] = min(_MIN_ROWS, tallest)
    if tile_hint[1] < width:
        columns = max(_NARROWEST, min(_WIDEST, tile_hint[1] // _COLUMNS_PER_TILE))
        chunk[spec.axes[1]] = min(width, columns)
    for axis in (axis for axis in range(len(chunk)) if axis not in spec.axes):
        excess = math.ceil(math.prod(chunk) * spec.dtype.itemsize / _TARGET_NBYTES)
        chunk[axis] = math.ceil(chunk[axis] / min(chunk[axis], excess))
    row_nbytes = math.prod(chunk) * spec.dtype.itemsize // chunk[spec.axes[0]]
    num_chunks = math.ceil(tallest * row_nbytes / _TARGET_NBYTES)
    chunk[spec.axes[0]] = math.ceil(tallest / num_chunks)
    return tuple(chunk)
