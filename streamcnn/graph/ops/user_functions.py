"""The user's own ``autograd.Function`` on maps: streamed where it treats every position alike.

A gradient reversal or a straight-through estimator does, and so does a norm of each pixel's channels; a
gradient that is clipped by its norm does not (:mod:`~streamcnn.graph.ops.function_bodies`). Functions of
which this is not certain run on whole maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx import GraphModule, Interpreter
from torch.utils import _pytree as pytree

from streamcnn.geometry.axis_maps import Broadcast, Same
from streamcnn.graph.costs import Cost, Operation, Saves, declare
from streamcnn.graph.ops.function_bodies import ROLES, Body, PositionsMixed, Value, empty
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
    values = [_value(tracer, ref, like.dim(), axes, extents) for ref in call.args]
    result = Value.of_map(TensorSpec(tuple(like.shape), like.dtype), axes, extents)
    try:
        saved = _bytes_saved(whole.bodies, values, result, like.device)
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


def _value(tracer: Tracer, ref: Ref, ndim: int, axes: Axes, extents: Sequence[int]) -> Value:
    """An operand: a map, also of a global value that has the positions of one, or what all tiles share."""
    spec, own = tracer.spec(ref), tracer.axes(ref)
    if own is not None:
        return Value.of_map(spec, own, extents)
    if len(spec.shape) != ndim or all(spec.shape[axis] == 1 for axis in axes):
        return Value.alike_everywhere(spec)
    fits = all(spec.shape[axis] in (1, extent) for axis, extent in zip(axes, extents, strict=True))
    return Value.of_map(spec, axes, extents) if fits else Value.alike_everywhere(spec)


def _access(value: Value) -> Access:
    """How tiles read a map: an axis of one position is broadcast."""
    rows, columns = (Same() if role in value.roles else Broadcast() for role in ROLES)
    return Access(rows, columns)


def _bytes_saved(
    bodies: Sequence[GraphModule], operands: Sequence[Value], result: Value, device: torch.device
) -> int:
    """Bytes that the forward pass of a Function saves for whole maps, beside its operands.

    Parameters
    ----------
    bodies
        The forward pass, from the operands to results and saved values, and the backward pass, from the
        gradient and the saved values to the operands' gradients.
    operands, result
        What the Function is given, and what it is to return.
    device
        Where it runs.

    Raises
    ------
    PositionsMixed
        If it is not certain that both passes treat every position alike.
    """
    forward, backward = bodies
    rounded = frozenset(operand.spec.dtype for operand in operands)
    first = Body(forward, operands, rounded, device)
    made, saved = first.results
    (found,) = pytree.tree_leaves(made)
    if found.roles != result.roles:
        raise PositionsMixed("it moves positions")
    if None in saved:
        raise PositionsMixed("it saves what is no tensor")
    arriving = replace(result, is_linear=True)
    second = Body(backward, [arriving, *saved], rounded, device)
    for operand, gradient in zip(operands, second.results, strict=True):
        if gradient is not None:
            _require_gradient(gradient, operand)
    _require_any_size(bodies, operands, first.results, second.results, device)
    return sum(value.spec.nbytes for value in saved if not any(value is operand for operand in operands))


def _require_gradient(gradient: Value, operand: Value) -> None:
    """Raise unless the gradients that tiles give for an operand add up to that of the whole operand."""
    if not gradient.is_linear and not gradient.is_zero:
        raise PositionsMixed("it gives a gradient that does not depend on the one that arrives")
    shift = len(gradient.roles) - len(operand.roles)
    # Autograd sums a gradient over axes along which its operand was broadcast.
    for axis, role in enumerate(() if gradient.is_zero else operand.roles):
        arrived = gradient.roles[axis + shift] if axis + shift >= 0 else None
        if role != arrived and (role is not None or operand.spec.shape[axis] != 1):
            raise PositionsMixed("it gives a gradient for other positions")


def _require_any_size(
    bodies: Sequence[GraphModule],
    operands: Sequence[Value],
    made: Any,
    gradients: Any,
    device: torch.device,
) -> None:
    """Raise unless the bodies return what tiles need for maps of another size, too."""
    try:
        others = [TensorSpec(operand.other_size, operand.spec.dtype) for operand in operands]
        results = Interpreter(bodies[0]).run(*empty(others, device))
        (arriving,) = pytree.tree_leaves(results[0])
        found = Interpreter(bodies[1]).run(torch.empty_like(arriving), *results[1])
    except RuntimeError as error:
        raise PositionsMixed("it names the shape of a map") from error
    expected = pytree.tree_leaves((made, gradients))
    tensors = pytree.tree_leaves((results, found))
    for value, tensor in zip(expected, tensors, strict=True):
        if value is not None and tuple(tensor.shape) != value.other_size:
            raise PositionsMixed("it names the shape of a map")


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
