"""Runs of local operators that one pass over a map can carry out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from streamcnn.graph.ops.fused_norms import fused
from streamcnn.graph.ops.rules import Call
from streamcnn.graph.program import Node

_LONGEST = 3
"""Operators of a run at most."""


def runs(nodes: Sequence[Node], seen: Collection[str]) -> Iterator[tuple[Node, ...]]:
    """Runs of nodes that have a fused form: each alone reads the one before it, at the same positions.

    Between the first and the second there may be a node that makes another operand of the second. The first
    is carried out after it then, which takes no memory: what it reads is as large as what it makes.

    Parameters
    ----------
    nodes
        Local operators in the order of execution.
    seen
        Nodes whose values are wanted by others than operators.
    """
    places = {node.name: place for place, node in enumerate(nodes)}
    num_readers = Counter(name for node in nodes for name in node.operands)
    readers = {name: node for node in nodes for name in node.operands}
    taken: set[str] = set()
    for node in nodes:
        run = [node]
        while len(run) < _LONGEST and run[-1].name not in seen and num_readers[run[-1].name] == 1:
            run.append(readers[run[-1].name])
            if run[-1].name in taken or not _continues(*run[-2:]):
                break
            between = nodes[places[run[-2].name] + 1 : places[run[-1].name]]
            if not _may_wait(run, between):
                break
            if fused([each.name for each in run], [_call(each) for each in run]) is not None:
                taken.update(each.name for each in run)
                yield tuple(run)
                break


def _call(node: Node) -> Call:
    assert node.target is not None
    return Call(node.target, node.args, node.kwargs)


def _continues(first: Node, second: Node) -> bool:
    """Whether two operators are alike in all that a fused one has but once."""
    assert first.local is not None
    assert second.local is not None
    return (
        first.local.pointwise
        and second.local.pointwise
        and first.spec == second.spec
        and (first.axes, first.grad, first.casts) == (second.axes, second.grad, second.casts)
        and first.grad
    )


def _may_wait(run: Sequence[Node], between: Sequence[Node]) -> bool:
    """Whether nothing that runs between the last two of a run changes what is read, or is held meanwhile."""
    *_, before, last = run
    return not between or (
        len(run) == 2
        and len(between) == 1
        and between[0].name in last.operands
        and between[0].local is not None
        and between[0].local.pointwise
        and set(between[0].operands).isdisjoint(before.operands)
    )
