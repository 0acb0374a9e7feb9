"""Norms fused with the operators after them: an activation, or a sum with another map and a ReLU.

On a GPU such operators spend their time on reading and writing the map. Fused, they read and write it once,
forward and backward: the value before the activation is never written, and is recomputed in the backward
pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streamcnn.graph.ops import channel_kernels
from streamcnn.graph.ops.activations import RELU, Activation, activation_of
from streamcnn.graph.ops.norm_pass import normalize
from streamcnn.graph.ops.rules import Call
from streamcnn.graph.program import Ref, substitute
from streamcnn.graph.schemas import in_place_form, operator_name

aten = torch.ops.aten


def fused(names: Sequence[str], calls: Sequence[Call]) -> Call | None:
    """One call that computes the last value of several calls.

    Parameters
    ----------
    names, calls
        The calls and their values' names. Each call is the only reader of the one before.

    Returns
    -------
    Call or None
        ``None`` if the calls have no fused form.
    """
    norm, *others = calls
    if norm.target is not normalize or not others or norm.kwargs:
        return None
    last = others[-1]
    activation = activation_of(last)
    if activation is None or last.args[:1] != (Ref(names[-2]),):
        return None
    if len(others) == 1:
        return Call(ActivatedNorm(activation, last), norm.args, {})
    # A ReLU's gradient depends on its result alone, whatever was added before.
    summand = _summand(others[0], names[0]) if activation == RELU and len(others) == 2 else None
    if summand is None:
        return None
    return Call(SummedNorm(names[0], others[0]), (*norm.args, summand), {})


def _summand(call: Call, name: str) -> Ref | None:
    """The value that a call adds to ``name``; None if the call is not such a plain sum."""
    if operator_name(call.target).removesuffix("_") != "add" or len(call.args) != 2 or call.kwargs:
        return None
    others = [each for each in call.args if each != Ref(name)]
    return others[0] if len(others) == 1 and isinstance(others[0], Ref) else None


@dataclass(frozen=True, slots=True)
class ActivatedNorm:
    """``activation(normalize(x, ...))``."""

    activation: Activation
    after: Call
    """The call of the activation alone."""

    def __call__(self, x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        if _is_suited(x):
            found: Tensor = _ActivatedNorm.apply(x, mean, scale, shift, self.activation)  # type: ignore[no-untyped-call]
            return found
        value = normalize(x, mean, scale, shift)
        # The caller holds x until this returns. Separate operators would free it after the norm, unless
        # autograd saves it. So the result goes into the norm's memory.
        target = self.after.target if value.requires_grad else in_place_form(self.after.target)
        result: Tensor = target(value, *self.after.args[1:], **self.after.kwargs)
        return result


@dataclass(frozen=True, slots=True)
class SummedNorm:
    """``relu(normalize(x, ...) + summand)``."""

    name: str
    """Name of the norm's value among the arguments of the sum."""
    sum: Call
    """The call of the sum alone."""

    def __call__(self, x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, summand: Tensor) -> Tensor:
        if _is_suited(x) and _lies_as(summand, x):
            result = _SummedNorm.apply(x, mean, scale, shift, summand.detach())  # type: ignore[no-untyped-call]
            found: Tensor = _Divided.apply(result, summand)  # type: ignore[no-untyped-call]
            return found
        return self._summed(normalize(x, mean, scale, shift), summand).relu_()

    def _summed(self, value: Tensor, summand: Tensor) -> Tensor:
        if not value.requires_grad:
            # Into the norm's memory, for the same reason as in :class:`ActivatedNorm`.
            return value.add_(summand)
        args = substitute(self.sum.args, lambda name: value if name == self.name else summand)
        result: Tensor = self.sum.target(*args)
        return result


def _is_suited(x: Tensor) -> bool:
    """Whether the norm of ``x`` can be one pass with the operators after it."""
    return channel_kernels.fits(x) and channel_kernels.takes_activations(x)


def _lies_as(summand: Tensor, x: Tensor) -> bool:
    """Whether ``summand`` can be added to a map like ``x`` without a copy."""
    alike = summand.shape == x.shape and summand.dtype == x.dtype
    return alike and summand.is_contiguous(memory_format=torch.channels_last)


class _ActivatedNorm(torch.autograd.Function):
    """The norm and its activation, which together save no more than the norm alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, activation: Activation
    ) -> Tensor:
        ctx.save_for_backward(x, mean, scale, shift)
        ctx.activation = activation
        return channel_kernels.normalised(x, mean, scale, shift, activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, scale, shift = ctx.saved_tensors
        grad_x, grad_shift, grad_scale = channel_kernels.gradients(
            x, grads[0], mean, scale, shift, ctx.activation
        )
        return grad_x, None, grad_scale, grad_shift, None


class _SummedNorm(torch.autograd.Function):
    """The norm, the sum and the ReLU, differentiated as if it were the norm alone: see :class:`_Divided`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, summand: Tensor) -> Tensor:
        ctx.save_for_backward(x, mean, scale, shift)
        return channel_kernels.normalised(x, mean, scale, shift, RELU, summand)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, scale, shift = ctx.saved_tensors
        grad_x, grad_shift, grad_scale = channel_kernels.gradients(x, grads[0], mean, scale, shift)
        return grad_x, None, grad_scale, grad_shift, None


class _Divided(torch.autograd.Function):
    """Passes the gradient through the ReLU that returned ``result`` to both of its summands.

    It is a node of its own, so that the result's gradient is freed before the norm's is computed.
    """

    @staticmethod
    def forward(ctx: Any, result: Tensor, summand: Tensor) -> Tensor:
        ctx.mark_dirty(result)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (result,) = ctx.saved_tensors
        gradient = aten.threshold_backward(grads[0], result, 0)
        return gradient, gradient
