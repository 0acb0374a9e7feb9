"""Runs of local operators that one pass over a map can carry out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from streamcnn.graph.ops.fused_norms import fused
from streamcnn.graph.ops.rules import Call
from streamcnn.graph.program import Node

_LONGEST = 3
"""Largest number of operators in a run."""


def runs(nodes: Sequence[Node], seen: Collection[str]) -> Iterator[tuple[Node, ...]]:
    """Runs of nodes with a fused form: each is the only reader of the one just before, at the same positions.

    Nodes that do not follow each other are not fused: the first one's operands would be held meanwhile.

    Parameters
    ----------
    nodes
        Local operators in the order of execution.
    seen
        Nodes whose values are also read by something other than operators.
    """
    num_readers = Counter(name for node in nodes for name in node.operands)
    for first, node in enumerate(nodes):
        run = [node]
        for following in nodes[first + 1 : first + _LONGEST]:
            name = run[-1].name
            if name in seen or num_readers[name] > 1 or not _continues(run[-1], following):
                break
            run.append(following)
            if fused([each.name for each in run], [_call(each) for each in run]) is not None:
                yield tuple(run)
                break


def _call(node: Node) -> Call:
    assert node.target is not None
    return Call(node.target, node.args, node.kwargs)


def _continues(first: Node, second: Node) -> bool:
    """Whether ``second`` reads ``first``, and they have the spec, axes and modes in common."""
    assert first.local is not None
    assert second.local is not None
    return (
        first.name in second.operands
        and first.local.pointwise
        and second.local.pointwise
        and first.spec == second.spec
        and (first.axes, first.grad, first.casts) == (second.axes, second.grad, second.casts)
    )
