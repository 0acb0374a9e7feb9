"""A few of a map's positions: those with the largest values (top-k pooling), or those of given indices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad  # by itself, since the user may replace it there

from streamcnn.geometry.regions import Region
from streamcnn.graph.costs import INDEX_BYTES
from streamcnn.graph.ops.reduction_types import Partials, Selection, stacked

MOST = 4096
"""Largest number of values; each tile returns as many."""


@dataclass(frozen=True, slots=True)
class TopPositions(Selection):
    """The ``num_values`` largest values of the last two axes, largest first, with indices in row order.

    Among equal values the first are taken, so that the result does not depend on tiles; ATen takes any.
    """

    num_values: int
    nan_first: bool = True
    """Whether NaN counts as largest; if not, as smallest, for the smallest values of a negated map."""

    @property
    def needs_values(self) -> bool:
        return False

    def workspace(self, numel: int, itemsize: int) -> int:
        # Three copies of 64-bit ranks, and the values.
        return numel * (27 + itemsize)

    def partial(self, x: Tensor, region: Region) -> Partials:
        flat = x.flatten(-2)
        count = min(self.num_values, flat.shape[-1])
        index = _first_largest(flat, count, self.nan_first)
        rows = index // region.cols.size + region.rows.start
        places = rows * self.shape[-1] + index % region.cols.size + region.cols.start
        # Entries that a small tile lacks come after all others.
        missing = (0, self.num_values - count)
        return self._ordered(
            pad(flat.gather(-1, index).double(), missing, value=-math.inf),
            pad(places, missing, value=self.nowhere),
        )

    def merge(self, parts: Sequence[Partials]) -> Partials:
        values, places = (each.movedim(0, -2).flatten(-2) for each in stacked(parts))
        return self._ordered(values, places)

    def _ordered(self, values: Tensor, places: Tensor) -> Partials:
        """The largest values with their indices, largest first, and equal values by index."""
        places, order = places.sort(-1)
        values = ranked = values.gather(-1, order)
        if not self.nan_first:
            # After infinite values, and before placeholders.
            behind = values.isnan().byte() + 2 * (places == self.nowhere).byte()
            order = behind.sort(dim=-1, stable=True).indices
            values, places = values.gather(-1, order), places.gather(-1, order)
            ranked = values.nan_to_num(-math.inf, math.inf, -math.inf)
        order = ranked.sort(dim=-1, descending=True, stable=True).indices[..., : self.num_values]
        return values.gather(-1, order), places.gather(-1, order)


@dataclass(frozen=True, slots=True)
class AtIndices(Selection):
    """The values (..., K) at indices (..., K) of the last two axes in row order, and these indices."""

    count: int
    """K."""
    index: Tensor | None = field(default=None, compare=False)

    @property
    def needs_values(self) -> bool:
        return False

    def workspace(self, numel: int, itemsize: int) -> int:
        # In either direction: rows, columns and indices in 64 bits, and values.
        return numel * itemsize + math.prod(self.shape[:-2]) * self.count * (5 * INDEX_BYTES + 2 * itemsize)

    def given(self, beside: Sequence[Tensor]) -> AtIndices:
        return replace(self, index=beside[0])

    def partial(self, x: Tensor, region: Region) -> Partials:
        assert self.index is not None
        index, is_here = self._index(self.index, region)
        return (torch.where(is_here, x.flatten(-2).gather(-1, index), 0), self.index)

    def merge(self, parts: Sequence[Partials]) -> Partials:
        # One tile has the value of an index, the others 0.
        return (torch.stack([values for values, _ in parts]).sum(0), parts[0][1])


def _first_largest(x: Tensor, count: int, nan_first: bool) -> Tensor:
    """Indices of the ``count`` largest values along the last axis, in any order; the first of equal ones."""
    known = x if nan_first else x.nan_to_num(-math.inf, math.inf, -math.inf)
    least = known.topk(count, -1).values[..., -1:]
    del known
    rank = torch.where(x.isnan(), 3 * nan_first, torch.where(x > least, 2, torch.where(x == least, 1, 0)))
    size = x.shape[-1]
    from_behind = torch.arange(size, 0, -1, device=x.device)
    return rank.mul_(size + 1).add_(from_behind).topk(count, -1).indices
