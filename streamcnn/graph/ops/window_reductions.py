"""Reductions to a few windows of a map: adaptive pooling to so few positions that each reads much of it.

A tile gives what it has of each window that it meets, whatever its own place and extents. So the map need not
be cut at the windows, and a window may be larger than any tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamcnn.geometry.axis_maps import Adaptive
from streamcnn.geometry.regions import Interval, Region
from streamcnn.graph.ops.constants import numbers
from streamcnn.graph.ops.reduction_types import (
    Partials,
    Reduction,
    Selection,
    added,
    stacked,
    statistics_dtype,
)

Windows = tuple[Adaptive, Adaptive]
"""Those of the rows and of the columns, the map's last two axes."""


@dataclass(frozen=True, slots=True)
class WindowMeans(Reduction):
    """The mean of each window; along either axis there are no more windows than positions."""

    windows: Windows

    @property
    def needs_values(self) -> bool:
        return False

    @property
    def positional(self) -> bool:
        return True

    def partial(self, x: Tensor, region: Region) -> Partials:
        x = x.to(statistics_dtype(x.dtype))
        for dim, windows, positions in zip((-2, -1), self.windows, region, strict=True):
            x = _sums(x, dim, windows, positions)
        return (x,)

    def merge(self, parts: Sequence[Partials]) -> Partials:
        return added(parts)

    def finish(self, parts: Partials, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return ((parts[0] / self._counts(parts[0])).to(dtype),)

    def gradient_terms(
        self, results: Sequence[Tensor], grads: Sequence[Tensor | None], dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        assert grads[0] is not None
        return ((grads[0] / self._counts(grads[0])).to(dtype),)

    def gradient(self, x: Tensor, region: Region, terms: Sequence[Tensor]) -> Tensor:
        (spread,) = terms
        for dim, windows, positions in zip((-2, -1), self.windows, region, strict=True):
            spread = _spread(spread, dim, windows, positions)
        return spread

    def _counts(self, like: Tensor) -> Tensor:
        """Positions in each window, (rows, columns)."""
        rows, cols = (
            numbers(
                [windows.window(Interval(i, i + 1)).size for i in range(windows.count)],
                like.dtype,
                beside=like,
            )
            for windows in self.windows
        )
        return rows[:, None] * cols


def _sums(x: Tensor, dim: int, windows: Adaptive, positions: Interval) -> Tensor:
    """Sums over each window along ``dim``, of which ``x`` has ``positions``: zero where it has none."""
    met = windows.readers(positions)
    if not _is_kept(windows):
        parts = (part for _, part in _met(windows, positions))
        x = torch.stack([x.narrow(dim, part.start, part.size).sum(dim) for part in parts], dim)
    pads = (met.start, windows.count - met.stop)
    return torch.nn.functional.pad(x, pads if dim == -1 else (0, 0, *pads))


def _met(windows: Adaptive, positions: Interval) -> Iterator[tuple[int, Interval]]:
    """The windows that hold any of ``positions``, and which of those, counted from the first."""
    met = windows.readers(positions)
    for index in range(met.start, met.stop):
        held = windows.window(Interval(index, index + 1)).intersect(positions)
        yield index, held.shift(-positions.start)


def _is_kept(windows: Adaptive) -> bool:
    """Whether every window is one position."""
    return windows.count == windows.size


def _met_in_turn(windows: Adaptive, positions: Interval) -> Iterator[tuple[slice, Interval]]:
    for index, part in _met(windows, positions):
        yield slice(index, index + 1), part


def _met_at_once(windows: Adaptive, positions: Interval) -> Iterator[tuple[slice, Interval]]:
    met = windows.readers(positions)
    yield slice(met.start, met.stop), Interval(0, positions.size)


def _spread(gradient: Tensor, dim: int, windows: Adaptive, positions: Interval) -> Tensor:
    """The gradients of all windows along ``dim``, added up at each of ``positions``."""
    if _is_kept(windows):
        return gradient.narrow(dim, positions.start, positions.size)
    spread = gradient.new_zeros(_with_extent(gradient.shape, dim, positions.size))
    for index, part in _met(windows, positions):
        spread.narrow(dim, part.start, part.size).add_(gradient.narrow(dim, index, 1))
    return spread


def _with_extent(shape: Sequence[int], dim: int, extent: int) -> tuple[int, ...]:
    dim %= len(shape)
    return (*shape[:dim], extent, *shape[dim + 1 :])


@dataclass(frozen=True, slots=True)
class WindowMaxima(Selection):
    """The largest value of each window and its place in the whole map, counted in row order.

    The gradient goes to the first of several equal ones, as in ATen's pooling.
    """

    windows: Windows

    @property
    def _kept(self) -> int | None:
        """The axis, -2 or -1, whose windows are single positions, taken at once; the longer of two."""
        axes = zip(self.windows, (-2, -1), strict=True)
        kept = [(axis.count, dim) for axis, dim in axes if _is_kept(axis)]
        return max(kept)[1] if kept else None

    def _pairs(self, region: Region) -> Iterator[tuple[tuple[slice, slice], Region]]:
        """The windows, rows and columns, that a tile meets, and the part of the tile in each."""
        rows, cols = (
            list(_met_at_once(windows, positions) if self._kept == dim else _met_in_turn(windows, positions))
            for dim, windows, positions in zip((-2, -1), self.windows, region, strict=True)
        )
        for row, height in rows:
            for col, width in cols:
                yield (row, col), Region(height, width)

    def _places(self, region: Region, part: Region, device: torch.device) -> Tensor:
        """Places of a part of a tile, (rows, columns)."""
        rows, cols = (
            torch.arange(outer.start + inner.start, outer.start + inner.stop, device=device)
            for outer, inner in zip(region, part, strict=True)
        )
        return rows[:, None] * self.windows[1].size + cols

    def partial(self, x: Tensor, region: Region) -> Partials:
        shape = (*x.shape[:-2], *(windows.count for windows in self.windows))
        best = torch.full(shape, -math.inf, dtype=torch.float64, device=x.device)
        places = torch.full(shape, self.nowhere, device=x.device)
        for (row, col), part in self._pairs(region):
            values, there = _cut(x, part), self._places(region, part, x.device)
            if self._kept is None:
                values, there = values.flatten(-2).unsqueeze(-2), there.reshape(1, -1)
            dim = -2 if self._kept == -1 else -1
            value, index = values.max(dim, keepdim=True)
            best[..., row, col] = value.double()
            places[..., row, col] = there.expand(values.shape).gather(dim, index)
        return (best, places)

    def merge(self, parts: Sequence[Partials]) -> Partials:
        bests, places = stacked(parts)
        best = bests.amax(0)
        holds = (bests == best) | bests.isnan()
        return (best, torch.where(holds, places, self.nowhere).amin(0))

    def gradient(self, x: Tensor, region: Region, terms: Sequence[Tensor]) -> Tensor:
        found = torch.zeros_like(x)
        for (row, col), part in self._pairs(region):
            places, gradient = (term[..., row, col] for term in terms)
            chosen = self._places(region, part, x.device) == places
            _cut(found, part).add_(chosen * gradient)
        return found


def _cut(x: Tensor, part: Region) -> Tensor:
    return x[..., part.rows.start : part.rows.stop, part.cols.start : part.cols.stop]
