"""How many different sizes of convolutions and matrix products there are, by which backends take memory."""

from __future__ import annotations

from collections.abc import Iterable

from streamcnn.graph.costs import Routine, cost_of
from streamcnn.graph.program import Program


def num_sizes(program: Program, names: Iterable[str], routine: Routine) -> int:
    """How many of the operators ``names`` that are of one kind differ in their operands' or result's size."""
    nodes = program.nodes
    return len(
        {
            (nodes[name].spec, *(nodes[n].spec for n in nodes[name].operands))
            for name in names
            if cost_of(nodes[name].target).routine is routine
        }
    )
