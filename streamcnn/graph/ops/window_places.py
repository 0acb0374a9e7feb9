"""Where the largest values of many windows of a map lie, found along one axis after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streamcnn.geometry.regions import Interval
from streamcnn.graph.ops.constants import numbers


def largest_in(
    x: Tensor, rows: Sequence[Interval], cols: Sequence[Interval]
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest value of each window of ``x`` (..., h, w), and its row and column in ``x``.

    A window is one of ``rows`` by one of ``cols``. Of several equal values it is the first in row order, and
    NaN is larger than all. Work grows with the positions in all windows, not with their number.
    """
    # In each row the first column, and then the first row.
    values, col = _largest_along(x, -1, cols)
    values, row = _largest_along(values, -2, rows)
    return values, row, col.gather(-2, row)


def _largest_along(x: Tensor, dim: int, windows: Sequence[Interval]) -> tuple[Tensor, Tensor]:
    """The largest value of each window along an axis, the first of equal ones, and its position there."""
    longest = max(window.size for window in windows)
    if longest == 1 and len(windows) == x.shape[dim]:
        # Every position is a window of its own.
        here = torch.arange(len(windows), device=x.device)
        return x, (here if dim == -1 else here[:, None]).expand(x.shape)
    if len(windows) <= longest:
        found = [x.narrow(dim, window.start, window.size).max(dim) for window in windows]
        values = torch.stack([each.values for each in found], dim)
        return values, torch.stack([e.indices + w.start for e, w in zip(found, windows, strict=True)], dim)
    first, last = (
        numbers(ends, torch.int64, x)
        for ends in ([window.start for window in windows], [window.stop - 1 for window in windows])
    )
    beside = (-1,) if dim == -1 else (-1, 1)
    best = x.index_select(dim, first)
    places = first.view(beside).expand(best.shape)
    # All windows at once: shorter ones look at their last position again.
    for offset in range(1, longest):
        at = torch.minimum(first + offset, last)
        values = x.index_select(dim, at)
        # True where either is NaN, and what was found first stays.
        better = (values <= best).logical_not_().logical_and_(best == best)
        places = torch.where(better, at.view(beside), places)
        best = torch.maximum(best, values)
    return best, places
