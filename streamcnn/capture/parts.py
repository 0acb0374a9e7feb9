"""Results that depend on each other: one captured graph as a chain of graphs.

A model that returns its features beside its logits lets the user ask for the gradient of one with respect
to the other. To autograd a streamed pass is one node, and one result of a node is no function of
another. So what comes after a result that others depend on is a pass of its own, which takes that result as
an input; what else it needs of the values before it is handed over in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from streamcnn.capture.capture import RawGraph, RawNode, moved, spatial_axes
from streamcnn.graph.costs import draws
from streamcnn.graph.flattening import UPDATING
from streamcnn.graph.program import Ref

VALUE = "value "
"""How the keys of values begin that an earlier part hands over."""


BEFORE = "before "
"""How the keys of states begin that are read as they were before the pass."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some calls of a graph, which are carried out in one pass."""

    nodes: tuple[RawNode, ...]
    taken: tuple[str, ...]
    """Values of earlier parts that it reads."""
    given: tuple[str, ...]
    """Values that it hands over: results of the model, and what later parts read."""

    def graph(self, whole: RawGraph, taken: Mapping[str, Tensor]) -> RawGraph:
        """The part as a graph that takes the tensors ``taken``."""
        axes = {name: spatial_axes(tuple(value.shape), whole.image_shape) for name, value in taken.items()}
        inside = {node.name for node in self.nodes}
        # A part before may have changed a state by now; what this one reads of it is what it was.
        states = {n: f"{BEFORE}{key}" if key in whole.updates else key for n, key in whole.states.items()}
        return replace(
            whole,
            nodes=self.nodes,
            states={**states, **{name: f"{VALUE}{name}" for name in taken}},
            maps={**whole.maps, **{name: found for name, found in axes.items() if found is not None}},
            outputs=tuple(map(Ref, self.given)),
            updates={key: name for key, name in whole.updates.items() if name in inside},
        )


def parts_of(graph: RawGraph) -> tuple[Part, ...]:
    """The parts of a graph in order; none where no result depends on another."""
    depths = _depths(graph)
    if len(set(depths.values())) < 2:
        return ()
    nodes = {node.name: node for node in graph.nodes}
    where: dict[str, int] = {}
    _place_draws(graph, nodes, where)
    for depth in range(max(depths.values()) + 1):
        for name in _needed(nodes, [name for name, found in depths.items() if found == depth]):
            where.setdefault(name, depth)
    _place_updates(graph, nodes, where)
    _keep_together(graph, where)
    readers: dict[str, set[int]] = {name: set() for name in where}
    for name, depth in where.items():
        for operand in nodes[name].operands:
            if operand in where and where[operand] != depth:
                readers[operand].add(depth)
    image = (graph.image,) if Ref(graph.image) in graph.outputs else ()
    return tuple(
        Part(
            nodes=tuple(node for node in graph.nodes if where.get(node.name) == depth),
            taken=tuple(name for name, found in readers.items() if depth in found),
            given=(
                *(image if depth == 0 else ()),
                *(name for name, at in where.items() if at == depth and (name in depths or readers[name])),
            ),
        )
        for depth in range(max(depths.values()) + 1)
    )


def _depths(graph: RawGraph) -> dict[str, int]:
    """For each result that a call makes, how many others it depends on, one after another."""
    results = {each.name for each in graph.outputs if isinstance(each, Ref)}
    depths: dict[str, int] = {}
    behind: dict[str, int] = {}
    """For each call, the depth of what it hands on."""
    for node in graph.nodes:
        depth = max((behind.get(operand, 0) for operand in node.operands), default=0)
        if node.name in results:
            depths[node.name] = depth
            depth += 1
        behind[node.name] = depth
    return depths


def _needed(nodes: Mapping[str, RawNode], roots: Sequence[str]) -> list[str]:
    found: dict[str, None] = {}
    pending = [name for name in roots if name in nodes]
    while pending:
        name = pending.pop()
        if name not in found:
            found[name] = None
            pending.extend(operand for operand in nodes[name].operands if operand in nodes)
    return list(found)


def _place_draws(graph: RawGraph, nodes: Mapping[str, RawNode], where: dict[str, int]) -> None:
    """Put random numbers that depend on nothing into the first part, in the order of being drawn."""
    for node in graph.nodes:
        if draws(node.target):
            needed = _needed(nodes, [node.name])
            if len(needed) == 1 or all(graph.image not in nodes[name].operands for name in needed):
                where.update(dict.fromkeys(needed, 0))


def _place_updates(graph: RawGraph, nodes: Mapping[str, RawNode], where: dict[str, int]) -> None:
    """Put what only changes states where it can be computed first.

    A counter of batches has then moved before the norm that reads it, in whichever part that is.
    """
    changed = set(graph.updates.values())
    for node in graph.nodes:
        if node.name not in where and (node.name in changed or node.target in UPDATING):
            needed = _needed(nodes, [node.name])
            depth = max((where[name] for name in needed if name in where), default=0)
            for name in needed:
                where.setdefault(name, depth)


def _keep_together(graph: RawGraph, where: dict[str, int]) -> None:
    """Put the items of several results, and statistics that a norm moves, into the part that makes them."""
    for node in graph.nodes:
        if node.name in where and node.target is moved:
            where[node.name] = where[node.args[1].name]
        if node.name in where and getattr(node.target, "__name__", "") == "getitem":
            source: Any = node.args[0]
            where[node.name] = where[source.name]
