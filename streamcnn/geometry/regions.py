"""Integer geometry: half-open intervals on one spatial axis and regions on two.

A region names positions of one map, rows then columns, in that map's own coordinates.
Nothing here knows about tensors, so every rule can be checked by brute force.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
"""Positions on one axis, one per tile."""


@dataclass(frozen=True, slots=True, order=True)
class Interval:
    """The integers ``start <= i < stop``; never negative in length."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if self.stop < self.start:
            raise ValueError(f"interval [{self.start}, {self.stop}) ends before it starts")

    @property
    def size(self) -> int:
        """Number of integers in the interval."""
        return self.stop - self.start

    def intersect(self, other: Interval) -> Interval:
        """The common part; an interval of size 0 if there is none."""
        start = max(self.start, other.start)
        return Interval(start, max(start, min(self.stop, other.stop)))

    def contains(self, other: Interval) -> bool:
        """Whether every integer of ``other`` lies in this interval."""
        return self.start <= other.start and other.stop <= self.stop

    def shift(self, offset: int) -> Interval:
        """The interval moved by ``offset``."""
        return Interval(self.start + offset, self.stop + offset)

    def slice_in(self, outer: Interval) -> slice:
        """The slice that crops an array which covers ``outer`` to this interval."""
        # A start before the first position would count from the end, and a stop past the last is clipped.
        assert outer.contains(self), f"{self} is not inside {outer}"
        return slice(self.start - outer.start, self.stop - outer.start)


class Region(NamedTuple):
    """One interval per spatial axis, rows (H) then columns (W)."""

    rows: Interval
    cols: Interval

    @classmethod
    def whole(cls, size: tuple[int, int]) -> Region:
        """The region that covers a map of ``size`` (H, W)."""
        return cls(Interval(0, size[0]), Interval(0, size[1]))

    @property
    def size(self) -> tuple[int, int]:
        """Extents (H, W)."""
        return (self.rows.size, self.cols.size)

    def contains(self, other: Region) -> bool:
        """Whether ``other`` lies inside."""
        return self.rows.contains(other.rows) and self.cols.contains(other.cols)

    def meets(self, other: Region) -> bool:
        """Whether both have a position in common."""
        shared = self.rows.intersect(other.rows), self.cols.intersect(other.cols)
        return all(part.size > 0 for part in shared)


@dataclass(frozen=True, slots=True, eq=False)
class Intervals:
    """Many intervals at once, as arrays of equal length, such as what each tile of an axis needs of a map."""

    start: Indices
    stop: Indices

    @classmethod
    def evenly(cls, size: int, num_parts: int) -> Intervals:
        """``num_parts`` disjoint intervals that cover ``[0, size)`` in order, sizes differing by one at most.

        Raises
        ------
        ValueError
            If there are more parts than positions, since every part must hold at least one.
        """
        if not 1 <= num_parts <= size:
            raise ValueError(f"cannot cut {size} positions into {num_parts} parts: allowed are 1 to {size}")
        cuts = np.arange(num_parts + 1, dtype=np.int64) * size // num_parts
        return cls(cuts[:-1], cuts[1:])

    @property
    def sizes(self) -> Indices:
        """Number of integers in each interval."""
        return self.stop - self.start

    def hull(self, other: Intervals) -> Intervals:
        """For each pair, the smallest interval that holds both."""
        return Intervals(np.minimum(self.start, other.start), np.maximum(self.stop, other.stop))

    def shift(self, offset: Indices) -> Intervals:
        """Each interval moved by an offset of its own."""
        return Intervals(self.start + offset, self.stop + offset)

    def equals(self, other: Intervals) -> bool:
        """Whether all intervals are the same."""
        pairs = (self.start, other.start), (self.stop, other.stop)
        return self is other or all(np.array_equal(mine, theirs) for mine, theirs in pairs)

    def part(self, where: slice) -> Intervals:
        """The intervals that the slice ``where`` picks."""
        return Intervals(self.start[where], self.stop[where])

    @classmethod
    def joined(cls, each: Sequence[Intervals]) -> Intervals:
        """All intervals one after the other."""
        return cls(np.concatenate([i.start for i in each]), np.concatenate([i.stop for i in each]))

    def __getitem__(self, index: int) -> Interval:
        return Interval(int(self.start[index]), int(self.stop[index]))

    def __iter__(self) -> Iterator[Interval]:
        return map(Interval, self.start.tolist(), self.stop.tolist())
