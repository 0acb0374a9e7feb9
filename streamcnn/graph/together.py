"""Updates of states computed together, in a few operators in place of some for each.

A network with batch norm updates three small buffers for each of its norms. One by one, that is a third of
all operators of a forward pass in which every phase has one tile, and a launch takes a GPU as long as a pass
over a small map.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from streamcnn.graph.costs import cost_of
from streamcnn.graph.program import Kind, Node, Ref, TensorSpec

_LARGEST = 2**16
"""Bytes of a value up to which it is computed along with others, since their operands are held until then."""


@dataclass(frozen=True, slots=True)
class Together:
    """Several calls of one target as one call, which takes a list for each argument."""

    target: Any

    def __call__(self, *columns: list[Any]) -> list[Tensor]:
        together = cost_of(self.target).together
        assert together is not None
        return together(*columns)


def with_updates_together(
    nodes: Mapping[str, Node], updates: Collection[str], outputs: Collection[str]
) -> dict[str, Node]:
    """The nodes, with values that nothing but the end of the pass reads computed together, at the end.

    Parameters
    ----------
    nodes
        In topological order.
    updates
        Nodes that hold new values of states.
    outputs
        Nodes that the model's result refers to.
    """
    read = {name for node in nodes.values() for name in (*node.operands, node.view_of)}.union(outputs)
    alike: dict[Any, list[Node]] = {}
    for name in dict.fromkeys(updates):
        if name not in read and (key := _key(nodes, nodes[name])) is not None:
            alike.setdefault(key, []).append(nodes[name])
    result = dict(nodes)
    for several in alike.values():
        if len(several) > 1:
            for node in several:
                del result[node.name]
            result.update((node.name, node) for node in _together(several))
    return result


def _key(nodes: Mapping[str, Node], node: Node) -> Any:
    """What calls that are computed together have in common; None for a call that is computed alone."""
    is_suited = (
        node.kind is Kind.GLOBAL
        and cost_of(node.target).together is not None
        and not node.kwargs
        and node.nbytes <= _LARGEST
    )
    if not is_suited:
        return None
    kinds = [_kind(nodes[arg.name].spec if isinstance(arg, Ref) else arg, node.tensor) for arg in node.args]
    return None if None in kinds else (node.target, *kinds)


def _kind(argument: Any, result: TensorSpec) -> Any:
    """The type of a number, or the dtype of a tensor like the result; None for anything else."""
    if isinstance(argument, TensorSpec) and argument.shape == result.shape:
        return argument.dtype
    return type(argument) if isinstance(argument, (int, float)) else None


def _together(several: list[Node]) -> Iterator[Node]:
    """One node that computes what several did, and their values, by their names."""
    first = several[0]
    together = Node(
        name=f"{first.name}_together",
        kind=Kind.GLOBAL,
        target=Together(first.target),
        args=tuple(list(column) for column in zip(*(node.args for node in several), strict=True)),
        kwargs={},
        spec=tuple(node.tensor for node in several),
        source=first.source,
        line=first.line,
        grad=False,
    )
    yield together
    for index, node in enumerate(several):
        item = (Ref(together.name), index)
        yield replace(node, target=operator.getitem, args=item, casts=None)
