"""Which part of a gradient map has been written, when tiles arrive in row order.

Adding to a position that holds nothing yet is a copy, which saves reading it. What has been written is
kept as one height per column, in runs of equal ones: everything above it counts as written. Tiles in row
order, halos included, are described exactly; any other order only makes the answer careful, since adding to
a zero is right too.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator

from streamcnn.geometry.regions import Interval, Region


class Frontier:
    """The written part of a map of ``size`` (H, W)."""

    def __init__(self, size: tuple[int, int]) -> None:
        self._width = size[1]
        self._starts = [0]
        """First columns of runs, ascending; neighbours differ in height."""
        self._heights = [0]

    def split(self, region: Region) -> Iterator[tuple[Region, bool]]:
        """``region`` in disjoint parts, each with whether it may hold something."""
        rows = region.rows
        for cols, height in self._runs(region.cols):
            seam = min(max(height, rows.start), rows.stop)
            if seam > rows.start:
                yield Region(Interval(rows.start, seam), cols), True
            if seam < rows.stop:
                yield Region(Interval(seam, rows.stop), cols), False

    def skipped(self, region: Region) -> Iterator[Region]:
        """What counts as written as soon as ``region`` does, although nothing was written there."""
        for cols, height in self._runs(region.cols):
            if height < region.rows.start:
                yield Region(Interval(height, region.rows.start), cols)

    def claim(
        self, region: Region, zero: Callable[[Region], object] | None = None
    ) -> list[tuple[Region, bool]]:
        """``region`` in parts as `split` has it; from now on, all of it may hold something.

        ``zero`` makes a part zero, where memory does not come so: what counts as written with ``region``.
        Both are done under the caller's lock: else another thread's region could be taken for skipped.
        """
        if self._holds(region):
            return [(region, True)]
        if zero is not None:
            for part in self.skipped(region):
                zero(part)
        parts = list(self.split(region))
        self.mark(region)
        return parts

    def mark(self, region: Region) -> None:
        """All of ``region`` may hold something from now on."""
        cols = region.cols
        runs = [(part.start, max(height, region.rows.stop)) for part, height in self._runs(cols)]
        if not runs:
            return
        if cols.stop < self._width:
            runs.append((cols.stop, self._heights[bisect_right(self._starts, cols.stop) - 1]))
        first, end = bisect_left(self._starts, cols.start), bisect_right(self._starts, cols.stop)
        before = self._heights[first - 1] if first else None
        starts, heights = list[int](), list[int]()
        for start, height in runs:
            if height != before:
                starts.append(start)
                heights.append(height)
            before = height
        self._starts[first:end], self._heights[first:end] = starts, heights

    def _holds(self, region: Region) -> bool:
        """Whether all of ``region`` is known at a glance to be written, as most of what is read is."""
        return len(self._heights) == 1 and region.rows.stop <= self._heights[0] and 0 not in region.size

    def _runs(self, cols: Interval) -> Iterator[tuple[Interval, int]]:
        """Runs of columns of equal height, as far as they are within ``cols``, with it."""
        start, index = cols.start, bisect_right(self._starts, cols.start)
        while start < cols.stop:
            stop = self._starts[index] if index < len(self._starts) else self._width
            yield Interval(start, min(stop, cols.stop)), self._heights[index - 1]
            start, index = stop, index + 1
