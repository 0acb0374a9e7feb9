"""Run one phase's operators on one tile.

Nothing here is global and nothing is decided: which operators run on which regions is read from the
plan. The same code runs forward (without autograd) and backward (with it); what differs is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from streamcnn.geometry.regions import Region
from streamcnn.geometry.windows import crop, padded, placed, with_extents
from streamcnn.graph.autocast import as_recorded
from streamcnn.graph.costs import cost_of
from streamcnn.graph.program import Access, Axes, Local, Node, Program, substitute
from streamcnn.plan.plan import Phase

Fetch = Callable[[str, Region], Tensor]
"""Reads a region of one of the phase's input maps."""
Observe = Callable[[str, Tensor], Tensor]
"""Sees each operator's value on the tile and returns what its consumers shall read."""


@dataclass(frozen=True, slots=True)
class TileRun:
    """One tile of one phase."""

    program: Program
    phase: Phase
    row: int
    col: int
    skipped: frozenset[str] = frozenset()
    """Operators whose value is stored and read by no operator of the phase."""

    def run(self, fetch: Fetch, global_values: Mapping[str, Any], observe: Observe) -> None:
        """Evaluate the phase's operators in order, dropping each value after its last use."""
        values: dict[str, Tensor] = {}
        for name in self.phase.nodes:
            value = self.evaluate(self.program.nodes[name], values, fetch, global_values)
            values[name] = observe(name, value)
            del value
            for dead in self.phase.releases.get(name, ()):
                del values[dead]

    def evaluate(
        self, node: Node, values: Mapping[str, Tensor], fetch: Fetch, global_values: Mapping[str, Any]
    ) -> Tensor:
        """The value of one operator of the phase where the tile needs it."""
        local = node.local
        assert local is not None
        assert node.axes is not None
        out = self.phase.needed(self.row, self.col, node.name)
        at_hand: dict[str, Region] = {}

        def value_of(name: str) -> Any:
            access = local.accesses.get(name)
            if access is None:
                return global_values[name]
            operand, at_hand[name] = self._operand(name, access, out, values, fetch)
            if local.fill is None:
                return operand
            return padded(operand, self._axes(name), at_hand[name], self._window(access, out), local.fill)

        args = substitute(node.args, value_of)
        kwargs = substitute(dict(node.kwargs), value_of)
        if local.positional:
            kwargs.update(out=out, origin=next(iter(at_hand.values())))
        result = _result_region(local, at_hand, out)
        if node.name in self.skipped:
            shape = with_extents(node.tensor.shape, node.axes, result.size)
            stand_in = cost_of(node.target).stand_in
            assert stand_in is not None
            value = stand_in(shape, node.tensor.dtype, args)
        else:
            target = node.in_place if node.name in self.phase.in_place else node.target
            assert target is not None
            with as_recorded(grad=node.grad, casts=node.casts):
                value = target(*args, **kwargs)
        return value if result == out else placed(value, node.axes, result, out)

    def _operand(
        self, name: str, access: Access, out: Region, values: Mapping[str, Tensor], fetch: Fetch
    ) -> tuple[Tensor, Region]:
        size = self.program.nodes[name].size
        part = Region(access.rows.required(out.rows, size[0]), access.cols.required(out.cols, size[1]))
        if name not in values:
            return fetch(name, part), part
        return crop(values[name], self._axes(name), self.phase.needed(self.row, self.col, name), part), part

    def _window(self, access: Access, out: Region) -> Region:
        return Region(access.rows.window(out.rows), access.cols.window(out.cols))

    def _axes(self, name: str) -> Axes:
        axes = self.program.nodes[name].axes
        assert axes is not None
        return axes


def _result_region(local: Local, at_hand: Mapping[str, Region], out: Region) -> Region:
    """What the target yields for the operands at hand: more than asked for where blocks do not align."""
    if local.fill is not None or local.positional:
        return out
    name, part = next(iter(at_hand.items()))
    access = local.accesses[name]
    return Region(access.rows.result(part.rows, out.rows), access.cols.result(part.cols, out.cols))
