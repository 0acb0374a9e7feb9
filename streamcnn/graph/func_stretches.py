"""Stretches of Dynamo's graph whose calls are under a transform of ``torch.func``.

A stretch goes from the start of a transform to its end, and runs as one call, as its wrapped tensors are
valid only inside. There is one exception: the function that ``vjp`` returns, and functions built on it such
as ``jacrev``, ask for gradients of wrapped tensors after the transform has ended. Such a call is a stretch by
itself, which first repeats the stretches that it asks for gradients of.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.fx import GraphModule
from torch.fx import Node as FxNode
from torch.utils import _pytree as pytree

from streamcnn.errors import UnsupportedModel
from streamcnn.graph.registry import is_seeded
from streamcnn.graph.whole import Whole

_GRADIENTS = "_autograd_grad"
"""The name of PyTorch's function by which transforms ask for gradients; it takes outputs, then inputs."""


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """Calls that run as one."""

    own: list[FxNode] = field(default_factory=list)
    repeats: list[Stretch] = field(default_factory=list)
    """Earlier stretches that run again before these calls, in order."""

    @property
    def nodes(self) -> list[FxNode]:
        """All calls, in order."""
        return [*(node for stretch in self.repeats for node in stretch.own), *self.own]


def nesting(node: FxNode) -> int:
    """1 if a call begins a transform, -1 if it ends one, else 0."""
    name = _name_of(node) if node.op == "call_function" else ""
    if name.endswith(("_increment_nesting", "enter_dual_level")):
        return 1
    return -1 if name.endswith(("_decrement_nesting", "exit_dual_level")) else 0


def _stretches_of(nodes: Sequence[FxNode]) -> dict[FxNode, Stretch]:
    """The stretch of each call that is in one.

    Raises
    ------
    UnsupportedModel
        If calls that would have to be repeated draw random numbers.
    """
    found: dict[FxNode, Stretch] = {}
    depth = 0
    stretch = Stretch()
    for node in nodes:
        inside = depth > 0
        depth += nesting(node)
        if inside or depth > 0:
            found[node] = stretch
        elif _asks_for_gradients(node):
            found[node] = Stretch()
        elif node.target is operator.getitem and _asks_for_gradients(node.args[0]):
            found[node] = found[node.args[0]]  # type: ignore[index]
        else:
            continue
        found[node].own.append(node)
        for earlier in _repeated(node, found):
            _add(found[node], earlier)
        if inside and depth == 0:
            stretch = Stretch()
    return found


def _leaves_stretch(node: FxNode, stretches: dict[FxNode, Stretch]) -> bool:
    """Whether the result of a call is read outside of the stretches that contain or repeat it."""
    own = stretches[node]

    def has_it(user: FxNode) -> bool:
        other = stretches.get(user)
        return other is own or (other is not None and own in other.repeats)

    return not all(map(has_it, node.users))


def _repeated(node: FxNode, found: dict[FxNode, Stretch]) -> Iterator[Stretch]:
    """The earlier stretches with the tensors that a call asks for gradients of."""
    if _asks_for_gradients(node):
        for each in pytree.tree_leaves(node.args[:2]):
            if isinstance(each, FxNode) and found.get(each, found[node]) is not found[node]:
                yield found[each]


def _add(stretch: Stretch, earlier: Stretch) -> None:
    for each in (*earlier.repeats, earlier):
        if each not in stretch.repeats:
            if any(map(_draws, each.own)):
                raise UnsupportedModel(
                    "the forward pass draws random numbers in a function that vjp, jacrev or hessian of "
                    "torch.func is given: draw them outside, and give them to the function"
                )
            stretch.repeats.append(each)


def _asks_for_gradients(node: Any) -> bool:
    return isinstance(node, FxNode) and node.op == "call_function" and _name_of(node) == _GRADIENTS


def _name_of(node: FxNode) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _draws(node: FxNode) -> bool:
    """Whether a call draws random numbers, by its name in Python."""
    name = _name_of(node)
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    overloads = (getattr(packet, each) for each in packet.overloads()) if packet is not None else ()
    return "dropout" in name or any(map(is_seeded, overloads))


def with_stretches_folded(module: GraphModule) -> GraphModule:
    """``module`` with each stretch of calls replaced by one call."""
    nodes = list(module.graph.nodes)
    if not any(nesting(node) > 0 for node in nodes):
        return module
    graph = torch.fx.Graph()
    copies: dict[FxNode, FxNode] = {}
    stretches = _stretches_of(nodes)
    for node in nodes:
        stretch = stretches.get(node)
        if stretch is None:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        elif node is stretch.own[-1]:
            given = [each for each in stretch.own if _leaves_stretch(each, stretches)]
            _fold(module, stretch.nodes, given, graph, copies)
    return GraphModule(module, graph)


def _fold(
    module: GraphModule,
    stretch: Sequence[FxNode],
    given: Sequence[FxNode],
    graph: torch.fx.Graph,
    copies: dict[FxNode, FxNode],
) -> None:
    """Add one call that runs all of ``stretch`` to ``graph``, and its results."""
    inside = set(stretch)
    taken = dict.fromkeys(n for node in stretch for n in node.all_input_nodes if n not in inside)
    body = torch.fx.Graph()
    inner = {node: body.placeholder(node.name) for node in taken if node.op != "get_attr"}
    for node in taken:
        if node.op == "get_attr":
            inner[node] = body.node_copy(node)
    for node in stretch:
        inner[node] = body.node_copy(node, inner.__getitem__)
    body.output(tuple(inner[node] for node in given))
    operands = tuple(copies[node] for node in taken if node.op != "get_attr")
    whole = Whole("torch.func", _with_tangents(GraphModule(module, body)))
    call = graph.call_function(whole, operands)
    call.meta.update(stretch[0].meta)
    call.meta["example_value"] = tuple(node.meta["example_value"] for node in given)
    for index, node in enumerate(given):
        copies[node] = graph.call_function(operator.getitem, (call, index))
        copies[node].meta.update(node.meta)


def _with_tangents(body: GraphModule) -> Callable[..., Any]:
    """``body`` with forward-mode differentiation enabled, as in the user's code, but not in a pass."""

    def run(*operands: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            return body(*operands)

    return run
