"""Tiles of random programs: every output once, and all that it needs at hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import required, traced
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import programs
from torch import nn

from streamcnn.geometry.regions import Interval, Intervals
from streamcnn.graph.program import Program
from streamcnn.plan.plan import Phase
from streamcnn.plan.tiles import AxisKind, AxisStep
from streamcnn.planning.staging import Stage, divide
from streamcnn.planning.tiling import Outline, grid, tile_stage

some = settings(max_examples=60)
tiles = st.tuples(st.integers(1, 40), st.integers(1, 40))


def phases(program: Program, tile: tuple[int, int]) -> list[tuple[Stage, Phase]]:
    """Every stage and its phase."""
    outlines = [Outline.of(program, stage) for stage in divide(program).stages]
    tiled = [each for outline in outlines for each in tile_stage(outline, grid(outline, tile))]
    return [(each.stage, each.phase(differentiated=False)) for each in tiled]


@some
@given(programs(), tiles)
def test_tiles_cover_every_output_once(program: Program, tile: tuple[int, int]) -> None:
    for stage, phase in phases(program, tile):
        for name in stage.owned(program):
            height, width = program.nodes[name].size
            shares = [
                (row, col)
                for i in range(len(phase.rows))
                for j in range(len(phase.cols))
                for row in positions(phase.own(i, j, name).rows)
                for col in positions(phase.own(i, j, name).cols)
            ]
            assert sorted(shares) == [(row, col) for row in range(height) for col in range(width)]


def positions(interval: Interval) -> range:
    """The integers in an interval."""
    return range(interval.start, interval.stop)


def test_grids_of_very_many_tiles_are_worked_out_when_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Those of an image of 1 x 3,000,000,000 pixels took minutes, and the first was taken.
    program, _ = traced(nn.Conv2d(3, 4, (1, 3)), (1, 3, 1, 3_000_000_000))
    outline = Outline.of(program, *divide(program).stages)
    cut = []

    def evenly(size: int, num_parts: int) -> Intervals:
        cut.append(num_parts)
        return Intervals(*(np.arange(num_parts) + (np.arange(2) * size // num_parts)[:, None]))

    monkeypatch.setattr(Intervals, "evenly", evenly)
    found = tile_stage(outline, (1, 1), (1, 3), (1, 90_000), (1, 90_000_000))
    assert next(found).num_tiles == 1
    assert next(found).num_tiles == 3
    assert max(cut) == 3
    assert next(found).num_tiles == 90_000
    assert max(cut) == 90_000


@some
@given(programs(), tiles)
def test_a_tile_has_all_that_it_needs_and_no_more(program: Program, tile: tuple[int, int]) -> None:
    for stage, phase in phases(program, tile):
        for axis, steps in enumerate((phase.rows, phase.cols)):
            for step in steps:
                assert set(step.needed) == {*stage.nodes, *stage.inputs}
                wanted = _wanted_by(program, stage, step.needed, axis)
                for name in stage.owned(program):
                    wanted[name].append(step.own[name])
                for name, needed in step.needed.items():
                    hull = Interval(min(w.start for w in wanted[name]), max(w.stop for w in wanted[name]))
                    assert needed == hull
                    assert Interval(0, program.nodes[name].size[axis]).contains(needed)


def _wanted_by(
    program: Program, stage: Stage, needed: dict[str, Interval], axis: int
) -> dict[str, list[Interval]]:
    """For each map, what every operator that reads it requires of it."""
    wanted: dict[str, list[Interval]] = {name: [] for name in needed}
    for reader in stage.nodes:
        for name, access in program.nodes[reader].local.accesses.items():
            axis_map = (access.rows, access.cols)[axis]
            wanted[name].append(required(axis_map, needed[reader], program.nodes[name].size[axis]))
    return wanted


@some
@given(programs(), tiles)
def test_no_tile_is_larger_than_asked_for(program: Program, tile: tuple[int, int]) -> None:
    image = program.nodes[program.image].size
    for stage in divide(program).stages:
        smallest = [min(program.nodes[n].size[axis] for n in stage.owned(program)) for axis in (0, 1)]
        for extent, edge, most, parts in zip(
            image, tile, smallest, grid(Outline.of(program, stage), tile), strict=True
        ):
            assert parts == most or (parts * edge >= extent and (parts - 1) * edge < extent)
            assert 1 <= parts <= most


@some
@given(programs(), tiles)
def test_values_are_released_after_their_last_reader(program: Program, tile: tuple[int, int]) -> None:
    for stage, phase in phases(program, tile):
        alive: set[str] = set()
        for name in stage.nodes:
            read = {n for n in program.nodes[name].operands if n in stage.nodes}
            assert read <= alive
            assert read <= phase.consumed
            alive.add(name)
            alive -= set(phase.releases.get(name, ()))
        assert not alive


@some
@given(programs(), tiles)
def test_the_halo_is_what_a_tile_needs_beyond_its_share(program: Program, tile: tuple[int, int]) -> None:
    for stage, phase in phases(program, tile):
        for axis, steps in enumerate((phase.rows, phase.cols)):
            for name in stage.inputs:
                share = -(-program.nodes[name].size[axis] // len(steps))
                assert all(step.needed[name].size <= share + phase.halo[axis] for step in steps)


@some
@given(programs(), tiles)
def test_a_kind_says_all_that_is_computed_for_a_tile(program: Program, tile: tuple[int, int]) -> None:
    for stage, phase in phases(program, tile):
        axes = ((phase.rows, phase.row_kinds), (phase.cols, phase.col_kinds))
        for axis, (steps, kinds) in enumerate(axes):
            computed = [_computed(program, stage, step, axis) for step in steps]
            told = [_told(program, kinds[step.kind]) for step in steps]
            assert computed == told
            # Tiles that are computed alike are of a kind.
            assert len(kinds) == len({repr(each) for each in computed})


Sizes = tuple[dict[str, int], dict[str, tuple[int, int]], dict[str, Any], dict[str, int]]


def _computed(program: Program, stage: Stage, step: AxisStep, axis: int) -> Sizes:
    """Extents, own parts and operators of a tile as the rules say, counted from its own first positions."""
    operators: dict[str, Any] = {}
    starts = {}
    for name in stage.nodes:
        local, out = program.nodes[name].local, step.needed[name]
        result, operands = out, {}
        for operand, access in local.accesses.items():
            axis_map, first = (access.rows, access.cols)[axis], step.needed[operand].start
            part = required(axis_map, out, program.nodes[operand].size[axis])
            window = part if local.fill is None else axis_map.window(out)
            if not operands and local.fill is None and not local.positional:
                result = axis_map.result(part, out)
            operands[operand] = (part.shift(-first), window.shift(-first))
            if local.positional:
                starts |= {name: out.start} | ({operand: first} if len(operands) == 1 else {})
        operators[name] = (operands, result.shift(-out.start))
    own = {name: part.shift(-step.needed[name].start) for name, part in step.own.items()}
    return {name: part.size for name, part in step.needed.items()}, own, operators, starts


def _told(program: Program, kind: AxisKind) -> Sizes:
    """The same as a kind of tile says it."""
    operators = {
        name: ({n: (each.part, each.window) for n, each in operator.operands.items()}, operator.result)
        for name, operator in kind.operators.items()
    }
    return dict(kind.extents), dict(kind.own), operators, dict(kind.starts)
