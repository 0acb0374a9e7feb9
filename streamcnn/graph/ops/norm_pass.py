"""The local pass of a norm: a map less its mean, times a scale, plus a shift, with gradients for all of them.

It is ATen's own fused eval-mode batch norm. Scale and shift are global values, worked out of statistics and
affine parameters once for all tiles: the backward pass of a tile gives no more than its two sums for each
channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streamcnn.geometry.windows import dense, layout
from streamcnn.graph.costs import Cost, declare, elements
from streamcnn.graph.ops import channel_kernels
from streamcnn.graph.ops.constants import filled

aten = torch.ops.aten


class _Normalize(torch.autograd.Function):
    """``(x - mean) * scale + shift`` with gradients for all but the mean, whose own the shift passes on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(x, mean, scale, shift)
        if channel_kernels.fits(x):
            return channel_kernels.normalised(x, mean, scale, shift)
        one = filled(1, mean)
        return torch.batch_norm(x, scale, shift, mean, one, False, 0.0, 0.0, torch.backends.cudnn.enabled)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, scale, shift = ctx.saved_tensors
        if channel_kernels.fits(x):
            grad_x, grad_shift, grad_scale = channel_kernels.gradients(x, grads[0], mean, scale, shift)
            return grad_x, None, grad_scale, grad_shift
        saved, one = _no_statistics(x), filled(1, mean)
        # Of one image the CPU's kernel takes a gradient with its channels beside each other, such as that of
        # a permuted result, for one that lies as x does.
        gradient = grads[0].contiguous(memory_format=layout(x))
        grad_x, grad_scale, grad_shift = aten.native_batch_norm_backward(
            gradient, x, scale, mean, one, saved, saved, False, 0.0, [True, True, True]
        )
        return grad_x, None, grad_scale, grad_shift


def _no_statistics(x: Tensor) -> Tensor | None:
    """What stands for the saved statistics of an eval-mode norm, whose running ones count.

    On a GPU an empty tensor of the type that is computed in: some of the kernels there insist on a tensor.
    """
    if not x.is_cuda:
        return None
    return x.new_empty(0, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def normalize(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``(x - mean) * scale + shift`` of ``x`` (N, C, h, w) by values (C,).

    The mean is taken as a constant: see :func:`scale_and_shift`.
    """
    # Not through a view: changing a view in place later would copy its whole gradient.
    result: Tensor = _Normalize.apply(dense(x), mean, scale, shift)  # type: ignore[no-untyped-call]
    return result


def normalize_images(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The same by values of each image, (N*C,)."""
    per_image = dense(x).reshape(1, -1, *x.shape[2:])
    return normalize(per_image, mean, scale, shift).reshape(x.shape)


declare(
    normalize,
    normalize_images,
    # On a CPU ATen works out the gradient as in train mode, and then takes the other.
    cost=Cost(operations=elements, backward_workspace=lambda nbytes: nbytes.result, makes_new=True),
)


def scale_and_shift(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """What a map is multiplied by after its mean is taken off, and what is then added: (C,) each.

    The shift is the bias. It also hands on the gradient of the mean, ``-scale`` times its own.
    """
    scale, shift = _ScaleAndShift.apply(mean, variance, weight, bias, eps)  # type: ignore[no-untyped-call]
    return scale, shift


class _ScaleAndShift(torch.autograd.Function):
    """Few values in few operators: on a card each costs as much to ask for as a pass over a small map."""

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        inverse = torch.rsqrt(variance + eps)
        scale = inverse if weight is None else inverse * weight
        # The last two are not looked at: that they were changed is an error, as in plain PyTorch.
        ctx.save_for_backward(inverse, scale, variance, weight)
        return scale, torch.zeros_like(mean) if bias is None else bias.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inverse, scale, *_ = ctx.saved_tensors
        grad_scale, grad_shift = grads
        grad_weight = grad_scale * inverse
        grad_mean = grad_variance = None
        # Running statistics have no gradient.
        if ctx.needs_input_grad[0]:
            nothing = filled(0, scale)
            grad_mean = torch.addcmul(nothing, grad_shift, scale, value=-1)
            grad_variance = torch.addcmul(nothing, grad_weight, inverse * scale, value=-0.5)
        weight, bias = (
            gradient if wanted else None
            for gradient, wanted in zip((grad_weight, grad_shift), ctx.needs_input_grad[2:], strict=False)
        )
        return grad_mean, grad_variance, weight, bias, None
