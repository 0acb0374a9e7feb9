"""Convolution and transposed convolution.

The interpreter pads with zeros only where a tile's window leaves the map, so the convolutions recorded
here have no padding of their own, except where both sides of a tile need the same padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from streamcnn.geometry.axis_maps import Sliding, Transposed
from streamcnn.graph.costs import CallBytes, Cost, Operation, Routine, declare
from streamcnn.graph.ops.depthwise import has_slow_weights, weight_gradient
from streamcnn.graph.ops.rules import Call, NotStreamable, Sample, Tracer, as_pair, as_triple, rule
from streamcnn.graph.ops.samples import chain
from streamcnn.graph.program import Access, Ref

aten = torch.ops.aten
# Whatever the user puts in its place later.
_CONVOLVE = torch.conv2d


@rule(aten.conv2d.default, aten.conv2d.padding, begins=True)
def conv2d(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """2-D convolution: any kernel, stride, dilation, groups and padding, ``same`` included."""
    ref, weight, bias, stride, padding, dilation, groups = call.bind(
        "input", "weight", "bias", "stride", "padding", "dilation", "groups"
    )
    if tracer.axes(ref) != (2, 3) or tracer.axes(weight) is not None:
        return NotStreamable("it is not applied to a map of shape (N, C, H, W)")
    kernel = tracer.spec(weight).shape[2:]
    stride, dilation = as_pair(stride), as_pair(dilation)
    low = _padding_before(padding, kernel, dilation)
    rows, cols = (Sliding(k, s, p, d) for k, s, p, d in zip(kernel, stride, low, dilation, strict=True))
    like = tracer.fake(call)
    return tracer.local(
        convolve_complex if like.dtype.is_complex else convolve,
        (ref, weight, bias, stride, dilation, groups),
        like=like,
        axes=(2, 3),
        accesses={ref.name: Access(rows, cols)},
        fill=0.0,
        heavy=True,
    )


@rule(aten.conv3d.default, aten.conv3d.padding)
def conv3d(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """3-D convolution of volumes with one axis besides the spatial ones, such as slices or bands."""
    ref, weight, bias, stride, padding, dilation, groups = call.bind(
        "input", "weight", "bias", "stride", "padding", "dilation", "groups"
    )
    axes = tracer.axes(ref)
    if axes is None or min(axes) < 2 or tracer.axes(weight) is not None:
        return NotStreamable("it is not applied to a map of shape (N, C, H, W)")
    kernel = tracer.spec(weight).shape[2:]
    stride, dilation = as_triple(stride), as_triple(dilation)
    low = _padding_before(padding, kernel, dilation)
    (depth,) = (axis - 2 for axis in (2, 3, 4) if axis not in axes)
    if padding == "same" and dilation[depth] * (kernel[depth] - 1) % 2:
        return NotStreamable("it pads other axes than the spatial ones unevenly")
    windows = [Sliding(*each) for each in zip(kernel, stride, low, dilation, strict=True)]
    around = tuple(low[axis] if axis == depth else 0 for axis in range(3))
    return tracer.local(
        convolve_volume,
        (ref, weight, bias, stride, around, dilation, groups),
        like=tracer.fake(call),
        axes=axes,
        accesses={ref.name: Access(*(windows[axis - 2] for axis in axes))},
        fill=0.0,
        heavy=True,
    )


def _padding_before(
    padding: str | int | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """Padding before the first position of each axis; padding at the end follows from the output's size."""
    if padding == "valid":
        return (0,) * len(kernel)
    if padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
    assert not isinstance(padding, str)
    return as_pair(padding) if len(kernel) == 2 else as_triple(padding)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    padding: tuple[int, int] = (0, 0),
) -> Tensor:
    """The convolution of a window ``x`` (N, C, h, w) with zeros around it."""
    return _CONVOLVE(x, weight, bias, stride, padding, dilation, groups)


def convolve_complex(x: Tensor, weight: Tensor, *options: Any) -> Tensor:
    """:func:`convolve` of complex values, always recomputed: ATen has no single backward operator for it."""
    return convolve(x, weight, *options)


def convolve_volume(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int, int],
    padding: tuple[int, int, int],
    dilation: tuple[int, int, int],
    groups: int,
) -> Tensor:
    """The convolution of a window ``x`` (N, C, d, h, w), padded along the axis that is not spatial."""
    return torch.conv3d(x, weight, bias, stride, padding, dilation, groups)


