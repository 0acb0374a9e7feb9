"""Which part of a gradient map has been written, when tiles arrive in row order.

Adding to a position that holds nothing yet is a copy, which saves reading it. What has been written is
kept as one height per column: everything above it counts as written. Tiles in row order, halos included,
are described exactly; any other order only makes the answer careful, since adding to a zero is right too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from streamcnn.geometry.regions import Interval, Region


class Frontier:
    """The written part of a map of ``size`` (H, W)."""

    def __init__(self, size: tuple[int, int]) -> None:
        self._heights = np.zeros(size[1], np.int64)

    def split(self, region: Region) -> Iterator[tuple[Region, bool]]:
        """``region`` in disjoint parts, each with whether it may hold something."""
        rows, cols = region
        heights = self._heights[cols.start : cols.stop]
        edges = np.flatnonzero(np.diff(heights)) + 1
        for start, stop in zip([0, *edges], [*edges, cols.size], strict=True):
            part = Interval(cols.start + int(start), cols.start + int(stop))
            seam = min(max(int(heights[start]), rows.start), rows.stop)
            if seam > rows.start:
                yield Region(Interval(rows.start, seam), part), True
            if seam < rows.stop:
                yield Region(Interval(seam, rows.stop), part), False

    def skipped(self, region: Region) -> Iterator[Region]:
        """What counts as written as soon as ``region`` does, although nothing was written there."""
        rows, cols = region
        heights = np.minimum(self._heights[cols.start : cols.stop], rows.start)
        edges = np.flatnonzero(np.diff(heights)) + 1
        for start, stop in zip([0, *edges], [*edges, cols.size], strict=True):
            if heights[start] < rows.start:
                above = Interval(int(heights[start]), rows.start)
                yield Region(above, Interval(cols.start + int(start), cols.start + int(stop)))

    def claim(
        self, region: Region, zero: Callable[[Region], object] | None = None
    ) -> list[tuple[Region, bool]]:
        """``region`` in parts as `split` has it; from now on, all of it may hold something.

        ``zero`` makes a part zero, where memory does not come so: what counts as written with ``region``.
        Both are done under the caller's lock: else another thread's region could be taken for skipped.
        """
        if zero is not None:
            for part in self.skipped(region):
                zero(part)
        parts = list(self.split(region))
        self.mark(region)
        return parts

    def mark(self, region: Region) -> None:
        """All of ``region`` may hold something from now on."""
        heights = self._heights[region.cols.start : region.cols.stop]
        np.maximum(heights, region.rows.stop, out=heights)
