"""How one spatial axis of an operator's output depends on the same axis of its input.

Each class answers two questions about a half-open interval of output positions:

``window(out)``
    the interval of input positions it reads, padding included, so it may reach outside the input;
``required(out, size)``
    the part of that window inside an input of ``size`` positions, at least one position long.

The window decides what is padding; whether a tile is "the first one" never does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from streamcnn.regions import Interval


def clip(window: Interval, size: int) -> Interval:
    """The part of ``window`` inside ``[0, size)``, or the nearest single position if there is none."""
    start = min(max(window.start, 0), size - 1)
    stop = max(min(window.stop, size), start + 1)
    return Interval(start, stop)


class AxisMap(ABC):
    """Dependence of output positions on input positions along one axis."""

    __slots__ = ()

    @property
    def pointwise(self) -> bool:
        """Whether neighbouring positions are never read."""
        return False

    @abstractmethod
    def window(self, out: Interval, size: int) -> Interval:
        """Input positions that ``out`` reads, those outside ``[0, size)`` being padding."""

    def required(self, out: Interval, size: int) -> Interval:
        """Positions that must be at hand, inside the input and at least one."""
        return clip(self.window(out, size), size)

    def result(self, at_hand: Interval, out: Interval) -> Interval:
        """Output positions that the operator yields when run on ``at_hand`` without padding."""
        return out


@dataclass(frozen=True, slots=True)
class Same(AxisMap):
    """Each output position reads the input position of the same index."""

    @property
    def pointwise(self) -> bool:
        return True

    def window(self, out: Interval, size: int) -> Interval:
        return out


@dataclass(frozen=True, slots=True)
class Broadcast(AxisMap):
    """Every output position reads the input's only position."""

    @property
    def pointwise(self) -> bool:
        return True

    def window(self, out: Interval, size: int) -> Interval:
        return Interval(0, 1)


@dataclass(frozen=True, slots=True)
class Sliding(AxisMap):
    """A window that slides: convolution, pooling, a strided slice, constant padding."""

    kernel: int = 1
    stride: int = 1
    padding: int = 0
    """Positions of padding before the first; negative where the first positions are dropped."""
    dilation: int = 1

    def window(self, out: Interval, size: int) -> Interval:
        first = out.start * self.stride - self.padding
        last = (out.stop - 1) * self.stride - self.padding + self.dilation * (self.kernel - 1)
        return Interval(first, last + 1)


@dataclass(frozen=True, slots=True)
class Transposed(AxisMap):
    """Transposed convolution: input position i reaches outputs ``i*stride - padding + dilation*k``."""

    kernel: int
    stride: int
    padding: int
    dilation: int

    def window(self, out: Interval, size: int) -> Interval:
        reach = self.dilation * (self.kernel - 1)
        first = -(-(out.start + self.padding - reach) // self.stride)
        last = (out.stop - 1 + self.padding) // self.stride
        return Interval(first, max(last + 1, first))

    def result(self, at_hand: Interval, out: Interval) -> Interval:
        first = at_hand.start * self.stride - self.padding
        last = (at_hand.stop - 1) * self.stride - self.padding + self.dilation * (self.kernel - 1)
        return Interval(first, last + 1)


@dataclass(frozen=True, slots=True)
class Repeated(AxisMap):
    """Each input position is the source of ``factor`` outputs: pixel shuffle, whole-number upsampling.

    ``reach`` neighbours on either side are read too (1 for linear interpolation).
    """

    factor: int
    reach: int = 0

    def window(self, out: Interval, size: int) -> Interval:
        first = out.start // self.factor - self.reach
        last = (out.stop - 1) // self.factor + self.reach
        return Interval(first, last + 1)

    def result(self, at_hand: Interval, out: Interval) -> Interval:
        return Interval(at_hand.start * self.factor, at_hand.stop * self.factor)


@dataclass(frozen=True, slots=True)
class Gathered(AxisMap):
    """Each output reads listed source positions: any resampling, reflecting or repeating padding."""

    first: tuple[int, ...]
    """Smallest source position per output position."""
    last: tuple[int, ...]
    """Largest source position per output position."""

    def window(self, out: Interval, size: int) -> Interval:
        part = slice(out.start, out.stop)
        return Interval(min(self.first[part]), max(self.last[part]) + 1)


def reflected(index: int, size: int) -> int:
    """Source of position ``index`` under reflecting padding, the edge not repeated."""
    period = max(2 * (size - 1), 1)
    folded = index % period
    return min(folded, period - folded) if size > 1 else 0
