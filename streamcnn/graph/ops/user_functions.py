"""The user's own ``autograd.Function`` on maps: streamed where it treats every position alike.

Overlapping tiles each get a part of a position's gradient, and their results are added. So the backward
formula must be pointwise and linear in the gradient: a gradient reversal or a straight-through estimator is,
a clipped gradient is not. Functions of which this is not certain run on whole maps.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx import GraphModule, Interpreter
from torch.fx import Node as FxNode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from streamcnn.graph.costs import Cost, declare
from streamcnn.graph.ops.pointwise import align_operands, common_axes, pointwise
from streamcnn.graph.ops.rules import Call, NotStreamable, Sample, Tracer, rule, rule_for
from streamcnn.graph.ops.samples import chain
from streamcnn.graph.program import Ref, refs_in
from streamcnn.graph.schemas import operator_name
from streamcnn.graph.whole import GradientHook, OnlyResult, Whole

aten = torch.ops.aten

_SAME_SHAPE = frozenset({"alias", "clone", "detach", "expand", "view", "_unsafe_view", "_to_copy", "view_as"})
"""Operators that leave every position alone if they keep the shape."""
_ADDING = frozenset({"add", "sub", "neg"})


# The user's own code may print, count or look at values.
declare(Whole, GradientHook, cost=Cost(is_opaque=True))
# It computes operator by operator.
declare(OnlyResult, cost=Cost(workspace=lambda nbytes: 2 * nbytes.result))


@rule(Whole)
def user_function(tracer: Tracer, call: Call) -> Any:
    """A Function with one result whose passes are pointwise, the backward pass linear in the gradient."""
    whole = call.target
    assert isinstance(whole, Whole)
    if whole.name != "autograd_function_apply" or len(whole.bodies) != 2:
        return NotStreamable("it is carried out as a whole")
    (like, *others) = pytree.tree_leaves(tracer.fake(call))
    reason = "it has several results" if others else _why_not_local(tracer, call, whole, like)
    axes = None if reason else common_axes(tracer, call, like.dim())
    if axes is None:
        return NotStreamable(reason or "its operands have their spatial axes at different places")
    aligned, accesses = align_operands(tracer, Call(OnlyResult(whole), call.args, call.kwargs), like, axes)
    return (tracer.local(aligned.target, aligned.args, like=like, axes=axes, accesses=accesses),)


def _why_not_local(tracer: Tracer, call: Call, whole: Whole, like: Tensor) -> str | None:
    """The reason why the function cannot run tile by tile; None if it can."""
    forward, backward = whole.bodies
    if any(_names_a_shape(body) for body in whole.bodies):
        return "its code names the shape of a map"
    operands = [tracer.spec(Ref(name)) for name in refs_in(call.args)]
    if len(operands) != len(call.args):
        return "it takes other operands than tensors"
    inputs = [torch.empty(spec.shape, dtype=spec.dtype, device=like.device) for spec in operands]
    try:
        return _why_not_linear(forward, backward, inputs, like)
    except (DataDependentOutputException, DynamicOutputShapeException):
        return "its code reads values"


def _why_not_linear(
    forward: GraphModule, backward: GraphModule, inputs: list[Tensor], like: Tensor
) -> str | None:
    """The reason to doubt that both bodies are pointwise and the second linear in the gradient, if any."""
    traced = _traced(forward, inputs)
    if not _is_pointwise(traced, like.shape):
        return "its forward pass is not pointwise"
    _, saved = Interpreter(forward).run(*inputs)
    traced = _traced(backward, [torch.empty_like(like), *saved])
    own = {each.dtype for each in inputs}
    if not _is_pointwise(traced, like.shape) or not _is_linear(traced, own):
        return "its backward pass is not pointwise and linear in the gradient"
    return None


def _names_a_shape(body: GraphModule) -> bool:
    """Whether a call has an argument of several numbers, which may be a shape."""
    arguments = (each for node in body.graph.nodes for each in (*node.args, *node.kwargs.values()))
    return any(
        isinstance(each, (tuple, list)) and len(each) > 1 and all(isinstance(item, int) for item in each)
        for each in arguments
    )


def _traced(body: GraphModule, inputs: list[Tensor]) -> GraphModule:
    traced: GraphModule = make_fx(Interpreter(body).run)(*inputs)
    return traced


def _is_pointwise(traced: GraphModule, shape: torch.Size) -> bool:
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            return False
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        value = node.meta.get("val")
        keeps = isinstance(value, Tensor) and (value.dim() == 0 or value.shape == shape)
        identity = operator_name(node.target) in _SAME_SHAPE and keeps and node.target is not aten.view.dtype
        if not identity and not (rule_for(node.target) is pointwise and keeps):
            return False
    return True


def _is_linear(traced: GraphModule, own: Collection[torch.dtype]) -> bool:
    """Whether every result is linear in the first input.

    A term that does not depend on it would be added once by each overlapping tile. ``own`` are the types of
    the forward pass's inputs, to which gradients are rounded in any case.
    """
    nodes = list(traced.graph.nodes)
    linear: dict[FxNode, bool] = {nodes[0]: True}
    for node in nodes[1:]:
        reads = [linear.get(each, False) for each in node.all_input_nodes]
        if node.op == "call_function" and any(reads):
            if not _keeps_linear(node, linear, own):
                return False
            linear[node] = True
        elif node.op == "output" and not all(reads):
            return False
    return True


def _keeps_linear(node: FxNode, linear: Mapping[FxNode, bool], own: Collection[torch.dtype]) -> bool:
    name = operator_name(node.target)
    operands = [linear.get(arg, False) if isinstance(arg, FxNode) else None for arg in node.args]
    if name in _SAME_SHAPE:
        before, after = (each.meta["val"].dtype for each in (node.all_input_nodes[0], node))
        return after in own or torch.promote_types(before, after) == after
    if node.target is operator.getitem or name == "neg":
        return True
    if name == "mul":
        return operands.count(True) == 1
    if name == "div":
        rounds = node.kwargs.get("rounding_mode") is not None
        return operands[0] is True and True not in operands[1:] and not rounds
    if name in _ADDING:
        return operands[:2] == [True, True]
    if name == "where":
        return not operands[0] and all(
            each is True or (each is None and arg == 0)
            for each, arg in zip(operands[1:], node.args[1:], strict=True)
        )
    if name == "masked_fill":
        return operands[:2] == [True, False] and bool(node.args[2] == 0)
    return False


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return -ctx.scale * grads[0], None


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.sign(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return grads[0] * (x.abs() <= 1)


class _UserFunctions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        reverse: Callable[..., Tensor] = _Reversed.apply
        sign: Callable[..., Tensor] = _Sign.apply
        mixed: Tensor = sign(x) + reverse(x, 0.7) * torch.cos(x)
        return mixed


SAMPLES = (
    Sample(
        "gradient reversal and straight-through sign",
        lambda: chain(nn.Conv2d(3, 4, 3), _UserFunctions(), nn.Conv2d(4, 3, 3)),
    ),
)
