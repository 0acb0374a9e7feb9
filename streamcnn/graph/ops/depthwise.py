"""The gradient of a depthwise convolution's weights on a CPU.

oneDNN has a fast kernel for it up to 3 x 3; with a larger kernel it takes ten to a hundred times as long as
the convolution itself (torch 2.13, AVX-512). So we divide a larger kernel into pieces of 3 x 3, each of which
reads a shifted part of the operand. On two cores, with 5 x 5 weights, 672 channels of 64 x 64 take 28 to 45
ms at once and 9 ms in pieces; 120 channels of 500 x 500 take 310 to 480 ms and 118 ms. With 7 x 7 weights, 96
channels of 256 x 256 take 130 ms and 43 ms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from streamcnn.geometry.windows import layout

_FAST = 3
"""Edge of the largest kernel that is fast."""
_CACHED_NBYTES = 2**21
"""Bytes of the operand for which all pieces are computed before the next part: as much as a cache holds."""
_CHANNELS = 16
"""Channels that the fast kernel works on at a time."""


def has_slow_weights(x: Tensor, weight: Tensor, dilation: Sequence[int], groups: int) -> bool:
    """Whether the gradient of ``weight`` (C, 1, kh, kw) is faster in pieces."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and bool(torch.backends.mkldnn.enabled)
        and groups == x.shape[1] == weight.shape[0] >= _CHANNELS
        and tuple(dilation) == (1, 1)
        and max(weight.shape[2:]) > _FAST
        # In channels last oneDNN's kernel for large weights is no slower than pieces, which are reordered.
        and layout(x) is torch.contiguous_format
    )


def weight_gradient(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """The gradient of ``weight`` (C, 1, kh, kw), given that of the result (N, C, oh, ow).

    ``x`` is the operand (N, C, h, w) without padding, ``padding`` the number of zeros on either side.
    """
    found = torch.zeros_like(weight)
    step = max(1, _CACHED_NBYTES // (_CHANNELS * x[:, :1].nbytes)) * _CHANNELS
    for start in range(0, len(weight), step):
        some = slice(start, start + step)
        for band, part in _bands(gradient[:, some], x[:, some], weight.shape[2], stride, padding):
            _add_pieces(found[some], band, part, stride)
    return found


def _bands(
    gradient: Tensor, x: Tensor, kernel: int, stride: Sequence[int], padding: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Bands of rows of the operand, padded, each with its band of the result's gradient."""
    num_rows, height = gradient.shape[2], x.shape[2]
    step = max(1, _CACHED_NBYTES // (x[:, :, :1].nbytes * stride[0]))
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        top, bottom = start * stride[0] - padding[0], (stop - 1) * stride[0] + kernel - padding[0]
        band = x[:, :, max(top, 0) : min(bottom, height)]
        zeros = (padding[1], padding[1], max(-top, 0), max(bottom - height, 0))
        yield F.pad(band, zeros) if any(zeros) else band, gradient[:, :, start:stop]


def _add_pieces(found: Tensor, x: Tensor, gradient: Tensor, stride: Sequence[int]) -> None:
    """Add the gradient of a kernel to ``found``, piece by piece; ``x`` is padded."""
    kernel = found[:, :, :_FAST, :_FAST]
    rows, cols = (
        (extent - 1) * s + k
        for extent, s, k in zip(gradient.shape[2:], stride, kernel.shape[2:], strict=True)
    )
    gradient = gradient.contiguous()
    for (top, above), (left, before) in product(*map(_pieces, found.shape[2:])):
        window = x[:, :, top : top + rows, left : left + cols]
        options = (None, list(stride), [0, 0], [1, 1], False, [0, 0], len(found))
        wanted = [False, True, False]
        piece = torch.ops.aten.convolution_backward.default(gradient, window, kernel, *options, wanted)[1]
        target = found[:, :, top : top + _FAST, left : left + _FAST]
        target[:, :, above:, before:] += piece[:, :, above:, before:]


def _pieces(extent: int) -> list[tuple[int, int]]:
    """The start of each piece of a kernel along one axis, and how much of it earlier pieces have covered.

    All pieces have one size, since oneDNN compiles and keeps a kernel for each size.
    """
    starts = [max(0, min(start, extent - _FAST)) for start in range(0, extent, _FAST)]
    return [(start, covered - start) for start, covered in zip(starts, range(0, extent, _FAST), strict=True)]
