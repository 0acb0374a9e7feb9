"""Kinds of tiles along one axis: which tiles of a stage are computed alike, and how.

Tiles are of one kind if they need equally many positions of every map, pad equally much before and after, and
read the same parts of what they have. A tile's position in the whole map matters only if something computes
with positions. All tiles of an axis are computed at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from streamcnn.geometry.regions import Indices, Intervals
from streamcnn.graph.program import Access, Node, Program
from streamcnn.plan.tiles import AxisKind, AxisOperand, AxisOperator
from streamcnn.planning.staging import Stage


def numbered(table: Indices) -> list[int]:
    """Number tiles, the columns of ``table``, from 0 as they appear; equal columns share a number."""
    found: dict[bytes, int] = {}
    columns, length = table.T.tobytes(), len(table) * table.itemsize
    return [
        found.setdefault(columns[tile * length : (tile + 1) * length], len(found))
        for tile in range(table.shape[1])
    ]


def axis_kinds(
    program: Program, stage: Stage, axis: int, own: Mapping[str, Intervals], needed: Mapping[str, Intervals]
) -> tuple[list[int], tuple[AxisKind, ...]]:
    """The kind of each tile, as an index into the second result, and the kinds.

    Parameters
    ----------
    axis
        0 for rows, 1 for columns.
    own, needed
        The part of every output that each tile is responsible for, and of every node and input that it needs.
    """
    geometry = _Geometry.of(program, stage, axis, own, needed)
    numbers = numbered(np.stack(list(geometry.arrays())))
    first: dict[int, int] = {}
    for tile, number in enumerate(numbers):
        first.setdefault(number, tile)
    return numbers, tuple(map(geometry.kind, first.values()))


@dataclass(slots=True)
class _Geometry:
    """The content of :class:`AxisKind` for all tiles of an axis at once."""

    extents: dict[str, Indices]
    own: dict[str, Intervals]
    starts: dict[str, Indices]
    parts: dict[str, dict[str, Intervals]] = field(default_factory=dict)
    """By operator and map operand."""
    windows: dict[str, dict[str, Intervals]] = field(default_factory=dict)
    results: dict[str, Intervals] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        program: Program,
        stage: Stage,
        axis: int,
        own: Mapping[str, Intervals],
        needed: Mapping[str, Intervals],
    ) -> _Geometry:
        """The geometry of all tiles."""
        found = cls(
            extents={name: part.sizes for name, part in needed.items()},
            own={name: part.shift(-needed[name].start) for name, part in own.items()},
            starts={name: needed[name].start for name in _positional(program, stage)},
        )
        for name in stage.nodes:
            found._add(program, program.nodes[name], axis, needed)
        return found

    def _add(self, program: Program, node: Node, axis: int, needed: Mapping[str, Intervals]) -> None:
        assert node.local is not None
        out = result = needed[node.name]
        self.parts[node.name], self.windows[node.name] = {}, {}
        for index, (name, access) in enumerate(_map_operands(node)):
            part = access[axis].required_each(out, program.nodes[name].size[axis])
            window = part if node.local.fill is None else access[axis].window(out)
            if index == 0 and node.local.fill is None and not node.local.positional:
                result = access[axis].result(part, out)
            self.parts[node.name][name] = part.shift(-needed[name].start)
            self.windows[node.name][name] = window.shift(-needed[name].start)
        self.results[node.name] = result.shift(-out.start)

    def arrays(self) -> Iterator[Indices]:
        """All numbers that decide a kind, as arrays with one entry per tile."""
        yield from self.extents.values()
        yield from self.starts.values()
        operands = (each for group in (self.parts, self.windows) for each in group.values())
        intervals = [self.own, self.results, *operands]
        for each in (part for group in intervals for part in group.values()):
            yield each.start
            yield each.stop

    def kind(self, tile: int) -> AxisKind:
        """The kind of one tile."""
        return AxisKind(
            extents={name: int(extents[tile]) for name, extents in self.extents.items()},
            own={name: part[tile] for name, part in self.own.items()},
            operators={
                name: AxisOperator(
                    operands={
                        operand: AxisOperand(part[tile], self.windows[name][operand][tile])
                        for operand, part in parts.items()
                    },
                    result=self.results[name][tile],
                )
                for name, parts in self.parts.items()
            },
            starts={name: int(starts[tile]) for name, starts in self.starts.items()},
        )


def _map_operands(node: Node) -> list[tuple[str, Access]]:
    """The map operands of an operator in the order of its arguments."""
    assert node.local is not None
    return [(name, node.local.accesses[name]) for name in node.operands if name in node.local.accesses]


def _positional(program: Program, stage: Stage) -> set[str]:
    """Maps whose positions an operator or reduction uses in its computation: its result or first operand."""
    found = set()
    for name in stage.nodes:
        node = program.nodes[name]
        assert node.local is not None
        if node.local.positional:
            found |= {name, _map_operands(node)[0][0]}
    for name in stage.reductions:
        rule = program.nodes[name].reduction
        assert rule is not None
        if rule.positional:
            found.add(program.nodes[name].operands[0])
    return found
