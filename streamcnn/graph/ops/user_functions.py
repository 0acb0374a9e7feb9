"""The user's own ``autograd.Function`` on maps: streamed where it treats every position alike.

A gradient reversal or a straight-through estimator does, and so does a norm of each pixel's channels; a
gradient that is clipped by its norm does not (:mod:`~streamcnn.graph.ops.function_bodies`). Functions of
which this is not certain run on whole maps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils import _pytree as pytree

from streamcnn.geometry.axis_maps import Broadcast, Same
from streamcnn.graph.costs import Cost, Operation, Saves, declare
from streamcnn.graph.ops.function_bodies import ROLES, PositionsMixed, Value, bytes_saved
from streamcnn.graph.ops.pointwise import common_axes
from streamcnn.graph.ops.rules import Call, NotStreamable, Sample, Tracer, rule
from streamcnn.graph.ops.samples import chain
from streamcnn.graph.program import Access, Axes, Ref, TensorSpec
from streamcnn.graph.whole import GradientHook, OnlyResult, Whole


def _saved_bytes(operation: Operation) -> int:
    """Bytes of what the forward pass saves beside its operands."""
    target = operation.target
    assert isinstance(target, OnlyResult)
    return target.saved_bytes


# The user's own code may print, count or look at values.
declare(Whole, GradientHook, cost=Cost(is_opaque=True))
declare(
    OnlyResult,
    # It computes operator by operator.
    cost=Cost(
        workspace=lambda nbytes: 2 * nbytes.result,
        backward_workspace=lambda nbytes: 4 * nbytes.result,
        saves=Saves(operands=True, beside=_saved_bytes),
    ),
)


@rule(Whole)
def user_function(tracer: Tracer, call: Call) -> Any:
    """A Function with one result that treats every position alike, in both directions."""
    whole = call.target
    assert isinstance(whole, Whole)
    if whole.name != "autograd_function_apply" or len(whole.bodies) != 2:
        return NotStreamable("it is carried out as a whole")
    (like, *others) = pytree.tree_leaves(tracer.fake(call))
    if others:
        return NotStreamable("it has several results")
    axes = common_axes(tracer, call, like.dim())
    if axes is None:
        return NotStreamable("its operands have their spatial axes at different places")
    if not all(isinstance(arg, Ref) for arg in call.args):
        return NotStreamable("it takes other operands than tensors")
    extents = [like.shape[axis] for axis in axes]
    values = [_value(tracer, ref, like, axes) for ref in call.args]
    result = Value.of_map(TensorSpec(tuple(like.shape), like.dtype), axes, extents)
    try:
        saved = bytes_saved(whole.bodies, values, result, like.device)
    except PositionsMixed as error:
        return NotStreamable(f"it does not treat every position alike: {error}")
    except (DataDependentOutputException, DynamicOutputShapeException):
        return NotStreamable("its code reads values")
    refs, accesses = [], {}
    for ref, value in zip(call.args, values, strict=True):
        is_map = tracer.axes(ref) is not None
        if not is_map and any(value.roles):
            ref = tracer.promote(ref, axes)
        if is_map or any(value.roles):
            accesses[ref.name] = _access(value)
        refs.append(ref)
    return (tracer.local(OnlyResult(whole, saved), refs, like=like, axes=axes, accesses=accesses),)


def _value(tracer: Tracer, ref: Ref, like: Tensor, axes: Axes) -> Value:
    """An operand: a map, also of a global value that has the positions of one, or what all tiles share."""
    spec, own = tracer.spec(ref), tracer.axes(ref)
    extents = [like.shape[axis] for axis in axes]
    if own is not None:
        return Value.of_map(spec, own, extents)
    if len(spec.shape) != like.dim() or all(spec.shape[axis] == 1 for axis in axes):
        return Value.alike_everywhere(spec)
    fits = all(spec.shape[axis] in (1, extent) for axis, extent in zip(axes, extents, strict=True))
    return Value.of_map(spec, axes, extents) if fits else Value.alike_everywhere(spec)


def _access(value: Value) -> Access:
    """How tiles read a map: an axis of one position is broadcast."""
    rows, columns = (Same() if role in value.roles else Broadcast() for role in ROLES)
    return Access(rows, columns)


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
