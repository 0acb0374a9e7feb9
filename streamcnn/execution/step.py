"""Steps: the computation for the tiles of one kind of a phase, in one direction.

A tile is carried out in three parts. *Gather* reads the step's inputs: regions of maps, global values, and
gradients that the tile's outputs have received. *Compute* turns these tensors into the step's outputs, which
are tensors too. *Scatter* writes the outputs, or merges or adds them to those of other tiles. A step says
what *compute* has to do. It is built from the plan, the kind of tile, and the gradients that the phase has
received. So the function that computes it knows no store and no plan, and one serves all tiles of the kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from streamcnn.geometry.regions import Region
from streamcnn.geometry.windows import Axes
from streamcnn.graph.ops.reduction_types import Reduction
from streamcnn.graph.program import Node
from streamcnn.plan.plan import TileKind

Direction = Literal["forward", "backward"]


class Source(StrEnum):
    """Where an input comes from."""

    MAP = "map"
    """The part that the tile needs of one of the phase's input maps."""
    VALUE = "global value"
    GRADIENT = "gradient"
    """The gradient that a stored map has received, on the tile's own part."""
    STORED = "stored values"
    """A stored map itself, on the tile's own part."""
    TERM = "term of a gradient"
    """A term from which a reduction's gradient is computed, the same for every tile."""


class Sink(StrEnum):
    """Where an output goes."""

    SHARE = "share"
    """The tile's own part of a stored map."""
    PARTIAL = "partial results"
    """Partial results of a reduction, a tuple of tensors."""
    VALUE_GRADIENT = "gradient of a global value"
    MAP_GRADIENT = "gradient of a part of an input map"


class Input(NamedTuple):
    """One tensor that a step takes."""

    source: Source
    name: str
    """The node whose value it is, or to which it belongs."""
    term: int = 0
    """Index of the term, for `Source.TERM`."""


class Output(NamedTuple):
    """One output of a step."""

    sink: Sink
    name: str
    part: Region | None = None
    """For `Sink.MAP_GRADIENT`: the part of the input map, in positions from the first that the tile needs."""


Computed = Tensor | tuple[Tensor, ...] | None
"""An output: partial results are a tuple; ``None`` stands for a gradient where none flows."""
Compute = Callable[[list[Tensor]], Iterable[Computed]]
"""Turns a step's inputs into its outputs, both in the step's order.

It is a pure function: called again with the same inputs, it gives the same outputs. It owns the list, and may
empty it so that an input can be freed before the last output is made. It may also yield outputs one by one,
as they are made. It is called in ``no_grad`` mode, with autocast as it was when the pass began.
"""
MakeCompute = Callable[["Step"], Compute]
"""Makes the function that computes a step; called once per run of a phase for each kind of tile."""


@dataclass(frozen=True, slots=True)
class Operand:
    """How an operator reads a map operand; positions count from the first that the tile has of it."""

    axes: Axes
    covered: Region
    """The region that the tile has of the operand."""
    part: Region
    """The region that the operator reads."""
    window: Region
    """``part`` with its padding, where the operator does not pad by itself."""


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator on a tile; positions count from the first that the tile needs of its value."""

    node: Node
    target: Callable[..., Any]
    """The function to call: the node's own target, or the form of it that overwrites its first operand."""
    operands: Mapping[str, Operand]
    """Map operands by name; other operands are global values."""
    out: Region
    """The region of the value that is needed."""
    result: Region
    """The region of the value that the target yields."""
    keywords: Mapping[str, Any]
    """Further keyword arguments: for targets that compute with positions, the tile's place in the map;
    ``padding``, the rows and columns that the target itself pads, beyond the padding of windows."""
    is_skipped: bool
    """Whether the operator is a convolution whose value is stored already and which no operator of the phase
    reads."""
    is_placed: bool = field(init=False)
    """Whether the target yields just the region that is needed."""
    is_plain: bool = field(init=False)
    """Whether it is a call with the values themselves, as all but the windowed operators of a band are."""

    def __post_init__(self) -> None:
        node = self.node
        is_placed = self.result == self.out
        reads_whole = all(each.part == each.window == each.covered for each in self.operands.values())
        has_modes = not node.grad or node.casts is not None
        is_plain = node.is_flat and is_placed and reads_whole and not has_modes and not self.is_skipped
        object.__setattr__(self, "is_placed", is_placed)
        object.__setattr__(self, "is_plain", is_plain)


@dataclass(frozen=True, slots=True)
class OwnPart:
    """The part of a map that a tile alone is responsible for."""

    axes: Axes
    covered: Region
    """The region that the tile has of the map; positions count from its first."""
    own: Region
    place: Region
    """``own`` for the reductions: in the whole map if one of them computes with positions."""
    is_stored: bool
    reductions: Mapping[str, Reduction]
    """Reductions that the map feeds; in a backward step, those whose results have a gradient."""
    beside: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The global values that reductions read in a forward step."""
    has_gradient: bool = False
    """Whether the stored map has received a gradient."""
    num_terms: Mapping[str, int] = field(default_factory=dict)
    """For each of the reductions, the number of terms of its gradient."""

    @property
    def reads_values(self) -> bool:
        """Whether the gradients of reductions are computed from the stored values."""
        return self.is_stored and any(rule.needs_values for rule in self.reductions.values())


@dataclass(frozen=True, slots=True)
class Step:
    """The computation for the tiles of one kind, in one direction."""

    level: int
    direction: Direction
    kind: TileKind
    operators: tuple[Operator, ...]
    owned: Mapping[str, OwnPart]
    """In a forward step, maps of which the tile owns a part; in a backward step, those with a gradient."""
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    releases: Mapping[str, tuple[str, ...]]
    """For each operator, the values that nothing after it reads; in a forward step, input maps too."""
    consumed: frozenset[str]
    """Operators whose value another operator of the phase reads."""
    casts: Mapping[str, torch.dtype]
    """Global values that are passed in another type, the one to which autocast would cast them."""
    parts: Mapping[str, tuple[Operand, ...]]
    """In a backward step, the different parts read of each input map, each of which has its own gradient."""
