"""Positions of the largest values in many windows of a map, found along one axis after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from streamcnn.geometry.regions import Interval
from streamcnn.graph.fakes import is_fake
from streamcnn.graph.ops.constants import numbers

_BAND = 2**18
"""Elements that are compared at once, which takes 20 bytes for each besides the results."""


def largest_in(
    x: Tensor, rows: Sequence[Interval], cols: Sequence[Interval]
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest value of each window of ``x`` (..., h, w), and its row and column in ``x``.

    A window is one of ``rows`` by one of ``cols``. Among equal values the first in row order is taken; NaN
    counts as largest. The work grows with the windows' total positions, not with their number.
    """
    # The first column in each row, and then the first row.
    values, col = _largest_along(x.detach(), -1, cols)
    values, row = _largest_along(values, -2, rows)
    row = row.long()
    return values, row, col.gather(-2, row).long()


def _largest_along(x: Tensor, dim: int, windows: Sequence[Interval]) -> tuple[Tensor, Tensor]:
    """The largest value of each window along an axis, the first among equal ones, and its position.

    There may be as many results as values, and the declared workspace has room for two copies of those.
    """
    longest = max(window.size for window in windows)
    kind = torch.int16 if x.shape[dim] < 2**15 else torch.int32
    if longest == 1 and len(windows) == x.shape[dim]:
        # Every position is a window of its own.
        here = torch.arange(len(windows), device=x.device, dtype=kind)
        return x, (here if dim == -1 else here[:, None]).expand(x.shape)
    if len(windows) <= longest:
        found = [x.narrow(dim, window.start, window.size).max(dim) for window in windows]
        at = [(each.indices + w.start).to(kind) for each, w in zip(found, windows, strict=True)]
        return torch.stack([each.values for each in found], dim), torch.stack(at, dim)
    first = numbers([window.start for window in windows], torch.int64, x)
    last = numbers([window.stop - 1 for window in windows], torch.int64, x)
    height, width = (len(windows) if axis == dim else x.shape[axis] for axis in (-2, -1))
    values = x.new_empty((*x.shape[:-2], height, width))
    places = torch.empty_like(values, dtype=kind)
    for start, size in _bands(x, -3 - dim):
        band, best, there = (each.narrow(-3 - dim, start, size) for each in (x, values, places))
        _fill(best, there, band, dim, [torch.minimum(first + offset, last) for offset in range(longest)])
    return values, places


def _bands(x: Tensor, dim: int) -> Iterator[tuple[int, int]]:
    """Start and extent of each part of an axis with about `_BAND` elements."""
    whole = x.shape[dim]
    # A trace gets one part, whose operators are fused or never run.
    step = whole if is_fake(x) or x.is_meta else max(1, _BAND * whole // max(1, x.numel()))
    for start in range(0, whole, step):
        yield start, min(step, whole - start)


def _fill(values: Tensor, places: Tensor, x: Tensor, dim: int, positions: Sequence[Tensor]) -> None:
    """Write the largest values of all windows, and their positions along an axis.

    ``positions`` are the first positions of all windows, the second ones, and so on; shorter windows repeat
    their last position.
    """
    shape = (-1,) if dim == -1 else (-1, 1)
    values.copy_(x.index_select(dim, positions[0]))
    places.copy_(positions[0].view(shape))
    for each in positions[1:]:
        found = x.index_select(dim, each)
        # The first is true where either is NaN; a NaN that was found first stays.
        better = (found <= values).logical_not_().logical_and_(values == values)
        places.copy_(torch.where(better, each.to(places.dtype).view(shape), places))
        torch.maximum(values, found, out=values)
