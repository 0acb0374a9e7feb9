"""The kinds of reductions: global values that need every position of a map.

Each is computed from partial results of disjoint tiles, merged in a fixed order and finished once. Its
gradient at a tile is a local formula of the tile's own values and the finished results. Partial results
are merged in float64 or complex128, whatever the map's dtype, so that the number of tiles does not matter.
As they are small, those of many tiles are merged at once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad  # by itself, since the user may replace it there

from streamcnn.geometry.regions import Region
from streamcnn.geometry.windows import Axes

Partials = tuple[Tensor, ...]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a map's statistics: at least float32, exact for integers, and complex if the map is."""
    if dtype.is_complex:
        return statistics_dtype(dtype.to_real()).to_complex()
    return torch.float32 if dtype.is_floating_point and dtype != torch.float64 else torch.float64


def added(parts: Sequence[Partials]) -> Partials:
    """Merge sums by adding them: one sum of each partial result over all tiles."""
    (sums,) = stacked(parts)
    return (sums.sum(0, dtype=torch.complex128 if sums.is_complex() else torch.float64),)


def stacked(parts: Sequence[Partials]) -> Iterator[Tensor]:
    """For each partial result, a tensor of all tiles' values, with the tiles as first axis."""
    return (torch.stack(each) for each in zip(*parts, strict=True))


