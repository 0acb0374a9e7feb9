"""Reductions over a few windows of a map: adaptive pooling to so few positions that each reads much of it.

A tile contributes to each window that it overlaps, whatever its own place and extents. So tiles need not
follow the windows, and a window may be larger than any tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad  # by itself, since the user may replace it there

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
from streamcnn.graph.ops.window_places import largest_in

Windows = tuple[Adaptive, Adaptive]
"""The windows along rows and along columns, the map's last two axes."""


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
        return (self._divided(parts[0]).to(dtype),)

    def gradient_terms(
        self, results: Sequence[Tensor], grads: Sequence[Tensor | None], dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        assert grads[0] is not None
        return (self._divided(grads[0].to(statistics_dtype(dtype))).to(dtype),)

    def gradient(self, x: Tensor, region: Region, terms: Sequence[Tensor]) -> Tensor:
        (spread,) = terms
        for dim, windows, positions in zip((-2, -1), self.windows, region, strict=True):
            spread = _spread(spread, dim, windows, positions)
        return spread

    def _divided(self, sums: Tensor) -> Tensor:
        """Divide each window's value by its number of rows and then of columns, as in ATen."""
        rows, cols = (numbers(window_sizes(axis), sums.dtype, beside=sums) for axis in self.windows)
        return sums / rows[:, None] / cols


def window_sizes(windows: Adaptive) -> list[int]:
    """Positions in each window along an axis."""
    return [windows.window(Interval(i, i + 1)).size for i in range(windows.count)]


def _sums(x: Tensor, dim: int, windows: Adaptive, positions: Interval) -> Tensor:
    """Sums over each window along ``dim`` of ``x``, which covers ``positions``; zero where it has none."""
    met = windows.readers(positions)
    if not _is_kept(windows):
        parts = (part for _, part in _met(windows, positions))
        x = torch.stack([x.narrow(dim, part.start, part.size).sum(dim) for part in parts], dim)
    pads = (met.start, windows.count - met.stop)
    return pad(x, pads if dim == -1 else (0, 0, *pads))


def _met(windows: Adaptive, positions: Interval) -> list[tuple[int, Interval]]:
    """The windows that overlap ``positions``, each with the overlap, counted from the first position."""
    met = windows.readers(positions)
    held = (windows.window(Interval(i, i + 1)).intersect(positions) for i in range(met.start, met.stop))
    return [(index, part.shift(-positions.start)) for index, part in enumerate(held, met.start)]


def _is_kept(windows: Adaptive) -> bool:
    """Whether every window is one position."""
    return windows.count == windows.size


def _spread(gradient: Tensor, dim: int, windows: Adaptive, positions: Interval) -> Tensor:
    """The sum, at each of ``positions`` along ``dim``, of the gradients of its windows."""
    if _is_kept(windows):
        return gradient.narrow(dim, positions.start, positions.size)
    spread = gradient.new_zeros(_with_extent(gradient.shape, dim, positions.size))
    for index, part in _met(windows, positions):
        spread.narrow(dim, part.start, part.size).add_(gradient.narrow(dim, index, 1))
    return spread


def _with_extent(shape: Sequence[int], dim: int, extent: int) -> tuple[int, ...]:
    dim %= len(shape)
    return (*shape[:dim], extent, *shape[dim + 1 :])


def _smallest(values: Tensor) -> Tensor:
    """The smallest of integers along the first axis; on a CPU ``amin`` takes a hundred times as long."""
    while len(values) > 1:
        half = (len(values) + 1) // 2
        values = torch.minimum(values[:half], values[-half:])
    return values[0]


@dataclass(frozen=True, slots=True)
class WindowMaxima(Selection):
    """The largest value of each window, and its index in the whole map in row order.

    Among equal values the gradient goes to the first, as in ATen's pooling.
    """

    windows: Windows

    def workspace(self, numel: int, itemsize: int) -> int:
        # A window may cover most of the tile: a byte for each value, whether it is the largest.
        return numel * (1 + 2 * itemsize)

    @property
    def needs_values(self) -> bool:
        return False

    def partial(self, x: Tensor, region: Region) -> Partials:
        rows, cols = (_met(*axis) for axis in zip(self.windows, region, strict=True))
        values, row, col = largest_in(x, [part for _, part in rows], [part for _, part in cols])
        met = self._met(region)
        shape = (*x.shape[:-2], *(windows.count for windows in self.windows))
        best = torch.full(shape, -math.inf, dtype=torch.float64, device=x.device)
        places = torch.full(shape, self.nowhere, device=x.device)
        best[met] = values.double()
        places[met] = (row + region.rows.start) * self.windows[1].size + col + region.cols.start
        return (best, places)

    def _met(self, region: Region) -> tuple[Any, ...]:
        """The index that selects the windows a tile overlaps."""
        each = (axis.readers(positions) for axis, positions in zip(self.windows, region, strict=True))
        return (..., *(slice(met.start, met.stop) for met in each))

    def merge(self, parts: Sequence[Partials]) -> Partials:
        bests, places = stacked(parts)
        best = bests.amax(0)
        holds = (bests == best) | bests.isnan()
        return (best, _smallest(torch.where(holds, places, self.nowhere)))

    def gradient(self, x: Tensor, region: Region, terms: Sequence[Tensor]) -> Tensor:
        places, gradient = (term[self._met(region)] for term in terms)
        (height, width), extent = region.size, self.windows[1].size
        row, col = places // extent - region.rows.start, places % extent - region.cols.start
        is_here = (row >= 0) & (row < height) & (col >= 0) & (col < width)
        at = torch.where(is_here, row * width + col, 0).flatten(-2)
        found = gradient.new_zeros((*gradient.shape[:-2], height * width))
        found.scatter_add_(-1, at, torch.where(is_here, gradient, 0).flatten(-2))
        return found.view(*gradient.shape[:-2], height, width)
