"""The local pass of a norm: a map minus its mean, times a scale, plus a shift, with their gradients.

It is ATen's own fused eval-mode batch norm. Scale and shift are global values, computed once for all tiles
from statistics and affine parameters. So the backward pass of a tile returns only two sums for each channel.
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
    """``(x - mean) * scale + shift`` with gradients for all but the mean, which the shift's covers."""

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
        # For one image the CPU's kernel would misread a gradient in channels last, such as that of a
        # permuted result, as one in the layout of x.
        gradient = grads[0].contiguous(memory_format=layout(x))
        grad_x, grad_scale, grad_shift = aten.native_batch_norm_backward(
            gradient, x, scale, mean, one, saved, saved, False, 0.0, [True, True, True]
        )
        return grad_x, None, grad_scale, grad_shift


def _no_statistics(x: Tensor) -> Tensor | None:
    """A placeholder for the saved statistics, which an eval-mode norm does not read.

    On a GPU it is an empty tensor in the dtype of the computation, as some kernels there require a tensor.
    """
    if not x.is_cuda:
        return None
    return x.new_empty(0, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def normalize(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``(x - mean) * scale + shift`` of ``x`` (N, C, h, w), with values (C,) for each channel.

    The mean counts as a constant: see :func:`scale_and_shift`.
    """
    # Not as a view: a later in-place change of a view would copy its whole gradient.
    result: Tensor = _Normalize.apply(dense(x), mean, scale, shift)  # type: ignore[no-untyped-call]
    return result


def normalize_images(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """As :func:`normalize`, with values (N*C,) for each channel of each image."""
    per_image = dense(x).reshape(1, -1, *x.shape[2:])
    return normalize(per_image, mean, scale, shift).reshape(x.shape)


declare(
    normalize,
    normalize_images,
    # On a CPU, ATen also computes the gradient of train mode, and discards it.
    cost=Cost(operations=elements, backward_workspace=lambda nbytes: nbytes.result, makes_new=True),
)


def scale_and_shift(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The scale and the shift (C,) that :func:`normalize` applies.

    The shift is the bias. Its backward pass also gives the mean's gradient, ``-scale`` times the shift's.
    """
    scale, shift = _ScaleAndShift.apply(mean, variance, weight, bias, eps)  # type: ignore[no-untyped-call]
    return scale, shift


class _ScaleAndShift(torch.autograd.Function):
    """Scale and shift in few operators: on a GPU, each launch costs as much as a pass over a small map."""

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        inverse = torch.rsqrt(variance + eps)
        scale = inverse if weight is None else inverse * weight
        # The last two are saved only so that changing them is an error, as in plain PyTorch.
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