@dataclass(frozen=True, slots=True)
class Reduction(ABC):
    """A reduction over ``dims``, in ascending order, which include one or both spatial axes."""

    shape: tuple[int, ...]
    """Shape of the whole map."""
    dims: tuple[int, ...]
    keepdim: bool

    @property
    def count(self) -> int:
        """Number of elements that each result reduces."""
        return math.prod(self.shape[dim] for dim in self.dims)

    @property
    def needs_values(self) -> bool:
        """Whether the gradient formula reads the map's values."""
        return True

    @property
    def positional(self) -> bool:
        """Whether partial results depend on the tile's place in the map."""
        return False

    def workspace(self, numel: int, itemsize: int) -> int:
        """Bytes of workspace for the partial results of ``numel`` elements, or for their gradient."""
        return 2 * numel * max(itemsize, 4)

    def given(self, beside: Sequence[Tensor]) -> Reduction:
        """The reduction with the global values that it reads beside the map; most read none."""
        return self

    @abstractmethod
    def partial(self, x: Tensor, region: Region) -> Partials:
        """Partial results of a tile ``x`` that covers ``region``."""

    @abstractmethod
    def merge(self, parts: Sequence[Partials]) -> Partials:
        """Merge the partial results of disjoint tiles."""

    @abstractmethod
    def finish(self, parts: Partials, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The results for a map of ``dtype``, from merged partial results or those of a single tile."""

    @abstractmethod
    def gradient_terms(
        self, results: Sequence[Tensor], grads: Sequence[Tensor | None], dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """The terms from which the gradient at every tile of a map of ``dtype`` is computed.

        Parameters
        ----------
        results, grads
            The finished results and their gradients, at least one of which is not None.
        """

    @abstractmethod
    def gradient(self, x: Tensor, region: Region, terms: Sequence[Tensor]) -> Tensor:
        """The gradient at a tile, given its terms; broadcasts to ``x``'s shape."""

    def added_gradient(self, total: Tensor, x: Tensor, region: Region, terms: Sequence[Tensor]) -> Tensor:
        """``total``, of the shape of ``x``, plus :meth:`gradient`; ``total`` is not changed."""
        found = self.gradient(x, region, terms)
        # A gradient computed from values is a new tensor; others may be the terms themselves.
        return found.add_(total) if self.needs_values and found.shape == total.shape else total + found

    def _result(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """A finished value in ``dtype``, with or without the reduced axes."""
        kept = [1 if dim in self.dims else extent for dim, extent in enumerate(self.shape)]
        left = [extent for dim, extent in enumerate(self.shape) if dim not in self.dims]
        return value.reshape(kept if self.keepdim else left).to(dtype)

    def _broadcast(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """A result or its gradient, shaped to broadcast against the map."""
        for dim in () if self.keepdim else self.dims:
            value = value.unsqueeze(dim)
        return value.to(dtype)


@dataclass(frozen=True, slots=True)
class Placeable(Reduction):
    """A reduction whose partial results have the result's shape: a tile's can be placed anywhere in it.

    The terms of its gradient have the map's axes, with extent 1 where they are reduced.
    """

    @property
    @abstractmethod
    def neutral(self) -> tuple[float, ...]:
        """The neutral element of merging, for each partial result."""


@dataclass(frozen=True, slots=True)
class Selection(Reduction):
    """Picked values, and their indices in the whole map, in row order of its last two axes.

    A value's gradient goes to its index.
    """

    @property
    def positional(self) -> bool:
        return True

    @property
    def nowhere(self) -> int:
        """The index for no position, larger than all others."""
        return math.prod(self.shape[-2:])

    def finish(self, parts: Partials, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (parts[0].to(dtype), parts[1])

    def gradient_terms(
        self, results: Sequence[Tensor], grads: Sequence[Tensor | None], dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        assert grads[0] is not None
        return results[1], grads[0].to(dtype)

    def gradient(self, x: Tensor, region: Region, terms: Sequence[Tensor]) -> Tensor:
        places, gradient = terms
        index, is_here = self._index(places, region)
        found = gradient.new_zeros((*gradient.shape[:-1], math.prod(region.size)))
        found.scatter_add_(-1, index, torch.where(is_here, gradient, 0))
        return found.reshape(*gradient.shape[:-1], *region.size)

    def _index(self, places: Tensor, region: Region) -> tuple[Tensor, Tensor]:
        """Indices in a tile of those in the whole map, and whether they are in it; 0 for others."""
        row = places // self.shape[-1] - region.rows.start
        col = places % self.shape[-1] - region.cols.start
        is_here = (row >= 0) & (row < region.rows.size) & (col >= 0) & (col < region.cols.size)
        return torch.where(is_here, row * region.cols.size + col, 0), is_here


@dataclass(frozen=True, slots=True)
class Sum(Placeable):
    """The sum divided by ``divisor``: a mean if that is ``count``.

    Multiplying by ``1 / count`` would give less than 1 as the mean of 49 ones.
    """

    divisor: float = 1

    @property
    def neutral(self) -> tuple[float, ...]:
        return (0.0,)

    @property
    def needs_values(self) -> bool:
        return False

    def partial(self, x: Tensor, region: Region) -> Partials:
        return (x.sum(self.dims, dtype=statistics_dtype(x.dtype)),)

    def merge(self, parts: Sequence[Partials]) -> Partials:
        return added(parts)

    def finish(self, parts: Partials, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (self._result(parts[0] / self.divisor, dtype),)

    def gradient_terms(
        self, results: Sequence[Tensor], grads: Sequence[Tensor | None], dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        assert grads[0] is not None
        return (self._broadcast(grads[0] / self.divisor, dtype),)

    def gradient(self, x: Tensor, region: Region, terms: Sequence[Tensor]) -> Tensor:
        return terms[0]


@dataclass(frozen=True, slots=True)
class Extremum(Placeable):
    """The largest or smallest value; equal positions share the gradient equally, as in ATen."""

    sign: int = 1

    @property
    def neutral(self) -> tuple[float, ...]:
        return (-math.inf, 0)

    def partial(self, x: Tensor, region: Region) -> Partials:
        best = (torch.amax if self.sign > 0 else torch.amin)(x, self.dims, keepdim=True)
        ties = (x == best).sum(self.dims)
        # Negate after the cast: integers may have no sign, or no negative.
        return (best.reshape(ties.shape).double() * self.sign, ties)

    def merge(self, parts: Sequence[Partials]) -> Partials:
        bests, ties = stacked(parts)
        best = bests.amax(0)
        return (best, torch.where(bests == best, ties, 0).sum(0))

    def finish(self, parts: Partials, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (self._result(parts[0] * self.sign, dtype), self._result(parts[1], torch.float64))

    def gradient_terms(
        self, results: Sequence[Tensor], grads: Sequence[Tensor | None], dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        assert grads[0] is not None
        best, ties, grad = (self._broadcast(value, dtype) for value in (*results, grads[0]))
        return best, grad / ties

    def gradient(self, x: Tensor, region: Region, terms: Sequence[Tensor]) -> Tensor:
        best, share = terms
        return (x == best) * share

    def workspace(self, numel: int, itemsize: int) -> int:
        # A byte for each value, whether it is the best; these are counted in 64 bits, or used as factors.
        return numel * max(9, 1 + 2 * itemsize)


@dataclass(frozen=True, slots=True)
class VectorNorm(Placeable):
    """The p-norm for finite p >= 1, by sums of powers; for integers the sums are exact, their roots not."""

    power: float = 2.0

    @property
    def neutral(self) -> tuple[float, ...]:
        return (0.0,)

    def partial(self, x: Tensor, region: Region) -> Partials:
        if x.dtype == torch.float64 and self.power == 2:
            return (x.square().sum(self.dims),)
        dtype = torch.complex128 if x.is_complex() else torch.float64
        return (torch.linalg.vector_norm(x, self.power, self.dims, dtype=dtype).pow(self.power),)

    def merge(self, parts: Sequence[Partials]) -> Partials:
        return added(parts)

    def finish(self, parts: Partials, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (self._result(parts[0].pow(1 / self.power), dtype.to_real()),)

    def gradient_terms(
        self, results: Sequence[Tensor], grads: Sequence[Tensor | None], dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        assert grads[0] is not None
        norm = self._broadcast(results[0], dtype)
        # Where the norm is 0 every element is, and ATen takes the zero subgradient.
        return torch.where(norm == 0, 1, norm), self._broadcast(grads[0], dtype)

    def gradient(self, x: Tensor, region: Region, terms: Sequence[Tensor]) -> Tensor:
        safe, grad = terms
        scaled = x / safe if self.power == 2 else x.sgn() * (x.abs() / safe).pow(self.power - 1)
        return scaled * grad


@dataclass(frozen=True, slots=True)
class AlongOneAxis(Reduction):
    """A reduction over one spatial axis, whose results have the extent of the other axis."""

    reduction: Placeable
    """The reduction of the whole map."""
    kept: int
    """The spatial axis that is kept."""
    side: int
    """Index of that axis's interval in a region."""

    @classmethod
    def of(cls, reduction: Placeable, axes: Axes) -> AlongOneAxis:
        """``reduction`` of a map with its spatial axes at ``axes``."""
        side = int(axes[0] in reduction.dims)
        return cls(reduction.shape, reduction.dims, reduction.keepdim, reduction, axes[side], side)

    @property
    def needs_values(self) -> bool:
        return self.reduction.needs_values

    @property
    def positional(self) -> bool:
        return True

    def partial(self, x: Tensor, region: Region) -> Partials:
        parts = self.reduction.partial(x, region)
        positions, extent = region[self.side], self.shape[self.kept]
        place = self.kept - sum(dim < self.kept for dim in self.dims)
        return tuple(
            pad(
                part,
                (*(0, 0) * (part.dim() - 1 - place), positions.start, extent - positions.stop),
                value=neutral,
            )
            for part, neutral in zip(parts, self.reduction.neutral, strict=True)
        )

    def workspace(self, numel: int, itemsize: int) -> int:
        return self.reduction.workspace(numel, itemsize)

    def merge(self, parts: Sequence[Partials]) -> Partials:
        return self.reduction.merge(parts)

    def finish(self, parts: Partials, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return self.reduction.finish(parts, dtype)

    def gradient_terms(
        self, results: Sequence[Tensor], grads: Sequence[Tensor | None], dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        return self.reduction.gradient_terms(results, grads, dtype)

    def gradient(self, x: Tensor, region: Region, terms: Sequence[Tensor]) -> Tensor:
        positions = region[self.side]
        here = [term.narrow(self.kept, positions.start, positions.size) for term in terms]
        return self.reduction.gradient(x, region, here)


@dataclass(frozen=True, slots=True)
class ProductSum(Reduction):
    """The sum over positions of an outer product: the first ``split`` channels of the last axis by the rest.

    With keys and values side by side, this is the matrix of linear attention.
    """

    split: int = 0

    def partial(self, x: Tensor, region: Region) -> Partials:
        x = x.to(statistics_dtype(x.dtype))
        first, second = self._sides(x)
        return (first.transpose(-1, -2) @ second,)

    def merge(self, parts: Sequence[Partials]) -> Partials:
        return added(parts)

    def finish(self, parts: Partials, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (parts[0].to(dtype),)

    def gradient_terms(
        self, results: Sequence[Tensor], grads: Sequence[Tensor | None], dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        assert grads[0] is not None
        return (grads[0].to(dtype),)

    def gradient(self, x: Tensor, region: Region, terms: Sequence[Tensor]) -> Tensor:
        (grad,) = terms
        first, second = self._sides(x)
        found = torch.cat((second @ grad.transpose(-1, -2), first @ grad), -1)
        return found.reshape(x.shape)

    def _sides(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both factors with positions as rows: (..., P, split) and (..., P, rest)."""
        rows = x.flatten(self.dims[0], self.dims[-1])
        return rows[..., : self.split], rows[..., self.split :]
