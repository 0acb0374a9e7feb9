"""Operators that treat every position alike: activations, arithmetic, casts, per-pixel normalisation."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from streamcnn.geometry.axis_maps import Broadcast, Same
from streamcnn.graph.costs import (
    FACTORS,
    NOTHING,
    RESULT,
    CallBytes,
    Cost,
    Operation,
    Routine,
    Saves,
    declare,
    elements,
)
from streamcnn.graph.in_place import revalued
from streamcnn.graph.ops.rules import Call, NotStreamable, Sample, Tracer, rule
from streamcnn.graph.program import Access, Axes, Ref, refs_in, substitute
from streamcnn.graph.scattering import imag_replaced, real_replaced

aten = torch.ops.aten

# Pointwise by definition, but without ATen's own tag because they are composed of others, or because
# PyTorch 2.11 forgot it (leaky_relu).
_UNTAGGED = (
    aten._to_copy.default,
    aten.alias.default,
    aten.alias_copy.default,
    aten.complex.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_copy.default,
    aten.expand_as.default,
    aten.hardswish.default,
    aten.imag.default,
    aten.leaky_relu.default,
    aten.lift.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
    aten.log_sigmoid.default,
    aten.masked_fill.Tensor,
    aten.polar.default,
    aten.real.default,
    aten.resolve_conj.default,
    aten.resolve_neg.default,
    aten.rsub.Tensor,
    aten.special_expit.default,
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.other,
    aten.true_divide.Scalar,
    aten.type_as.default,
    aten.where.Scalar,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
)

# Other names and spellings of pointwise operators, which lack the tag too.
_ALIASES = (
    *("__and__", "__or__", "absolute", "arccos", "arccosh", "arcsin", "arcsinh", "arctan", "arctan2"),
    *("arctanh", "divide", "fix", "greater", "greater_equal", "isclose", "isreal", "less", "less_equal"),
    *("multiply", "negative", "not_equal", "special_digamma", "special_erf", "special_erfc"),
    *("special_erfinv", "special_exp2", "special_expm1", "special_gammaln", "special_log1p"),
    *("special_logit", "special_ndtr", "special_sinc", "special_xlogy", "subtract"),
)


def _overloads(name: str) -> list[OpOverload]:
    """The overloads of an operator that return a new tensor."""
    packet = getattr(aten, name)
    return [getattr(packet, overload) for overload in packet.overloads() if "out" not in overload]


@rule(
    *(torch.Tag.pointwise, revalued, real_replaced, imag_replaced),
    *_UNTAGGED,
    *(each for name in _ALIASES for each in _overloads(name)),
)
def pointwise(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """Each result position from the same position of every operand, with broadcasting."""
    like = tracer.fake(call)
    if not isinstance(like, torch.Tensor):
        return NotStreamable("it returns several tensors")
    axes = common_axes(tracer, call, like.dim())
    if axes is None:
        return NotStreamable("its operands have their spatial axes at different places")
    call, accesses = align_operands(tracer, call, like, axes)
    return tracer.local(call.target, call.args, call.kwargs, like=like, axes=axes, accesses=accesses)


def cast(tracer: Tracer, ref: Ref, dtype: torch.dtype) -> Any:
    """A map in another dtype, in which later operators are not rounded before the end."""
    if tracer.spec(ref).dtype == dtype:
        return ref
    return pointwise(tracer, Call(aten.to.dtype, (ref, dtype), {}))


@rule(aten._conj.default, aten.conj.default)
def conjugate(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """The conjugate, computed at once: NumPy, which stores maps, does not take a lazy one."""
    result: Ref | NotStreamable = pointwise(tracer, Call(aten.conj_physical.default, call.args, call.kwargs))
    return result


@rule(aten.view_as_real.default, aten.view_as_complex.default)
def real_pairs(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """Complex numbers as pairs along a last axis, or such pairs as complex numbers."""
    ref = call.args[0]
    axes = tracer.axes(ref)
    assert axes is not None
    like = tracer.fake(call)
    if max(axes) >= like.dim():
        return NotStreamable("its pairs lie along a spatial axis")
    target = as_complex if call.target is aten.view_as_complex.default else call.target
    return tracer.local(target, (ref,), like=like, axes=axes, accesses={ref.name: Access()})


def as_complex(x: torch.Tensor) -> torch.Tensor:
    """Pairs along the last axis of ``x``, of whatever strides, as complex numbers."""
    return torch.view_as_complex(x.contiguous())


def common_axes(tracer: Tracer, call: Call, ndim: int) -> Axes | None:
    """Spatial axes of the broadcast result, or ``None`` if the maps disagree about them."""
    found = set()
    for name in refs_in((call.args, dict(call.kwargs))):
        axes = tracer.axes(Ref(name))
        if axes is not None:
            shift = ndim - len(tracer.spec(Ref(name)).shape)
            found.add((axes[0] + shift, axes[1] + shift))
    return found.pop() if len(found) == 1 else None


def align_operands(
    tracer: Tracer, call: Call, like: torch.Tensor, axes: Axes
) -> tuple[Call, dict[str, Access]]:
    """The call with global values of spatial extent promoted to maps, and the accesses to its maps."""
    renamed: dict[str, Ref] = {}
    accesses: dict[str, Access] = {}
    for name in refs_in((call.args, dict(call.kwargs))):
        operand = Ref(name)
        shape = tracer.spec(operand).shape
        local_axes = (axes[0] - like.dim() + len(shape), axes[1] - like.dim() + len(shape))
        extents = tuple(shape[axis] if axis >= 0 else 1 for axis in local_axes)
        if tracer.axes(operand) is None:
            if extents == (1, 1):
                continue
            if min(local_axes) < 0:
                operand = tracer.global_value(
                    torch.Tensor.reshape, operand, (1,) * (like.dim() - len(shape)) + shape
                )
                local_axes = axes
            renamed[name] = operand = tracer.promote(operand, local_axes)
        rows, cols = (
            Same() if extent == like.shape[axis] else Broadcast()
            for extent, axis in zip(extents, axes, strict=True)
        )
        accesses[operand.name] = Access(rows, cols)
    return rename(call, renamed), accesses


def rename(call: Call, renamed: dict[str, Ref]) -> Call:
    """``call`` reading other nodes in place of those named."""
    if not renamed:
        return call

    def replace(name: str) -> Ref:
        return renamed.get(name, Ref(name))

    return Call(call.target, substitute(call.args, replace), substitute(dict(call.kwargs), replace))


AT_EACH = Access()
"""How a map is read position by position."""


def per_position(
    tracer: Tracer,
    call: Call,
    ref: Ref,
    *,
    dropped: Collection[int] = (),
    access: Access = AT_EACH,
    heavy: bool = False,
) -> Ref:
    """Record a call that mixes other axes than the spatial ones.

    Parameters
    ----------
    ref
        A map; others among the operands have their spatial axes at the same places.
    dropped
        Axes that the result lacks, if it has fewer than ``ref``.
    access
        How maps are read, if not position by position.
    """
    axes = tracer.axes(ref)
    assert axes is not None
    like = tracer.fake(call)
    ndim = len(tracer.spec(ref).shape)
    gone = {dim % ndim for dim in dropped} if like.dim() < ndim else ()
    rows, cols = (axis - sum(dim < axis for dim in gone) for axis in axes)
    maps = [name for name in refs_in((call.args, dict(call.kwargs))) if tracer.axes(Ref(name)) is not None]
    return tracer.local(
        call.target,
        call.args,
        call.kwargs,
        like=like,
        axes=(rows, cols),
        accesses=dict.fromkeys(maps, access),
        heavy=heavy,
    )


@rule(aten.linear.default, begins=True)
def linear(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """A linear layer on the last axis, where that is not a spatial one."""
    ref, weight = call.bind("input", "weight")
    axes = tracer.axes(ref)
    ndim = len(tracer.spec(ref).shape)
    if axes is None or tracer.axes(weight) is not None:
        return NotStreamable("its weight depends on the position")
    if ndim - 1 in axes:
        return NotStreamable("it mixes positions: the layer is applied along a spatial axis")
    return per_position(tracer, call, ref, heavy=True)


def _linear_operations(operation: Operation) -> int:
    """Every result is a sum over the last axis."""
    (weight,) = operation.bind("weight")
    return 2 * operation.numel * int(weight.shape[-1])


declare(aten.linear, cost=Cost(operations=_linear_operations, saves=FACTORS, routine=Routine.MATRIX_PRODUCT))


@rule(aten.prelu.default)
def prelu(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """PReLU, whose slopes belong to axis 1, against the broadcasting rules."""
    ref, slopes = call.bind("self", "weight")
    if tracer.axes(slopes) is not None or 1 in (tracer.axes(ref) or ()):
        return NotStreamable("its slopes depend on the position")
    return per_position(tracer, call, ref)


@rule(aten.rms_norm.default)
def trailing_norm(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """Layer norm over trailing axes that are not spatial (channels last)."""
    ref, shape = call.bind("input", "normalized_shape")
    axes = tracer.axes(ref)
    if axes is None or max(axes) >= len(tracer.spec(ref).shape) - len(shape):
        return NotStreamable("it normalises over space and has an affine part that depends on the position")
    return per_position(tracer, call, ref)


@rule(
    aten.empty_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
)
def from_shape(tracer: Tracer, call: Call) -> Ref:
    """A new tensor with the shape, dtype and device of its operand, which is not gathered for that.

    Random numbers are drawn as plain PyTorch draws them.
    """
    like = tracer.fake(call)
    created: Ref = tracer.global_value(
        _MADE_OF_SHAPES[call.target], tuple(like.shape), dtype=like.dtype, device=torch.device(like.device)
    )
    return created


_MADE_OF_SHAPES: dict[Any, OpOverload] = {
    aten.empty_like.default: aten.zeros.default,
    aten.rand_like.default: aten.rand.default,
    aten.randn_like.default: aten.randn.default,
}


@rule(
    aten.new_empty.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
)
def from_metadata(tracer: Tracer, call: Call) -> Ref:
    """A new tensor with the dtype and device of its operand."""
    like = tracer.fake(call)
    value: Any = call.bind("fill_value")[0] if call.target is aten.new_full.default else 0.0
    if call.target is aten.new_ones.default:
        value = 1.0
    created: Ref = tracer.global_value(
        torch.full, tuple(like.shape), value, dtype=like.dtype, device=torch.device(like.device)
    )
    return created


def _results(count: int) -> Callable[[CallBytes], int]:
    """Bytes of ``count`` values as large as the result."""
    return lambda nbytes: count * nbytes.result


def _summed_up(count: int) -> Callable[[CallBytes], int]:
    """Bytes of gradients of the result's size that are summed to smaller operands; halves in float32.

    Gradients of operands that are not smaller are counted with the operands.
    """

    def nbytes_of(nbytes: CallBytes) -> int:
        return max(0, 2 * nbytes.result - nbytes.operands) * (count + 2 * nbytes.is_half)

    return nbytes_of


# Most derivatives are computed operator by operator.
ELEMENTWISE = Cost(operations=elements, backward_workspace=_results(2), makes_new=True)
_FUSED = replace(ELEMENTWISE, backward_workspace=_results(0))

declare(torch.Tag.pointwise, cost=ELEMENTWISE)
declare(
    *(aten.elu, aten.gelu, aten.hardsigmoid, aten.hardswish, aten.hardtanh, aten.leaky_relu, aten.log),
    *(aten.log_sigmoid, aten.logit, aten.mish, aten.silu, aten.softplus, aten.softshrink, aten.threshold),
    aten.relu6,
    cost=_FUSED,
)
declare(aten.exp, aten.relu, aten.sigmoid, aten.tanh, cost=replace(_FUSED, saves=RESULT))
declare(aten.reciprocal, aten.rsqrt, aten.sqrt, cost=replace(ELEMENTWISE, saves=RESULT))
declare(aten.clone, aten.neg, aten.to, aten._to_copy, cost=replace(_FUSED, saves=NOTHING))


def _added_together(values: list[Tensor], summands: list[Any]) -> list[Tensor]:
    """Each value plus its summand, such as the number of batches that a norm has seen plus one."""
    return list(torch._foreach_add(values, summands))


_SUM = replace(_FUSED, backward_workspace=_summed_up(0), saves=NOTHING)
declare(aten.sub, cost=_SUM)
declare(aten.add, torch.add, cost=replace(_SUM, together=_added_together))
declare(aten.mul, torch.mul, cost=replace(ELEMENTWISE, backward_workspace=_summed_up(1), saves=FACTORS))
declare(aten.prelu, cost=replace(ELEMENTWISE, backward_workspace=_summed_up(1)))
declare(aten.atan2, aten.erf, cost=replace(ELEMENTWISE, backward_workspace=_results(4)))
declare(
    aten.div,
    cost=replace(
        ELEMENTWISE,
        backward_workspace=lambda nbytes: 2 * nbytes.result + _summed_up(1)(nbytes),
        saves=FACTORS,
    ),
)
declare(
    aten.rms_norm,
    # Computed step by step, in float32 for half precision.
    cost=Cost(
        workspace=lambda nbytes: 4 * nbytes.result * nbytes.is_half,
        backward_workspace=lambda nbytes: (9 if nbytes.is_half else 4) * nbytes.result,
    ),
)
# A mask of which operand is taken, a byte for each element.
declare(aten.where, cost=replace(ELEMENTWISE, saves=Saves(beside=elements)))
declare(aten.detach, aten.detach_copy, cost=Cost(saves=NOTHING, detaches=True))
# They read no values. Only randint_like would require a gradient, and Python's binding removes that.
declare(
    *(aten.empty_like, aten.full_like, aten.ones_like, aten.rand_like, aten.randint_like, aten.randn_like),
    *(aten.zeros_like, aten.new_empty, aten.new_full, aten.new_ones, aten.new_zeros),
    cost=Cost(saves=NOTHING, detaches=True),
)


class _LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.norm = nn.LayerNorm(5)
        self.mix = nn.Linear(5, 5)
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, 5))
        self.prelu = nn.PReLU(5)
        self.position = nn.Parameter(torch.linspace(-1, 1, 43 * 37).reshape(1, 1, 43, 37))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.prelu(self.conv(x)) + self.position
        y = self.mix(self.norm(x.permute(0, 2, 3, 1))) * self.gamma
        y = y.permute(0, 3, 1, 2) + torch.softmax(x, dim=1)
        return (x * torch.sigmoid(y)).mean((2, 3))


SAMPLES = (Sample("layer scale, PReLU, per-pixel linear, position", _LayerScale),)
