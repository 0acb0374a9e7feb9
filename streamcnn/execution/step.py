"""A step: what is computed for the tiles of one kind of a phase, in one direction.

A tile is carried out in three parts. *Gather* reads the step's inputs: regions of maps, global values, the
gradients that have come to the tile. *Compute* turns them into the step's outputs, tensors into tensors.
*Scatter* writes, merges and adds those to what other tiles gave. A step says what compute has to do. It is
built from the plan, the kind of tile, and which gradients have come to the phase. So whatever computes it
knows no store and no plan, and may be made once for all tiles of the kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import torch
from torch import Tensor

from streamcnn.geometry.regions import Region
from streamcnn.geometry.windows import Axes
from streamcnn.graph.ops.reduction_types import Reduction
from streamcnn.graph.program import Node
from streamcnn.plan.plan import TileKind

Direction = Literal["forward", "backward"]


class Source(Enum):
    """Where an input comes from."""

    MAP = "map"
    """What the tile needs of one of the phase's input maps."""
    VALUE = "global value"
    GRADIENT = "gradient"
    """The gradient that has come to a stored map, on the tile's own part."""
    STORED = "stored values"
    """A stored map itself, on the tile's own part."""
    TERM = "term of a gradient"
    """What a reduction's gradient is computed from, the same at every tile."""


class Sink(Enum):
    """Where an output goes."""

    SHARE = "share"
    """The tile's own part of a stored map."""
    PARTIAL = "partial results"
    """Those of a reduction, a tuple of tensors."""
    VALUE_GRADIENT = "gradient of a global value"
    MAP_GRADIENT = "gradient of a part of an input map"


@dataclass(frozen=True, slots=True)
class Input:
    """One tensor that a step takes."""

    source: Source
    name: str
    """The node whose value it is, or that it belongs to."""
    index: int = 0
    """Which term."""


@dataclass(frozen=True, slots=True)
class Output:
    """One output of a step."""

    sink: Sink
    name: str
    part: Region | None = None
    """Of an input map, in positions from the first that the tile needs of it."""


Computed = Tensor | tuple[Tensor, ...] | None
"""An output: partial results are a tuple; ``None`` is a gradient where nothing flows."""
Compute = Callable[[list[Tensor]], Iterable[Computed]]
"""Turns a step's inputs into its outputs, both in the step's order.

It is a function of the inputs: called again with the same ones, it gives the same. It owns the list, and may
empty it so that an input can be freed before the last output is there. It may also yield outputs one by one,
as they are made. It is called in ``no_grad`` mode, with autocast as it was when the pass began.
"""
MakeCompute = Callable[["Step"], Compute]
"""Makes what carries out a step; called once in a pass for each kind of tile that comes up."""


@dataclass(frozen=True, slots=True)
class Operand:
    """How an operator reads one of its map operands; positions count from the tile's first of the operand."""

    axes: Axes
    covered: Region
    """What the tile has of the operand."""
    part: Region
    """What the operator reads of it."""
    window: Region
    """The same with its padding, where the operator does not pad by itself."""


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator on a tile; positions count from the first that the tile needs of its value."""

    node: Node
    target: Callable[..., Any]
    """What is called: the node's own target, or the form of it that overwrites its first operand."""
    operands: Mapping[str, Operand]
    """By name, the map operands; others are global values."""
    out: Region
    """What is needed of the value."""
    result: Region
    """What the target yields of it."""
    positions: Mapping[str, Region]
    """Where in the whole map the tile lies, for targets that compute with it: more keyword arguments."""
    padding: tuple[int, int] | None
    """What the target itself pads on either side, of rows and columns, in addition to the padding of windows;
    None if it is not told to pad."""
    is_skipped: bool
    """Whether it is a convolution whose value is stored already, and read by no operator of the phase."""


@dataclass(frozen=True, slots=True)
class OwnPart:
    """The part of a map that a tile alone is responsible for."""

    axes: Axes
    covered: Region
    """What the tile has of the map; positions count from its first."""
    own: Region
    place: Region
    """The own part for the reductions: in the whole map if one of them computes with positions."""
    is_stored: bool
    reductions: Mapping[str, Reduction]
    """Those that the map feeds; backward, those whose results have a gradient."""
    has_gradient: bool = False
    """Whether a gradient has come to the stored map."""
    num_terms: Mapping[str, int] = field(default_factory=dict)
    """For each of the reductions, the terms of its gradient."""

    @property
    def reads_values(self) -> bool:
        """Whether the gradients of reductions are computed from the stored values."""
        return self.is_stored and any(rule.needs_values for rule in self.reductions.values())


@dataclass(frozen=True, slots=True)
class Step:
    """What is computed for the tiles of one kind, in one direction."""

    level: int
    direction: Direction
    kind: TileKind
    operators: tuple[Operator, ...]
    owned: Mapping[str, OwnPart]
    """Forward all maps of which the tile owns a part; backward those to which a gradient comes."""
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    releases: Mapping[str, tuple[str, ...]]
    """For each operator, the values that nothing after it reads; forward, input maps too."""
    consumed: frozenset[str]
    """Operators whose value another operator of the phase reads."""
    casts: Mapping[str, torch.dtype]
    """Global values that are passed in another type: the one that autocast would cast them to."""
    parts: Mapping[str, tuple[Operand, ...]]
    """Backward, the different parts of each input map that are read: each has a gradient of its own."""
