"""Results that depend on each other: one captured graph as a chain of graphs.

The user of a model that returns features beside its logits may ask for the gradient of the logits with
respect to the features. To autograd, a streamed pass is one node, whose results do not depend on each other.
So the calls after a result that others depend on form a pass of their own, with that result as an input.
Other values from before that they need become inputs in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from streamcnn.capture.capture import RawGraph, RawNode, moved, spatial_axes
from streamcnn.graph.costs import draws
from streamcnn.graph.flattening import UPDATING
from streamcnn.graph.program import Ref, reached

VALUE = "value "
"""How the keys of values begin that an earlier part hands over."""


BEFORE = "before "
"""How the keys of states begin that are read as they were before the pass."""


@dataclass(frozen=True, slots=True)
class Part:
    """The calls of a graph that one pass carries out."""

    nodes: tuple[RawNode, ...]
    taken: tuple[str, ...]
    """Names of the values of earlier parts that this part reads."""
    given: tuple[str, ...]
    """Names of the values that this part returns: results of the model, and inputs of later parts."""

    def graph(self, whole: RawGraph, taken: Mapping[str, Tensor]) -> RawGraph:
        """The part as a graph with the tensors ``taken`` as inputs."""
        axes = {name: spatial_axes(tuple(value.shape), whole.image_shape) for name, value in taken.items()}
        inside = {node.name for node in self.nodes}
        # An earlier part may have changed a state; this part reads the value from before the pass.
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
    """The parts of a graph in order; empty if no result depends on another."""
    depths = _depths(graph)
    if len(set(depths.values())) < 2:
        return ()
    nodes = {node.name: node for node in graph.nodes}
    where: dict[str, int] = {}
    _place_draws(graph, nodes, where)
    for depth in range(max(depths.values()) + 1):
        for name in reached(nodes, [name for name, found in depths.items() if found == depth]):
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
    """For each result, the length of the longest chain of other results that it depends on."""
    results = {each.name for each in graph.outputs if isinstance(each, Ref)}
    depths: dict[str, int] = {}
    behind: dict[str, int] = {}
    """For each call, the depth that its readers have."""
    for node in graph.nodes:
        depth = max((behind.get(operand, 0) for operand in node.operands), default=0)
        if node.name in results:
            depths[node.name] = depth
            depth += 1
        behind[node.name] = depth
    return depths


def _place_draws(graph: RawGraph, nodes: Mapping[str, RawNode], where: dict[str, int]) -> None:
    """Put draws that do not depend on the image into the first part, in their order."""
    for node in graph.nodes:
        if draws(node.target):
            needed = list(reached(nodes, [node.name]))
            if len(needed) == 1 or all(graph.image not in nodes[name].operands for name in needed):
                where.update(dict.fromkeys(needed, 0))


def _place_updates(graph: RawGraph, nodes: Mapping[str, RawNode], where: dict[str, int]) -> None:
    """Put calls that only change states into the first part that can compute them.

    A batch counter is then updated before the norm that reads it, whichever part that is in.
    """
    changed = set(graph.updates.values())
    for node in graph.nodes:
        if node.name not in where and (node.name in changed or node.target in UPDATING):
            needed = list(reached(nodes, [node.name]))
            depth = max((where[name] for name in needed if name in where), default=0)
            for name in needed:
                where.setdefault(name, depth)


def _keep_together(graph: RawGraph, where: dict[str, int]) -> None:
    """Put items of a call's results, and statistics that a norm updates, into the part of that call."""
    for node in graph.nodes:
        if node.name in where and node.target is moved:
            where[node.name] = where[node.args[1].name]
        if node.name in where and getattr(node.target, "__name__", "") == "getitem":
            source: Any = node.args[0]
            where[node.name] = where[source.name]
