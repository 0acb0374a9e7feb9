"""Track which part of a map has been written, for tiles that arrive in row order.

Adding to a position that holds nothing yet is a copy, which saves reading it. The written part is kept as one
height per column, in runs of equal heights: everything above a height counts as written. For tiles in row
order, halos included, this is exact. In any other order it errs on the safe side: a position that counts as
written without being so is zero, and adding to zero is right too.
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
        """Split ``region`` into disjoint parts, each with whether it may have been written."""
        rows = region.rows
        for cols, height in self._runs(region.cols):
            seam = min(max(height, rows.start), rows.stop)
            if seam > rows.start:
                yield Region(Interval(rows.start, seam), cols), True
            if seam < rows.stop:
                yield Region(Interval(seam, rows.stop), cols), False

    def skipped(self, region: Region) -> Iterator[Region]:
        """The parts outside ``region`` that count as written once ``region`` does, though nothing was."""
        for cols, height in self._runs(region.cols):
            if height < region.rows.start:
                yield Region(Interval(height, region.rows.start), cols)

    def claim(
        self, region: Region, zero: Callable[[Region], object] | None = None
    ) -> list[tuple[Region, bool]]:
        """Split ``region`` as `split` does, and count all of it as written from now on.

        For memory that does not come zeroed, ``zero`` is called with each part that counts as written along
        with ``region``. The caller must hold a lock, or a region of another thread could count as skipped.
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
        """Count all of ``region`` as written from now on."""
        if self._continues(region):
            self._heights[0] = region.rows.stop
            return
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
        """Whether a quick look shows that all of ``region`` is written, as most regions are when read."""
        return len(self._heights) == 1 and region.rows.stop <= self._heights[0] and 0 not in region.size

    def _continues(self, region: Region) -> bool:
        """Whether ``region`` has all columns, which are written as far as its first row, as for bands in
        order."""
        rows, cols = region
        is_next = rows.start == self._heights[0] and rows.size > 0
        return len(self._heights) == 1 and is_next and cols.size == self._width

    def _runs(self, cols: Interval) -> Iterator[tuple[Interval, int]]:
        """The runs of columns of equal height, clipped to ``cols``, each with its height."""
        start, index = cols.start, bisect_right(self._starts, cols.start)
        while start < cols.stop:
            stop = self._starts[index] if index < len(self._starts) else self._width
            yield Interval(start, min(stop, cols.stop)), self._heights[index - 1]
            start, index = stop, index + 1
