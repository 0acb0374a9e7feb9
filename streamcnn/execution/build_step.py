"""Build steps from the plan; see :mod:`streamcnn.execution.step`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from streamcnn.execution.step import Input, Operand, Operator, Output, OwnPart, Sink, Source, Step
from streamcnn.geometry.axis_maps import AxisMap, Sliding
from streamcnn.geometry.regions import Interval, Region
from streamcnn.graph.costs import casts_of, cost_of
from streamcnn.graph.ops.reduction_types import Reduction
from streamcnn.graph.program import Node, Program, fed_reductions, has_gradient
from streamcnn.plan.plan import Phase, TileKind
from streamcnn.plan.tiles import AxisKind


@dataclass(frozen=True, slots=True)
class Arrivals:
    """The gradients that a phase has received when its backward pass begins, which are all it will get."""

    maps: frozenset[str] = frozenset()
    """Stored maps with a gradient."""
    num_terms: Mapping[str, int] = field(default_factory=dict, hash=False)
    """For each reduction whose results have a gradient, the number of its terms."""


def forward_step(program: Program, phase: Phase, kind: TileKind) -> Step:
    """The step that computes tiles of a kind without autograd."""
    tile = _Tile.of(program, phase, kind)
    owned = tile.owned(fed_reductions(program, phase.reductions), phase.stored, Arrivals())
    operators = tile.operators(skipped=())
    return Step(
        level=phase.level,
        direction="forward",
        kind=kind,
        operators=operators,
        owned=owned,
        inputs=_read(phase, operators, owned.values()),
        outputs=tuple(output for name, part in owned.items() for output in _outputs_of(name, part)),
        releases=_with_inputs(phase, operators),
        consumed=phase.consumed,
        casts=casts_of(program, phase.nodes),
        parts={},
    )


def backward_step(
    program: Program, phase: Phase, kind: TileKind, differentiated: Collection[str], arrivals: Arrivals
) -> Step:
    """The step that computes tiles of a kind again, with autograd, and differentiates them.

    Parameters
    ----------
    differentiated
        The nodes whose gradient is wanted or passed on.
    """
    tile = _Tile.of(program, phase, kind)
    owned = tile.owned(fed_reductions(program, arrivals.num_terms), arrivals.maps, arrivals)
    operators = tile.operators(skipped=phase.skipped)
    inputs = _read(phase, operators)
    parts = _parts(phase, operators, owned)
    leaves = (
        *(Output(Sink.VALUE_GRADIENT, slot.name) for slot in inputs if slot.source is Source.VALUE),
        *(
            Output(Sink.MAP_GRADIENT, n, operand.part)
            for n, operands in parts.items()
            for operand in operands
        ),
    )
    return Step(
        level=phase.level,
        direction="backward",
        kind=kind,
        operators=operators,
        owned=owned,
        inputs=(*inputs, *(slot for name, part in owned.items() for slot in _arriving(name, part))),
        outputs=tuple(
            leaf
            for leaf in leaves
            if leaf.name in differentiated and has_gradient(program.nodes[leaf.name].tensor.dtype)
        ),
        releases=phase.releases,
        consumed=phase.consumed,
        casts=casts_of(program, phase.nodes),
        parts=parts,
    )


@dataclass(frozen=True, slots=True)
class _Tile:
    """A kind of tile, rows and columns together."""

    program: Program
    phase: Phase
    rows: AxisKind
    cols: AxisKind

    @classmethod
    def of(cls, program: Program, phase: Phase, kind: TileKind) -> _Tile:
        """The kind with these indices along rows and columns."""
        return cls(program, phase, phase.row_kinds[kind[0]], phase.col_kinds[kind[1]])

    def covered(self, name: str) -> Region:
        """The region that the tile has of a map, counted from its first position."""
        return Region.whole((self.rows.extents[name], self.cols.extents[name]))

    def operators(self, *, skipped: Collection[str]) -> tuple[Operator, ...]:
        """The phase's operators on the tile."""
        return tuple(self._operator(self.program.nodes[name], name in skipped) for name in self.phase.nodes)

    def _operator(self, node: Node, is_skipped: bool) -> Operator:
        rows, cols = self.rows.operators[node.name], self.cols.operators[node.name]
        operands = {
            name: Operand(
                axes=self.program.nodes[name].map_axes,
                covered=self.covered(name),
                part=Region(rows.operands[name].part, cols.operands[name].part),
                window=Region(rows.operands[name].window, cols.operands[name].window),
            )
            for name in rows.operands
        }
        padding = _padding(node, operands)
        if padding is not None:
            operands = {name: _padded_by_target(each, padding) for name, each in operands.items()}
        target = node.in_place if node.name in self.phase.in_place else node.target
        assert target is not None
        return Operator(
            node=node,
            target=target,
            operands=operands,
            out=self.covered(node.name),
            result=Region(rows.result, cols.result),
            keywords=self._keywords(node, operands, padding),
            is_skipped=is_skipped,
        )

    def _keywords(
        self, node: Node, operands: Mapping[str, Operand], padding: _Padding | None
    ) -> dict[str, Any]:
        assert node.local is not None
        keywords: dict[str, Any] = {}
        if node.local.positional:
            name, first = next(iter(operands.items()))
            keywords["out"] = self._in_whole(node.name, self.covered(node.name))
            keywords["origin"] = self._in_whole(name, first.part)
        if padding is not None:
            keywords["padding"] = (padding[0] or 0, padding[1] or 0)
        return keywords

    def _in_whole(self, name: str, part: Region) -> Region:
        """Convert a part of the tile's region to positions of the whole map."""
        rows, cols = self.rows.starts[name], self.cols.starts[name]
        return Region(part.rows.shift(rows), part.cols.shift(cols))

    def owned(
        self, fed: Mapping[str, Mapping[str, Reduction]], others: Collection[str], arrivals: Arrivals
    ) -> dict[str, OwnPart]:
        """The tile's own parts of maps that feed reductions and of ``others``, in order of computation."""
        return {
            name: self._own_part(name, fed.get(name, {}), arrivals)
            for name in (*self.phase.inputs, *self.phase.nodes)
            if name in fed or name in others
        }

    def _own_part(self, name: str, reductions: Mapping[str, Reduction], arrivals: Arrivals) -> OwnPart:
        own = Region(self.rows.own[name], self.cols.own[name])
        is_positional = any(rule.positional for rule in reductions.values())
        return OwnPart(
            axes=self.program.nodes[name].map_axes,
            covered=self.covered(name),
            own=own,
            place=self._in_whole(name, own) if is_positional else own,
            is_stored=name in self.phase.stored,
            reductions=reductions,
            beside={n: self.program.nodes[n].operands[1:] for n in reductions},
            has_gradient=name in arrivals.maps,
            num_terms={n: arrivals.num_terms[n] for n in reductions if n in arrivals.num_terms},
        )


