"""Tiling: divide the outputs of a stage into disjoint tiles, and find the part of every map that each needs.

All rules are separable, so rows and columns are computed separately, and all tiles of an axis at once: a grid
of 100 x 100 tiles takes two passes over the stage's nodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from streamcnn.geometry.regions import Indices, Intervals
from streamcnn.graph.costs import Cost, Operation, Routine, casts_of, cost_of, makes_new
from streamcnn.graph.ops.reduction_types import Reduction
from streamcnn.graph.program import Access, Kind, Node, Program, Ref, fed_reductions
from streamcnn.plan.plan import Phase
from streamcnn.plan.tiles import AxisStep
from streamcnn.planning.routines import num_sizes
from streamcnn.planning.staging import Stage
from streamcnn.planning.tile_kinds import axis_kinds, numbered

TileCounts = tuple[int, int]
"""Number of tiles (rows, columns)."""

_PARTS_AT_ONCE = 2**16
"""The most tiles along both axes, of several grids together, that are computed in one go."""


@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """The properties of a stage that do not depend on its tiling."""

    program: Program
    stage: Stage
    owned: tuple[str, ...]
    """Maps of which each tile owns a part."""
    releases: Mapping[str, tuple[str, ...]]
    """For each operator, the values that nothing after it reads."""
    consumed: frozenset[str]
    """Operators whose value another operator of the stage reads."""
    skipped: tuple[str, ...]
    """Operators that the backward pass need not compute again: only their stored value is used."""
    num_convolutions: int
    num_products: int
    """Matrix products of different sizes, linear layers among them."""
    overwriting: Mapping[str, str]
    """Operators, with their first operand, which they may overwrite if a tile needs one region of both."""
    square: bool
    """Whether rows and columns have the same sizes and rules."""
    costs: Mapping[str, Cost]
    """The declared cost of each operator."""
    map_operands: Mapping[str, tuple[str, ...]]
    """For each operator, the maps that it reads."""
    weights: Mapping[str, int]
    """For each operator, bytes of the values that it reads beside maps."""
    parameter_bytes: int
    """Bytes of all operators' parameters and buffers, each counted once."""
    cast_bytes: int
    """Bytes of parameters in the types to which autocast casts them."""
    position_bytes: Mapping[str, int]
    """For each operator and input, bytes of one position of its value, all images and channels together."""
    position_elements: Mapping[str, int]
    """For each operator and input, elements of one position of its value, likewise."""
    beside_bytes: Mapping[str, int]
    """For each operator, bytes per position that autograd saves beside operands and result."""
    fed: Mapping[str, Mapping[str, Reduction]]
    """By map and name: the reductions of the stage that the map feeds."""

    @classmethod
    def of(cls, program: Program, stage: Stage) -> Outline:
        """The outline of a stage."""
        readers = _readers(program, stage)
        owned = stage.owned(program)
        consumed = frozenset(name for name in stage.nodes if readers[name])
        nodes = program.nodes
        read = {name for operator in stage.nodes for name in nodes[operator].operands}
        maps = [nodes[name] for name in (*stage.nodes, *stage.inputs)]
        accesses = {name: _accesses(program, name) for name in stage.nodes}
        costs = {name: cost_of(program.nodes[name].target) for name in stage.nodes}
        return cls(
            program=program,
            stage=stage,
            owned=owned,
            releases=_releases(stage, readers),
            consumed=consumed,
            skipped=tuple(
                name
                for name in stage.stored
                if name in costs and costs[name].stand_in is not None and name not in consumed
            ),
            num_convolutions=sum(cost.routine is Routine.CONVOLUTION for cost in costs.values()),
            num_products=num_sizes(program, stage.nodes, Routine.MATRIX_PRODUCT),
            overwriting={
                name: operand
                for name in stage.nodes
                if (operand := _overwritten(program, name, readers)) is not None and operand not in owned
            },
            square=all(height == width for height, width in (node.size for node in maps))
            and all(access.rows == access.cols for each in accesses.values() for access in each.values()),
            costs=costs,
            map_operands={name: tuple(each) for name, each in accesses.items()},
            weights={
                name: sum(nodes[n].nbytes for n in nodes[name].operands if not nodes[n].is_map)
                for name in stage.nodes
            },
            parameter_bytes=sum(nodes[name].nbytes for name in read if nodes[name].kind is Kind.STATE),
            cast_bytes=sum(
                nodes[name].tensor.numel * dtype.itemsize
                for name, dtype in casts_of(program, stage.nodes).items()
            ),
            position_bytes={node.name: node.nbytes // math.prod(node.size) for node in maps},
            position_elements={node.name: node.tensor.numel // math.prod(node.size) for node in maps},
            beside_bytes={name: _beside_bytes(program, nodes[name], cost) for name, cost in costs.items()},
            fed=fed_reductions(program, stage.reductions),
        )


@dataclass(frozen=True, slots=True, eq=False)
class AxisGrid:
    """The tiles of a stage along one axis."""

    num_parts: int
    own: Mapping[str, Intervals]
    """The part of each output that a tile alone is responsible for."""
    needed: Mapping[str, Intervals]
    """The part of every node and input of the stage that a tile computes or reads."""
    largest: Mapping[str, int]
    """The most positions that a tile needs of a map."""
    total: Mapping[str, int]
    """Positions of a map that all tiles together need, counted for each tile that needs them."""
    shapes: Sequence[int]
    """Each tile's shape, as a number: tiles of one shape need equally many positions of each map."""

    @classmethod
    def each(cls, outline: Outline, axis: int, counts: Sequence[int]) -> Iterator[AxisGrid]:
        """Make a grid for each number of tiles in ``counts``, all computed at once.

        Needed parts are found backwards from the owned parts; of a map with several consumers, the hull is
        needed.
        """
        nodes = outline.program.nodes
        own = {
            name: Intervals.joined([Intervals.evenly(nodes[name].size[axis], count) for count in counts])
            for name in outline.owned
        }
        needed = dict(own)
        for name in reversed(outline.stage.nodes):
            accesses = _accesses(outline.program, name)
            for access in accesses.values():
                needed[name] = access[axis].computed_each(needed[name], nodes[name].size[axis])
            for operand, access in accesses.items():
                part = access[axis].required_each(needed[name], nodes[operand].size[axis])
                needed[operand] = needed[operand].hull(part) if operand in needed else part
        sizes = np.array([intervals.sizes for intervals in needed.values()])
        sizes = sizes.reshape(len(needed), sum(counts))
        bounds: Indices = np.cumsum((0, *counts))
        largest = np.maximum.reduceat(sizes, bounds[:-1], axis=1).T.tolist()
        total = np.add.reduceat(sizes, bounds[:-1], axis=1).T.tolist()
        for index, where in enumerate(map(slice, bounds[:-1].tolist(), bounds[1:].tolist())):
            # Maps that share intervals go on sharing them.
            parts = {intervals: intervals.part(where) for intervals in needed.values()}
            yield cls(
                num_parts=counts[index],
                own={name: own[name].part(where) for name in own},
                needed={name: parts[intervals] for name, intervals in needed.items()},
                largest=dict(zip(needed, largest[index], strict=True)),
                total=dict(zip(needed, total[index], strict=True)),
                shapes=numbered(sizes[:, where]),
            )

    @property
    def num_shapes(self) -> int:
        """The number of different shapes of tiles."""
        return max(self.shapes) + 1

    def steps(self, kinds: Sequence[int]) -> tuple[AxisStep, ...]:
        """One :class:`AxisStep` per tile, given each one's kind."""
        own = {name: tuple(intervals) for name, intervals in self.own.items()}
        needed = {name: tuple(intervals) for name, intervals in self.needed.items()}
        return tuple(
            AxisStep(
                own={name: each[part] for name, each in own.items()},
                needed={name: each[part] for name, each in needed.items()},
                shape=self.shapes[part],
                kind=kinds[part],
            )
            for part in range(self.num_parts)
        )


@dataclass(frozen=True, slots=True, eq=False)
class TiledStage:
    """A stage divided into tiles, which planning compares and a phase is made of."""

    outline: Outline
    rows: AxisGrid
    cols: AxisGrid
    in_place: frozenset[str]
    """Operators that overwrite their first operand, which nothing else reads."""

    @property
    def program(self) -> Program:
        """The stage's program."""
        return self.outline.program

    @property
    def stage(self) -> Stage:
        """The stage that is tiled."""
        return self.outline.stage

    @property
    def num_tiles(self) -> int:
        """Steps per pass over the stage."""
        return self.rows.num_parts * self.cols.num_parts

    @property
    def num_kernels(self) -> int:
        """Number of different convolutions of a forward pass: each counts once for each shape of tile."""
        return self.outline.num_convolutions * self.rows.num_shapes * self.cols.num_shapes

    def largest(self, name: str) -> tuple[int, int]:
        """The most rows and columns that a tile needs of ``name``."""
        return self.rows.largest[name], self.cols.largest[name]

    def largest_nbytes(self, name: str) -> int:
        """Bytes of ``name`` in the largest part that a tile needs of it."""
        return self.outline.position_bytes[name] * math.prod(self.largest(name))

    @property
    def most_elements(self) -> int:
        """Elements of the largest part of a map that a tile needs."""
        each = self.outline.position_elements.items()
        return max(elements * math.prod(self.largest(name)) for name, elements in each)

    def largest_own(self, name: str) -> tuple[int, int]:
        """The most rows and columns of output ``name`` that a tile is responsible for."""
        height, width = self.program.nodes[name].size
        return largest_part(height, self.rows.num_parts), largest_part(width, self.cols.num_parts)

    def covered(self, name: str) -> int:
        """Positions of ``name`` that all tiles together need, counted for each tile that needs them."""
        return self.rows.total[name] * self.cols.total[name]

    def phase(self, *, differentiated: bool) -> Phase:
        """The stage as a phase of the plan."""
        stage, outline = self.stage, self.outline
        (rows, row_kinds), (cols, col_kinds) = (
            axis_kinds(outline.program, stage, axis, grid.own, grid.needed)
            for axis, grid in enumerate((self.rows, self.cols))
        )
        return Phase(
            level=stage.level,
            nodes=stage.nodes,
            inputs=stage.inputs,
            stored=stage.stored,
            reductions=stage.reductions,
            rows=self.rows.steps(rows),
            cols=self.cols.steps(cols),
            row_kinds=row_kinds,
            col_kinds=col_kinds,
            releases=outline.releases,
            consumed=outline.consumed,
            skipped=outline.skipped,
            in_place=self.in_place,
            differentiated=differentiated,
            halo=(self._halo(0), self._halo(1)),
        )

    def _halo(self, axis: int) -> int:
        grid = (self.rows, self.cols)[axis]
        nodes, inputs = self.program.nodes, self.stage.inputs
        beyond = [
            grid.largest[name] - largest_part(nodes[name].size[axis], grid.num_parts) for name in inputs
        ]
        return max((0, *beyond))


def grid(outline: Outline, tile: tuple[int, int]) -> TileCounts:
    """Number of tiles (rows, columns) so that none spans more than ``tile`` (h, w) input pixels.

    There are no more than positions in the smallest output, since every tile owns a part of each output.
    """
    image = outline.program.nodes[outline.program.image].size
    most = most_parts(outline)
    return (min(largest_part(image[0], tile[0]), most[0]), min(largest_part(image[1], tile[1]), most[1]))


def most_parts(outline: Outline) -> TileCounts:
    """Positions in the smallest output: the most rows and columns of tiles."""
    sizes = [outline.program.nodes[name].size for name in outline.owned]
    return min(height for height, _ in sizes), min(width for _, width in sizes)


def tile_stage(outline: Outline, *grids: TileCounts) -> Iterator[TiledStage]:
    """Tile the stage by each of ``grids`` in turn; beyond a number of tiles, only when asked for."""
    together: list[TileCounts] = []
    num_parts = 0
    for parts in grids:
        num_parts += sum(parts)
        if together and num_parts > _PARTS_AT_ONCE:
            yield from _tile_together(outline, together)
            together, num_parts = [], sum(parts)
        together.append(parts)
    yield from _tile_together(outline, together)


def _tile_together(outline: Outline, grids: Sequence[TileCounts]) -> Iterator[TiledStage]:
    axes = [dict.fromkeys(counts) for counts in zip(*grids, strict=True)]
    if outline.square:
        axes = [axes[0] | axes[1]]
    found = [
        dict(zip(counts, AxisGrid.each(outline, axis, tuple(counts)), strict=True))
        for axis, counts in enumerate(axes)
    ]
    for parts in grids:
        rows, cols = found[0][parts[0]], found[-1][parts[1]]
        in_place = frozenset(
            name
            for name, operand in outline.overwriting.items()
            if all(axis.needed[operand].equals(axis.needed[name]) for axis in (rows, cols))
        )
        yield TiledStage(outline, rows, cols, in_place)


def largest_part(extent: int, num_parts: int) -> int:
    """The most positions in one of ``num_parts`` even parts of ``extent``."""
    return -(-extent // num_parts)


def _accesses(program: Program, name: str) -> Mapping[str, Access]:
    local = program.nodes[name].local
    assert local is not None
    return local.accesses


def _beside_bytes(program: Program, node: Node, cost: Cost) -> int:
    """Bytes per position that autograd saves beside operands and result."""
    if cost.saves.beside is None:
        return 0
    return -(-cost.saves.beside(Operation.of(program, node)) // math.prod(node.size))


def _readers(program: Program, stage: Stage) -> dict[str, list[str]]:
    """For each operator of the stage, the operators that read its value, in order."""
    readers: dict[str, list[str]] = {name: [] for name in stage.nodes}
    for name in stage.nodes:
        for operand in program.nodes[name].operands:
            if operand in readers:
                readers[operand].append(name)
    return readers


def _overwritten(program: Program, name: str, readers: Mapping[str, list[str]]) -> str | None:
    """The operand that an operator may overwrite, as the user's model does, or None.

    That is its first operand, if it is made in this phase for this operator alone.
    """
    node = program.nodes[name]
    if node.in_place is None or not isinstance(node.args[0], Ref):
        return None
    operand = node.args[0].name
    alone = readers.get(operand) == [name]
    same = program.nodes[operand].tensor == node.tensor
    return operand if alone and same and makes_new(program.nodes[operand].target) else None


def _releases(stage: Stage, readers: Mapping[str, list[str]]) -> dict[str, tuple[str, ...]]:
    dead: dict[str, list[str]] = {}
    for name in stage.nodes:
        last = readers[name][-1] if readers[name] else name
        dead.setdefault(last, []).append(name)
    return {user: tuple(names) for user, names in dead.items()}
