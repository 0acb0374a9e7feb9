"""Projected time of a plan, to compare candidates for the same program.

Rates are rough and the same for all candidates; only ratios matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from streamcnn.ops.convolution import is_convolution
from streamcnn.plan import AxisStep, Home, Phase, Plan
from streamcnn.program import Node, Program

MACS_PER_SECOND = 5e10
ELEMENTS_PER_SECOND = 1e9
DISK_BYTES_PER_SECOND = 5e8
SECONDS_PER_OPERATOR = 2e-4
"""Overhead of one operator on one tile."""
FRESH_PAGES = 1.4
"""Factor on computing where every tile's memory comes from the kernel anew and is zeroed first."""
DISK_PASSES = 4
"""Times a spilled map and its gradient are moved: written, read with halo, gradient added, gradient read."""


def projected_seconds(program: Program, plan: Plan) -> float:
    """Projected time of one forward pass and, if the plan trains, its backward pass."""
    passes = 3 if plan.training else 1
    computing = sum(_phase_seconds(program, phase) for phase in plan.phases)
    spilled = sum(store.nbytes for store in plan.stores.values() if store.home is Home.DISK)
    slower = 1.0 if plan.reuses_heap else FRESH_PAGES
    return slower * passes * computing + DISK_PASSES * spilled / DISK_BYTES_PER_SECOND


def _phase_seconds(program: Program, phase: Phase) -> float:
    seconds = 0.0
    for name in phase.nodes:
        node = program.nodes[name]
        repeated = _covered(phase.rows, name) * _covered(phase.cols, name) / math.prod(node.size)
        work = _macs(program, node) / MACS_PER_SECOND + node.tensor.numel / ELEMENTS_PER_SECOND
        seconds += work * repeated + phase.num_tiles * SECONDS_PER_OPERATOR
    return seconds


def _covered(steps: Iterable[AxisStep], name: str) -> int:
    """Positions along one axis that all tiles together compute, repeated ones counted each time."""
    return sum(step.needed[name].size for step in steps)


def _macs(program: Program, node: Node) -> int:
    """Multiply-adds of the whole map."""
    if node.local is None or not node.local.heavy:
        return 0
    weights = [program.nodes[n].tensor for n in node.operands if not program.nodes[n].is_map]
    largest = max((spec.numel for spec in weights), default=0)
    if not is_convolution(node.target):
        return node.tensor.numel * 9
    assert node.axes is not None
    return largest * node.tensor.shape[0] * math.prod(node.size)
