"""Passes over a map on a CUDA card that ATen's kernels for synchronised batch norm make at once.

Each reads and writes every element once and sums in float32 at least. Maps are (N, C, h, w) tensors whose
channels lie beside each other, copied first if they have gaps; per-channel values are (C,) and in the type of
the map's statistics. What the functions replace takes several passes, or a tensor as large as the map in
float32, or kernels that start one block a channel and so leave most of a card idle where channels are few.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from streamcnn.geometry.windows import dense, layout
from streamcnn.graph.ops.constants import filled

_MAX_ELEMENTS = 2**31
"""Positions are 32-bit numbers in the kernels."""


def fits(x: Tensor) -> bool:
    """Whether the functions here can be called with ``x``."""
    is_suited = x.is_cuda and x.is_floating_point() and x.numel() < _MAX_ELEMENTS
    return is_suited and is_channels_last(x) and not isinstance(x, FakeTensor)


def has_host_moments(x: Tensor) -> bool:
    """Whether :func:`moments` can be called with ``x`` although it is on a CPU."""
    is_suited = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.is_contiguous()
    # The kernel has no form for what has no values: PyTorch would run it on as many zeros.
    return is_suited and not isinstance(x, FakeTensor)


def is_channels_last(x: Tensor) -> bool:
    """Whether channels lie beside each other in ``x``, which may be a view cut out of a map."""
    return layout(x) is torch.channels_last


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel: on a card by Welford's algorithm.

    Where :func:`has_host_moments`, ATen reads ``x`` twice, and makes no tensor as large as it is.
    """
    return torch.batch_norm_update_stats(dense(x), None, None, 0.0)


def normalised(
    x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """``(x - mean) * inverse * weight + bias``."""
    return torch.batch_norm_elemt(dense(x), weight, bias, mean, inverse, 0.0)


def beside(gradient: Tensor, x: Tensor) -> Tensor:
    """A gradient of ``x`` in the layout and type of ``x``, as the functions here want it."""
    return gradient.to(x.dtype).contiguous(memory_format=torch.channels_last)


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """``x * scale``."""
    return normalised(x, filled(0, scale), scale, None, None)


def sums(x: Tensor, gradient: Tensor, mean: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """The sums over each channel of ``gradient`` and of ``gradient * (x - mean)``.

    ``inverse`` is not part of them.
    """
    total, product, _, _ = torch.batch_norm_backward_reduce(
        gradient, dense(x), mean, inverse, None, True, False, False
    )
    return total, product


class Line(NamedTuple):
    """What :func:`plus_line` adds."""

    mean: Tensor
    slope: Tensor
    offset: Tensor
    one: Tensor
    """Ones, (C,)."""
    minus_one: Tensor
    """The kernel subtracts sums of gradients over a count: where that is -1, it adds them."""


def line(mean: Tensor, slope: Tensor, offset: Tensor) -> Line:
    """``slope * (x - mean) + offset``, for any number of tiles ``x``."""
    minus_one = filled(-1, mean.new_empty(1, dtype=torch.int32))
    return Line(mean, slope, offset, filled(1, mean), minus_one)


def plus_line(total: Tensor, x: Tensor, line: Line) -> Tensor:
    """``total + slope * (x - mean) + offset``."""
    mean, slope, offset, one, count = line
    return torch.batch_norm_backward_elemt(beside(total, x), dense(x), mean, one, None, offset, slope, count)
