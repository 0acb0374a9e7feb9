"""A user's ``autograd.Function`` carried out by the bodies in which Dynamo has recorded it.

PyTorch's own operator for that makes a class for each call. Classes are part of reference cycles, so what a
call has saved would stay in memory until Python looks for such cycles: of one tile after the other.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter
from torch.fx import Node as FxNode


class RecordedFunction(torch.autograd.Function):
    """The forward body makes results and saved values of the operands; the backward body their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        bodies: tuple[GraphModule, GraphModule],
        non_differentiable: Sequence[int],
        *operands: Tensor,
    ) -> Any:
        """The results, as the forward body returns them."""
        results, saved = Interpreter(bodies[0]).run(*operands)
        outputs = results if isinstance(results, tuple) else (results,)
        ctx.mark_non_differentiable(*(outputs[index] for index in non_differentiable))
        # An attribute that holds a result would keep it alive, as the result holds what made it.
        is_known = [any(value is other for other in (*operands, *outputs)) for value in saved]
        ctx.save_for_backward(*(value for value, known in zip(saved, is_known, strict=True) if known))
        ctx.others = [None if known else value for value, known in zip(saved, is_known, strict=True)]
        ctx.is_known, ctx.body = is_known, bodies[1]
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Gradients of the operands."""
        known = iter(ctx.saved_tensors)
        saved = [
            next(known) if is_known else value
            for is_known, value in zip(ctx.is_known, ctx.others, strict=True)
        ]
        return None, None, *Interpreter(ctx.body).run(*gradients, *saved)


def num_results_wanted(bodies: tuple[GraphModule, GraphModule], call: FxNode) -> int | None:
    """Of the first how many results the values or the gradients are read; None for all of them.

    Before 2.13, Dynamo returned all intermediate values as further results, which would stay in memory.
    """
    results = _results_of(bodies[0])
    if not isinstance(results, tuple) or any(user.target is not operator.getitem for user in call.users):
        return None
    gradients = _placeholders(bodies[1])[: len(results)]
    asked = [_index(user) + 1 for user in call.users]
    read = [place for place, gradient in enumerate(gradients, 1) if gradient.users]
    count = max([1, *asked, *read])
    return count if count < len(results) else None


def with_first_results(
    bodies: tuple[GraphModule, GraphModule], count: int
) -> tuple[GraphModule, GraphModule]:
    """Bodies that return the first ``count`` results alone, and take gradients of these."""
    forward, backward = bodies
    shorter = Graph()
    results, saved = cast(Any, shorter.graph_copy(forward.graph, {}))
    shorter.output((results[:count], saved))
    unread = _placeholders(backward)[count : len(results)]
    return GraphModule(forward, shorter), _without(backward, unread)


def _results_of(forward: GraphModule) -> Any:
    """The results that a forward body returns, before the values that it saves."""
    results, _ = cast(Any, forward.graph.output_node().args[0])
    return results


def _placeholders(body: GraphModule) -> list[FxNode]:
    return list(body.graph.find_nodes(op="placeholder"))


def _index(getitem: FxNode) -> int:
    return cast(int, getitem.args[1])


def _without(body: GraphModule, unread: Sequence[FxNode]) -> GraphModule:
    """A body that does not take placeholders which it does not read."""
    shorter, copies = Graph(), dict[FxNode, FxNode]()
    for node in body.graph.nodes:
        if node not in unread:
            copies[node] = shorter.node_copy(node, copies.__getitem__)
    return GraphModule(body, shorter)
