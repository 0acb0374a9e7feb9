"""Tiles of a phase along one spatial axis: where each lies, and which are computed alike.

The axes are independent of each other: a tile is a pair of :class:`AxisStep`, and its computation is a pair
of :class:`AxisKind`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from streamcnn.geometry.regions import Interval


@dataclass(frozen=True, slots=True)
class AxisStep:
    """One tile's share along one spatial axis."""

    own: Mapping[str, Interval]
    """The part of each output that this tile alone is responsible for."""
    needed: Mapping[str, Interval]
    """The part of every node and input of the phase that this tile computes or reads."""
    shape: int
    """Index of its shape along this axis. Tiles of one shape need equally many positions of each map, so that
    libraries compile their code once for all of them."""
    kind: int
    """Index of its kind along this axis. Tiles of one kind are computed alike."""


@dataclass(frozen=True, slots=True)
class AxisOperand:
    """How an operator reads a map operand; positions count from the first that the tile has of it."""

    part: Interval
    """The positions that it reads."""
    window: Interval
    """``part`` with the padding before and after."""


@dataclass(frozen=True, slots=True)
class AxisOperator:
    """How an operator runs on a tile."""

    operands: Mapping[str, AxisOperand]
    """The map operands by name."""
    result: Interval
    """The interval computed, in positions from the first that the tile needs of the operator's value. Where
    blocks do not align, it is more or less than needed."""


@dataclass(frozen=True, slots=True)
class AxisKind:
    """All that the computation of a tile depends on along one axis."""

    extents: Mapping[str, int]
    """Positions that the tile computes or reads of every node and input of the phase."""
    own: Mapping[str, Interval]
    """The tile's own part of each output, in positions from the first that the tile needs of that output."""
    operators: Mapping[str, AxisOperator]
    starts: Mapping[str, int]
    """The first position, in the whole map, that the tile needs of a map: only where an operator or a
    reduction computes with positions, as dropout does."""
