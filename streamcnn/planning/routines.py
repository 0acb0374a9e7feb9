"""Count convolutions and matrix products of different sizes, since backends take memory for each."""

from __future__ import annotations

from collections.abc import Iterable

from streamcnn.graph.costs import Routine, cost_of
from streamcnn.graph.program import Program


def num_sizes(program: Program, names: Iterable[str], routine: Routine) -> int:
    """The number of different sizes of operands and result among the operators ``names`` of one routine."""
    nodes = program.nodes
    return len(
        {
            (nodes[name].spec, *(nodes[n].spec for n in nodes[name].operands))
            for name in names
            if cost_of(nodes[name].target).routine is routine
        }
    )