@rule(aten.conv_transpose2d.input, begins=True)
def conv_transpose2d(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """2-D transposed convolution, output padding included."""
    ref, weight, bias, stride, padding, dilation, groups = call.bind(
        "input", "weight", "bias", "stride", "padding", "dilation", "groups"
    )
    if tracer.axes(ref) != (2, 3) or tracer.axes(weight) is not None:
        return NotStreamable("it is not applied to a map of shape (N, C, H, W)")
    if tracer.spec(ref).dtype.is_complex:
        return NotStreamable("it is applied to complex values")
    kernel = tracer.spec(weight).shape[2:]
    stride, dilation, low = as_pair(stride), as_pair(dilation), as_pair(padding)
    rows, cols = (Transposed(k, s, p, d) for k, s, p, d in zip(kernel, stride, low, dilation, strict=True))
    like = tracer.fake(call)
    result = tracer.local(
        convolve_transposed,
        (ref, weight, stride, dilation, groups),
        like=like,
        axes=(2, 3),
        accesses={ref.name: Access(rows, cols)},
        heavy=True,
    )
    if bias is None:
        return result
    # The bias is added at positions of output padding too, which no input position reaches.
    column = tracer.global_value(torch.Tensor.reshape, bias, (1, -1, 1, 1))
    return tracer.local(torch.add, (result, column), like=like, axes=(2, 3), accesses={result.name: Access()})


def convolve_transposed(
    x: Tensor, weight: Tensor, stride: tuple[int, int], dilation: tuple[int, int], groups: int
) -> Tensor:
    """The uncropped transposed convolution of a window ``x`` (N, C, h, w)."""
    return torch.conv_transpose2d(x, weight, None, stride, 0, 0, groups, dilation)


class StoredConvolution(torch.autograd.Function):
    """A convolution whose result is already stored: only its backward pass is computed.

    Forward returns a tensor of the right shape in the memory of one element, which must not be read.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        shape, dtype, stride, dilation, groups, transposed, padding = options
        ctx.save_for_backward(x, weight)
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.options = (dtype, stride, dilation, groups, transposed, padding)
        return x.new_empty((), dtype=dtype).expand(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        dtype, stride, dilation, groups, transposed, padding = ctx.options
        # Under autocast the operands were cast to the result's dtype; the gradients are cast back.
        grad_x, grad_weight, grad_bias = _gradients(
            grad.to(dtype),
            x.to(dtype),
            weight.to(dtype),
            ctx.bias_sizes,
            (stride, padding, dilation, transposed, groups),
            [*ctx.needs_input_grad[:2], ctx.bias_sizes is not None and ctx.needs_input_grad[2]],
        )
        return (
            _cast(grad_x, x.dtype),
            _cast(grad_weight, weight.dtype),
            _cast(grad_bias, ctx.bias_dtype),
            *(None,) * 7,
        )


class _DepthwiseConvolution(torch.autograd.Function):
    """A depthwise convolution whose weights' gradient is computed in pieces."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        stride, padding = options
        ctx.save_for_backward(x, weight)
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        ctx.options = (stride, padding, (1, 1), False, len(weight))
        return _CONVOLVE(x, weight, bias, stride, padding, 1, len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        return *_gradients(grads[0], x, weight, ctx.bias_sizes, ctx.options, wanted), None, None


def convolve_whole(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """``torch.conv2d`` of whole values, with a faster gradient of large depthwise kernels on a CPU."""
    if (
        isinstance(padding, str)
        or x.dim() != 4
        or not weight.requires_grad
        or torch.is_autocast_enabled(x.device.type)
        or not has_slow_weights(x, weight, as_pair(dilation), groups)
    ):
        return _CONVOLVE(x, weight, bias, stride, padding, dilation, groups)
    result: Tensor = _DepthwiseConvolution.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, as_pair(stride), as_pair(padding)
    )
    return result


def _gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: list[int] | None,
    options: tuple[Any, ...],
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The wanted gradients of operand, weight and bias, given the gradient of the result."""
    stride, padding, dilation, transposed, groups = options
    in_pieces = wanted[1] and not transposed and has_slow_weights(x, weight, dilation, groups)
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward.default(
        grad,
        x,
        weight,
        bias_sizes,
        list(stride),
        list(padding),
        list(dilation),
        transposed,
        [0, 0],
        groups,
        [wanted[0], wanted[1] and not in_pieces, wanted[2]],
    )
    if in_pieces:
        grad_weight = weight_gradient(grad, x, weight, stride, padding)
    return grad_x, grad_weight, grad_bias


def _cast(tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return None if tensor is None or dtype is None else tensor.to(dtype)


def stored_convolve(
    shape: tuple[int, ...], dtype: torch.dtype, args: Sequence[Any], padding: tuple[int, int] = (0, 0)
) -> Tensor:
    """Stand-in for ``convolve(*args, padding=padding)`` whose value is already stored."""
    x, weight, bias, *options = args
    result: Tensor = StoredConvolution.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, shape, dtype, *options, False, padding
    )
    return result


def stored_convolve_transposed(shape: tuple[int, ...], dtype: torch.dtype, args: Sequence[Any]) -> Tensor:
    """Stand-in for ``convolve_transposed(*args)`` whose value is already stored."""
    x, weight, *options = args
    result: Tensor = StoredConvolution.apply(  # type: ignore[no-untyped-call]
        x, weight, None, shape, dtype, *options, True, (0, 0)
    )
    return result


def _operations(operation: Operation) -> int:
    """Every position of the result meets every weight."""
    (result,), (weight,) = operation.results, operation.bind("weight")
    return 2 * int(weight.tensor.numel) * result.numel // result.shape[1]


def _operations_transposed(operation: Operation) -> int:
    """Every position of the operand meets every weight."""
    x, weight = (operand.tensor for operand in operation.bind("x", "weight"))
    return 2 * int(weight.numel) * int(x.numel) // int(x.shape[1])


def _is_depthwise(operation: Operation) -> bool:
    """Whether the weight's shape (C_out, 1, h, w) makes the convolution depthwise."""
    (weight,) = operation.bind("weight")
    return len(weight.shape) == 4 and weight.shape[1] == 1


def _reordered(nbytes: CallBytes) -> int:
    """Bytes of copies of a convolution's operands and result, in the layouts that its kernels use."""
    return nbytes.operands + nbytes.result + nbytes.weights


_CONVOLUTION = Cost(workspace=_reordered, routine=Routine.CONVOLUTION, per_channel=_is_depthwise)

declare(
    convolve,
    cost=replace(_CONVOLUTION, operations=_operations, makes_new=True, stand_in=stored_convolve, pads=True),
)
declare(convolve_complex, cost=Cost(operations=_operations, per_channel=_is_depthwise))
declare(
    convolve_transposed,
    cost=replace(_CONVOLUTION, operations=_operations_transposed, stand_in=stored_convolve_transposed),
)
declare(convolve_volume, cost=replace(_CONVOLUTION, operations=_operations, makes_new=True))
# On whole values.
declare(
    *(aten.conv1d, aten.conv3d, aten.conv_tbc, aten.convolution, aten._convolution),
    *(aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d),
    cost=_CONVOLUTION,
)
declare(aten.conv2d, cost=replace(_CONVOLUTION, on_whole=convolve_whole))


class _Bands(nn.Module):
    """Channels as the third axis of a volume."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 4, 3, padding=(1, 0, 2), stride=(2, 1, 2))
        self.last = nn.Conv3d(4, 2, (3, 2, 3), padding="same", groups=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        volume = self.last(self.first(x.unsqueeze(1)).sin())
        turned: Tensor = self.last(self.first(x.permute(0, 2, 3, 1).unsqueeze(1)))
        return torch.cat((volume.mean((2, 3, 4)), turned.square().mean((2, 3, 4))), 1)


def _mixed() -> nn.Module:
    return chain(
        nn.Conv2d(3, 4, (1, 7), padding=(0, 3)),
        nn.Conv2d(4, 6, 4, stride=3, padding=2, dilation=2, bias=False),
        nn.Conv2d(6, 6, 2, padding="same", groups=3),
        nn.Conv2d(6, 5, (4, 1), stride=(2, 1), padding=(5, 1)),
    )


def _transposed() -> nn.Module:
    return chain(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.ConvTranspose2d(4, 6, 2, stride=2),
        nn.ConvTranspose2d(6, 4, 3, stride=3, padding=1, output_padding=2, groups=2),
        nn.ConvTranspose2d(4, 2, (4, 3), stride=(1, 2), padding=(3, 0), dilation=(2, 1), bias=False),
    )


SAMPLES = (
    Sample("asymmetric, dilated, strided, grouped, same padding", _mixed),
    Sample("transposed with output padding", _transposed),
    Sample("volumes", lambda: nn.Sequential(nn.Conv2d(3, 5, 3), _Bands())),
    *(
        Sample(
            f"padding mode {mode}",
            lambda mode=mode: chain(  # type: ignore[misc]
                nn.Conv2d(3, 4, 5, padding=(2, 1), padding_mode=mode), nn.Conv2d(4, 3, 3, stride=2)
            ),
        )
        for mode in ("reflect", "replicate", "circular")
    ),
)
