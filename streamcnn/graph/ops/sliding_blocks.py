"""Blocks of a map as columns (``F.unfold``), and sums of blocks as a map (``F.fold``).

The code sees the blocks' positions as one axis, so :mod:`streamcnn.capture.lowering.folded_images` calls the
functions here that record nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import fold, unfold  # by themselves, since the user may replace them there

from streamcnn.geometry.axis_maps import Sliding, Transposed
from streamcnn.graph.costs import NOTHING, Cost, declare, elements
from streamcnn.graph.ops.rules import Call, NotStreamable, Pair, Sample, Tracer, as_pair, rule
from streamcnn.graph.program import Access, Ref

aten = torch.ops.aten


@rule(aten.im2col.default)
def blocks(tracer: Tracer, call: Call) -> NotStreamable:
    """Refuse ``unfold`` to blocks (N, C * kh * kw, L), whose positions are always merged."""
    return NotStreamable("it is not applied to a map of shape (N, C, H, W)")


@rule(aten.col2im.default)
def sum_of_blocks(tracer: Tracer, call: Call) -> NotStreamable:
    """Refuse ``fold`` of blocks to a map (N, C, H, W): their positions are always merged."""
    return NotStreamable("it is not applied to images or tokens")


def record_blocks(tracer: Tracer, call: Call, ref: Ref) -> Ref:
    """Record the blocks of a map ``ref`` (N, C, H, W) as a map (N, C * kh * kw, rows, cols)."""
    kernel, stride, padding, dilation = _windows(call)
    rows, cols = (Sliding(*axis) for axis in zip(kernel, stride, padding, dilation, strict=True))
    spec = tracer.spec(ref)
    channels = spec.shape[1] * kernel[0] * kernel[1]
    size = _num_blocks(spec.shape[2:], kernel, stride, padding, dilation)
    return tracer.local(
        blocks_of,
        (ref, kernel, stride, dilation),
        like=torch.empty((spec.shape[0], channels, *size), dtype=spec.dtype, device="meta"),
        axes=(2, 3),
        accesses={ref.name: Access(rows, cols)},
        fill=0.0,
        heavy=True,
    )


def record_sum_of_blocks(tracer: Tracer, call: Call, ref: Ref) -> Ref | NotStreamable:
    """Record the sum of blocks ``ref`` (N, C * kh * kw, rows, cols) as a map (N, C, H, W)."""
    windows, (size,) = _windows(call), call.bind("output_size")
    kernel, stride, padding, dilation = windows
    spec = tracer.spec(ref)
    if tracer.axes(ref) != (2, 3) or spec.shape[2:] != _num_blocks(size, *windows):
        return NotStreamable("it is not applied to images or tokens")
    rows, cols = (Transposed(*axis) for axis in zip(kernel, stride, padding, dilation, strict=True))
    shape = (spec.shape[0], spec.shape[1] // (kernel[0] * kernel[1]), *size)
    return tracer.local(
        summed_blocks,
        (ref, kernel, stride, dilation),
        like=torch.empty(shape, dtype=spec.dtype, device="meta"),
        axes=(2, 3),
        accesses={ref.name: Access(rows, cols)},
        heavy=True,
    )


def _windows(call: Call) -> tuple[Pair, Pair, Pair, Pair]:
    """Kernel, stride, padding and dilation."""
    kernel, stride, padding, dilation = map(
        as_pair, call.bind("kernel_size", "stride", "padding", "dilation")
    )
    return kernel, stride, padding, dilation


def _num_blocks(size: Sequence[int], *windows: Pair) -> Pair:
    """Numbers of rows and columns of blocks in a map of ``size``."""
    rows, cols = (
        (extent + 2 * p - d * (k - 1) - 1) // s + 1 for extent, k, s, p, d in zip(size, *windows, strict=True)
    )
    return rows, cols


def blocks_of(x: Tensor, kernel: Pair, stride: Pair, dilation: Pair) -> Tensor:
    """The blocks of a window ``x`` (N, C, h, w) with zeros around it, as (N, C * kh * kw, rows, cols)."""
    columns = unfold(x, kernel, dilation, 0, stride)
    return columns.reshape(*columns.shape[:2], *_num_blocks(x.shape[2:], kernel, stride, (0, 0), dilation))


def summed_blocks(x: Tensor, kernel: Pair, stride: Pair, dilation: Pair) -> Tensor:
    """The uncropped sum of blocks ``x`` (N, C * kh * kw, rows, cols)."""
    height, width = (
        (extent - 1) * s + d * (k - 1) + 1
        for extent, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    )
    return fold(x.flatten(2), (height, width), kernel, dilation, 0, stride)


declare(
    blocks_of,
    summed_blocks,
    # A dense copy of the operand; backward of the result's gradient.
    cost=Cost(
        operations=elements,
        workspace=lambda nbytes: nbytes.operands,
        backward_workspace=lambda nbytes: max(nbytes.operands, nbytes.result),
        saves=NOTHING,
        makes_new=True,
    ),
)
declare(aten.im2col, aten.col2im, cost=Cost(saves=NOTHING))


class _Columns(nn.Module):
    """A convolution as a product with blocks, and overlapping blocks put together again."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 5 * 36).reshape(5, 36))

    def forward(self, x: Tensor) -> Tensor:
        columns = nn.functional.unfold(x, 3, dilation=(1, 2), padding=(0, 2), stride=(2, 1))
        convolved = (self.weight @ columns).reshape(len(x), 5, 20, 35)
        whole = nn.functional.fold(columns.sin(), x.shape[2:], 3, (1, 2), (0, 2), (2, 1))
        apart = nn.functional.unfold(x, 2, stride=3).transpose(1, 2).cos().transpose(1, 2)
        apart = nn.functional.fold(apart, (41, 35), 2, stride=3)
        return torch.cat((convolved.mean((2, 3)), (whole * apart).mean((2, 3))), 1)


SAMPLES = (Sample("blocks", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), _Columns())),)
