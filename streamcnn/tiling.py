"""Tiling: the outputs of a stage cut into disjoint tiles, and what each tile needs of every map.

All rules are separable, so rows and columns are worked out apart: a grid of 100 x 100 tiles costs 200
passes over the stage's nodes, not 10,000.
"""

from __future__ import annotations

import math

import torch
from torch._ops import OpOverload

from streamcnn.ops.convolution import convolve, is_convolution
from streamcnn.ops.normalization import normalize
from streamcnn.plan import AxisStep, Phase
from streamcnn.program import Program, Ref
from streamcnn.regions import Interval, split_evenly
from streamcnn.staging import Stage


def grid(program: Program, stage: Stage, tile: tuple[int, int]) -> tuple[int, int]:
    """Number of tiles (rows, columns) so that none spans more than ``tile`` (h, w) input pixels.

    No more than there are positions in the smallest output, since every tile owns a part of each.
    """
    image = program.nodes[program.image].size
    sizes = [program.nodes[name].size for name in stage.owned(program)]
    rows, cols = (
        min(math.ceil(image[axis] / tile[axis]), min(size[axis] for size in sizes)) for axis in (0, 1)
    )
    return (rows, cols)


def cut(
    program: Program, stage: Stage, parts: tuple[int, int], differentiated: frozenset[str] = frozenset()
) -> Phase:
    """The phase of ``stage`` with ``parts`` (rows, columns) of tiles."""
    consumed = frozenset(
        operand for name in stage.nodes for operand in program.nodes[name].operands if operand in stage.nodes
    )
    rows, cols = (_axis_steps(program, stage, axis, parts[axis]) for axis in (0, 1))
    return Phase(
        level=stage.level,
        nodes=stage.nodes,
        inputs=stage.inputs,
        stored=stage.stored,
        reductions=stage.reductions,
        rows=rows,
        cols=cols,
        releases=_releases(program, stage),
        consumed=consumed,
        skipped=tuple(
            name
            for name in stage.stored
            if name not in consumed and is_convolution(program.nodes[name].target)
        ),
        in_place=frozenset(name for name in stage.nodes if _overwrites(program, stage, name, rows, cols)),
        differentiated=any(name in differentiated for name in (*stage.stored, *stage.reductions)),
        halo=(_halo(program, stage, rows, 0), _halo(program, stage, cols, 1)),
    )


def _axis_steps(program: Program, stage: Stage, axis: int, num_parts: int) -> tuple[AxisStep, ...]:
    owned = stage.owned(program)
    shares = {name: split_evenly(program.nodes[name].size[axis], num_parts) for name in owned}
    return tuple(
        _axis_step(program, stage, axis, {name: shares[name][part] for name in owned})
        for part in range(num_parts)
    )


def _axis_step(program: Program, stage: Stage, axis: int, own: dict[str, Interval]) -> AxisStep:
    """Walk backwards from the owned parts; a map with several consumers needs the hull."""
    needed = dict(own)
    for name in reversed(stage.nodes):
        local = program.nodes[name].local
        assert local is not None
        for operand, link in local.links.items():
            axis_map = (link.rows, link.cols)[axis]
            part = axis_map.required(needed[name], program.nodes[operand].size[axis])
            needed[operand] = needed[operand].hull(part) if operand in needed else part
    return AxisStep(own=own, needed=needed)


def _overwrites(
    program: Program, stage: Stage, name: str, rows: tuple[AxisStep, ...], cols: tuple[AxisStep, ...]
) -> bool:
    """Whether an operator may overwrite its first operand, as the user's model does.

    It may if that operand is made in this phase, for this operator alone, on the same region, and no
    store or reduction looks at it.
    """
    node = program.nodes[name]
    if node.in_place is None or not isinstance(node.args[0], Ref):
        return False
    operand = node.args[0].name
    readers = [n for n in stage.nodes if operand in program.nodes[n].operands]
    steps = (*rows, *cols)
    return (
        operand in stage.nodes
        and operand not in stage.owned(program)
        and readers == [name]
        and program.nodes[operand].tensor == node.tensor
        and _is_own_tensor(program.nodes[operand].target)
        and all(step.needed[operand] == step.needed[name] for step in steps)
    )


def _is_own_tensor(target: object) -> bool:
    """Whether a target surely returns new memory: a view would reach its operand's."""
    return target in (convolve, normalize, torch.add) or (
        isinstance(target, OpOverload)
        and all(r.alias_info is None for r in target._schema.returns)
        and torch.Tag.pointwise in target.tags
    )


def _releases(program: Program, stage: Stage) -> dict[str, tuple[str, ...]]:
    last = {name: name for name in stage.nodes}
    for name in stage.nodes:
        for operand in program.nodes[name].operands:
            if operand in last:
                last[operand] = name
    dead: dict[str, list[str]] = {}
    for value, user in last.items():
        dead.setdefault(user, []).append(value)
    return {user: tuple(names) for user, names in dead.items()}


def _halo(program: Program, stage: Stage, steps: tuple[AxisStep, ...], axis: int) -> int:
    widest = 0
    for name in stage.inputs:
        share = math.ceil(program.nodes[name].size[axis] / len(steps))
        widest = max(widest, *(step.needed[name].size - share for step in steps))
    return widest