_Padding = tuple[int | None, int | None]
"""Padding along rows and columns; None where the window is padded before the target is called."""


def _padding(node: Node, operands: Mapping[str, Operand]) -> _Padding | None:
    """The padding that a node's target can do itself where a window leaves the map; None if it can do none.

    If only rows are left to pad before the call, the window has full rows: in channels_last it is copied in
    one piece, and parts cropped from its gradient have no gaps.
    """
    assert node.local is not None
    if not cost_of(node.target).pads:
        return None
    ((name, operand),) = operands.items()
    each = zip(node.local.accesses[name], operand.part, operand.window, strict=True)
    rows, cols = (_padding_along(*axis) for axis in each)
    return None if rows is None and cols is None else (rows, cols)


def _padded_by_target(operand: Operand, padding: _Padding) -> Operand:
    """An operand whose window is not padded along the axes that the target pads."""
    axes = zip(padding, operand.part, operand.window, strict=True)
    rows, cols = (window if own is None else part for own, part, window in axes)
    return replace(operand, window=Region(rows, cols))


def _padding_along(access: AxisMap, part: Interval, window: Interval) -> int | None:
    """Positions of the window before ``part``, if padding as many behind it changes nothing; else None."""
    assert isinstance(access, Sliding)
    before, behind = part.start - window.start, window.stop - part.stop
    # Excess padding behind gives no further position as long as it is less than the stride.
    return before if 0 <= before - behind < access.stride and behind >= 0 else None


def _read(phase: Phase, operators: Sequence[Operator], reduced: Iterable[OwnPart] = ()) -> tuple[Input, ...]:
    """The inputs that operators and reductions read: input maps and global values."""
    operands = dict.fromkeys(
        name for each in operators for name in each.node.operands if name not in each.operands
    )
    operands |= dict.fromkeys(name for part in reduced for names in part.beside.values() for name in names)
    return (
        *(Input(Source.MAP, name) for name in phase.inputs),
        *(Input(Source.VALUE, name) for name in operands),
    )


def _outputs_of(name: str, part: OwnPart) -> Iterator[Output]:
    """The outputs of a forward step for a map."""
    if part.is_stored:
        yield Output(Sink.SHARE, name)
    for reduction in part.reductions:
        yield Output(Sink.PARTIAL, reduction)


def _arriving(name: str, part: OwnPart) -> Iterator[Input]:
    """The inputs from which a backward step computes a map's gradient from outside the tile."""
    if part.has_gradient:
        yield Input(Source.GRADIENT, name)
    if part.reads_values:
        yield Input(Source.STORED, name)
    for reduction, num_terms in part.num_terms.items():
        for index in range(num_terms):
            yield Input(Source.TERM, reduction, index)


def _with_inputs(phase: Phase, operators: Sequence[Operator]) -> dict[str, tuple[str, ...]]:
    """For each operator, the values that nothing after it reads, input maps included."""
    last = {name: each.node.name for each in operators for name in each.operands if name in phase.inputs}
    releases = dict(phase.releases)
    for name, reader in last.items():
        releases[reader] = (*releases.get(reader, ()), name)
    return releases


def _parts(
    phase: Phase, operators: Sequence[Operator], owned: Mapping[str, OwnPart]
) -> dict[str, tuple[Operand, ...]]:
    """The different parts of input maps that reductions and operators read, in that order."""
    found: dict[str, dict[Region, Operand]] = {}
    for name, part in owned.items():
        if name in phase.inputs:
            found[name] = {part.own: Operand(part.axes, part.covered, part.own, part.own)}
    for each in operators:
        for name, operand in each.operands.items():
            if name in phase.inputs:
                found.setdefault(name, {}).setdefault(operand.part, operand)
    return {name: tuple(parts.values()) for name, parts in found.items()}
