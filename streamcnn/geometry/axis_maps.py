"""How one spatial axis of an operator's output depends on the same axis of its input.

Each class answers two questions about a half-open interval of output positions:

``window(out)``
    the interval of input positions it reads, padding included, so it may reach outside the input;
``required_each(out, size)``
    the part of that window inside an input of ``size`` positions, at least one position long.

Where an operator cannot compute ``out`` alone, ``computed_each(out, size)`` is what it computes instead.

Only the window decides what is padding, never whether a tile is "the first one". The rule itself, ``bounds``,
is arithmetic that works for one interval and for arrays of intervals, so that planning can compute all tiles
of an axis at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from streamcnn.geometry.regions import Indices, Interval, Intervals

Index = TypeVar("Index", int, Indices)
Span = TypeVar("Span", Interval, Intervals)


class AxisMap(ABC):
    """How output positions depend on input positions along one axis."""

    __slots__ = ()

    @property
    def pointwise(self) -> bool:
        """Whether no output reads a neighbouring position."""
        return False

    @abstractmethod
    def bounds(self, start: Index, stop: Index) -> tuple[Index, Index]:
        """The first input position that outputs ``[start, stop)`` read, and one past the last."""

    def window(self, out: Span) -> Span:
        """Input positions that ``out`` reads; those outside the input are padding."""
        return type(out)(*self.bounds(out.start, out.stop))

    def required_each(self, out: Intervals, size: int) -> Intervals:
        """The part of the window inside an input of ``size`` positions, at least one position long."""
        first, last = self.bounds(out.start, out.stop)
        start = np.minimum(np.maximum(first, 0), size - 1)
        return Intervals(start, np.maximum(np.minimum(last, size), start + 1))

    def computed_each(self, out: Intervals, size: int) -> Intervals:
        """Outputs, of ``size`` positions, that the operator computes where ``out`` are wanted."""
        return out

    def result(self, at_hand: Span, out: Span) -> Span:
        """Output positions that the operator computes from inputs ``at_hand``, without padding."""
        return out


@dataclass(frozen=True, slots=True)
class Same(AxisMap):
    """Each output position reads the input position of the same index."""

    @property
    def pointwise(self) -> bool:
        return True

    def bounds(self, start: Index, stop: Index) -> tuple[Index, Index]:
        return start, stop

    def required_each(self, out: Intervals, size: int) -> Intervals:
        return out


@dataclass(frozen=True, slots=True)
class Reversed(AxisMap):
    """The positions of an input of ``size`` in reverse order."""

    size: int

    def bounds(self, start: Index, stop: Index) -> tuple[Index, Index]:
        return self.size - stop, self.size - start


@dataclass(frozen=True, slots=True)
class Broadcast(AxisMap):
    """Every output position reads the input's only position."""

    @property
    def pointwise(self) -> bool:
        return True

    def bounds(self, start: Index, stop: Index) -> tuple[Index, Index]:
        return 0 * start, 0 * stop + 1


@dataclass(frozen=True, slots=True)
class All(AxisMap):
    """Every output position reads all positions of an input of ``size``."""

    size: int

    def bounds(self, start: Index, stop: Index) -> tuple[Index, Index]:
        return 0 * start, 0 * stop + self.size


@dataclass(frozen=True, slots=True)
class Line(All):
    """All positions are computed at once from all positions: a cumulative sum, sorting, a recurrent layer."""

    def computed_each(self, out: Intervals, size: int) -> Intervals:
        return Intervals(0 * out.start, 0 * out.stop + size)


@dataclass(frozen=True, slots=True)
class Sliding(AxisMap):
    """A window that slides: convolution, pooling, a strided slice, constant padding."""

    kernel: int = 1
    stride: int = 1
    padding: int = 0
    """Positions of padding before the first input position; negative if the first positions are dropped."""
    dilation: int = 1

    def bounds(self, start: Index, stop: Index) -> tuple[Index, Index]:
        first = start * self.stride - self.padding
        last = (stop - 1) * self.stride - self.padding + self.dilation * (self.kernel - 1)
        return first, last + 1


@dataclass(frozen=True, slots=True)
class Transposed(AxisMap):
    """Transposed convolution: input position i reaches outputs ``i*stride - padding + dilation*k``."""

    kernel: int
    stride: int
    padding: int
    dilation: int

    def bounds(self, start: Index, stop: Index) -> tuple[Index, Index]:
        reach = self.dilation * (self.kernel - 1)
        first = -(-(start + self.padding - reach) // self.stride)
        last = (stop - 1 + self.padding) // self.stride
        # If the kernel leaves gaps, an output may read no input.
        return first, first + _positive(last + 1 - first)

    def result(self, at_hand: Span, out: Span) -> Span:
        first = at_hand.start * self.stride - self.padding
        last = (at_hand.stop - 1) * self.stride - self.padding + self.dilation * (self.kernel - 1)
        return type(at_hand)(first, last + 1)


@dataclass(frozen=True, slots=True)
class Repeated(AxisMap):
    """Each input position is the source of ``factor`` outputs: pixel shuffle, whole-number upsampling.

    ``reach`` neighbours on either side are read too (1 for linear interpolation).
    """

    factor: int
    reach: int = 0

    def bounds(self, start: Index, stop: Index) -> tuple[Index, Index]:
        first = start // self.factor - self.reach
        last = (stop - 1) // self.factor + self.reach
        return first, last + 1

    def result(self, at_hand: Span, out: Span) -> Span:
        return type(at_hand)(at_hand.start * self.factor, at_hand.stop * self.factor)


@dataclass(frozen=True, slots=True)
class Adaptive(AxisMap):
    """Adaptive pooling: ``count`` windows over ``size`` positions, as even as possible.

    Window i is ``[floor(i * size / count), ceil((i + 1) * size / count))``. If ``size`` is not a multiple of
    ``count``, neighbouring windows may share a position; if it is smaller, windows repeat positions.
    """

    size: int
    count: int

    def bounds(self, start: Index, stop: Index) -> tuple[Index, Index]:
        return start * self.size // self.count, -(-stop * self.size // self.count)

    def readers(self, positions: Interval) -> Interval:
        """The windows that hold any of ``positions``: the rule is its own inverse."""
        return Adaptive(self.count, self.size).window(positions)


@dataclass(frozen=True, slots=True)
class Gathered(AxisMap):
    """Each output reads given source positions: any resampling, reflecting or replicating padding."""

    first: tuple[int, ...]
    """Smallest source position per output position."""
    last: tuple[int, ...]
    """Largest source position per output position."""

    def bounds(self, start: Index, stop: Index) -> tuple[Index, Index]:
        if isinstance(start, int):
            return min(self.first[start:stop]), max(self.last[start:stop]) + 1
        each = [self.bounds(a, b) for a, b in zip(start.tolist(), stop.tolist(), strict=True)]
        first, last = np.array(each, np.int64).reshape(-1, 2).T
        return first, last


def _positive(value: Index) -> Index:
    """``value`` where it is positive, else 0."""
    return value * (value > 0)


def reflected(index: int, size: int) -> int:
    """Source of position ``index`` under reflecting padding, the edge not repeated."""
    period = max(2 * (size - 1), 1)
    folded = index % period
    return min(folded, period - folded) if size > 1 else 0
