"""Adaptive pooling: to many positions as a local operator, to few as a reduction of the whole map."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from streamcnn.geometry.axis_maps import Adaptive, Sliding
from streamcnn.geometry.regions import Interval, Region
from streamcnn.graph.costs import (
    INDEX_BYTES,
    NOTHING,
    CallBytes,
    Cost,
    Operation,
    Saves,
    cost_of,
    declare,
    windows,
)
from streamcnn.graph.ops.constants import numbers
from streamcnn.graph.ops.gathering import gather_positions, gather_unrounded
from streamcnn.graph.ops.pooling import avg_pool, max_pool
from streamcnn.graph.ops.reduction_types import Sum
from streamcnn.graph.ops.reductions import reduced
from streamcnn.graph.ops.rules import Call, NotStreamable, Sample, Tracer, rule
from streamcnn.graph.ops.samples import chain
from streamcnn.graph.ops.taps import Taps
from streamcnn.graph.ops.window_places import largest_in
from streamcnn.graph.ops.window_reductions import WindowMaxima, WindowMeans, Windows, window_sizes
from streamcnn.graph.program import Access, Ref

aten = torch.ops.aten

FEW = 8
"""Up to this many positions along an axis, a position's window in a large map may exceed a tile."""


@rule(aten.adaptive_avg_pool2d.default, aten.adaptive_max_pool2d.default)
def adaptive_pool(tracer: Tracer, call: Call) -> Any:
    """Adaptive pooling to any size, with equal or unequal windows."""
    ref, size = call.bind("self", "output_size")
    axes, shape = tracer.axes(ref), tracer.spec(ref).shape
    if axes is None or axes != (len(shape) - 2, len(shape) - 1):
        return NotStreamable("it is not applied to a map of shape (N, C, H, W)")
    rows, cols = (Adaptive(shape[axis], count) for axis, count in zip(axes, size, strict=True))
    is_average = call.target is aten.adaptive_avg_pool2d.default
    if not _summarises((rows, cols)):
        return (_average if is_average else _maxima)(tracer, call, ref, (rows, cols))
    if not is_average:
        return tracer.reduce(WindowMaxima(shape, axes, True, (rows, cols)), ref)
    dims = tuple(dim for dim, axis in zip(axes, (rows, cols), strict=True) if axis.count == 1)
    if dims and all(axis.count in (1, axis.size) for axis in (rows, cols)):
        return reduced(tracer, ref, Sum(shape, dims, True, math.prod(shape[dim] for dim in dims)))[0]
    return tracer.reduce(WindowMeans(shape, axes, True, (rows, cols)), ref)[0]


def _summarises(axes: Windows) -> bool:
    """Whether the result is a global value: few rows or columns, and no more than the map has."""
    return any(axis.count <= FEW for axis in axes) and all(axis.count <= axis.size for axis in axes)


def _average(tracer: Tracer, call: Call, ref: Ref, axes: Windows) -> Ref:
    kernel = _equal_windows(axes)
    if kernel is not None:
        return _equal(tracer, ref, tracer.fake(call), kernel, avg_pool, None)
    return _unequal(tracer, ref, tracer.fake(call), axes, window_means)


def _maxima(tracer: Tracer, call: Call, ref: Ref, axes: Windows) -> tuple[Ref, Ref]:
    values, places = tracer.fake(call)
    kernel = _equal_windows(axes)
    return (
        _unequal(tracer, ref, values, axes, window_maxima)
        if kernel is None or values.dim() != 4
        else _equal(tracer, ref, values, kernel, max_pool, (1, 1)),
        _unequal(tracer, ref, places, axes, window_places),
    )


def _equal_windows(axes: Windows) -> tuple[int, int] | None:
    """The extents of every window, where they are equal and no two overlap."""
    if any(axis.size % axis.count for axis in axes):
        return None
    return (axes[0].size // axes[0].count, axes[1].size // axes[1].count)


def _equal(tracer: Tracer, ref: Ref, like: Tensor, kernel: tuple[int, int], target: Any, option: Any) -> Ref:
    rows, cols = (Sliding(extent, extent) for extent in kernel)
    return _record(tracer, ref, like, Access(rows, cols), target, (kernel, kernel, option))


def _unequal(tracer: Tracer, ref: Ref, like: Tensor, axes: Windows, target: Any) -> Ref:
    return _record(tracer, ref, like, Access(*axes), target, (axes,), positional=True)


def _record(
    tracer: Tracer,
    ref: Ref,
    like: Tensor,
    access: Access,
    target: Any,
    args: Any,
    *,
    positional: bool = False,
) -> Ref:
    axes = tracer.axes(ref)
    assert axes is not None
    return tracer.local(
        target,
        (ref, *args),
        like=like,
        axes=axes,
        accesses={ref.name: access},
        positional=positional,
        heavy=True,
    )


def window_means(x: Tensor, axes: Windows, *, out: Region, origin: Region) -> Tensor:
    """Means of the windows ``out``, from ``x`` (..., h, w) which covers ``origin`` of the map.

    Each is a sum divided by a count, as weights of 1 / count need not add up to 1.
    """
    taps = (_members(axes[0]), _members(axes[1]))
    means = gather_unrounded(x, taps, (x.dim() - 2, x.dim() - 1), out=out, origin=origin)
    rows, cols = (
        numbers(window_sizes(axis)[wanted.start : wanted.stop], means.dtype, beside=means)
        for axis, wanted in zip(axes, out, strict=True)
    )
    return means.div_(rows[:, None]).div_(cols).to(x.dtype)


def window_maxima(x: Tensor, axes: Windows, *, out: Region, origin: Region) -> Tensor:
    """Maxima of the windows ``out``, from ``x`` (..., h, w) which covers ``origin`` of the map.

    Among equal maxima, the gradient goes to the first in row order.
    """
    row, col = _largest(x, axes, out, origin)
    values = x.flatten(-2).gather(-1, (row * x.shape[-1] + col).flatten(-2))
    return values.view(row.shape)


def window_places(x: Tensor, axes: Windows, *, out: Region, origin: Region) -> Tensor:
    """Indices in the whole map, in row order, of the maxima that :func:`window_maxima` finds."""
    row, col = _largest(x, axes, out, origin)
    return row.add_(origin.rows.start).mul_(axes[1].size).add_(col).add_(origin.cols.start)


def _largest(x: Tensor, axes: Windows, out: Region, origin: Region) -> tuple[Tensor, Tensor]:
    """Row and column in ``x`` of the largest value of each of the windows ``out``."""
    rows, cols = (
        [axis.window(Interval(i, i + 1)).shift(-at_hand.start) for i in range(wanted.start, wanted.stop)]
        for axis, wanted, at_hand in zip(axes, out, origin, strict=True)
    )
    _, row, col = largest_in(x, rows, cols)
    return row, col


def _maxima_workspace(nbytes: CallBytes) -> int:
    """A dense operand; the values between the two axes, with 32-bit places; three indices for each result.

    The values between the axes are no more than operand or result, unless rows shrink and columns grow.
    """
    between = max(nbytes.operands, nbytes.result)
    places = (4 * between + 3 * INDEX_BYTES * nbytes.result) // nbytes.itemsize
    return nbytes.operands + nbytes.result + between + places


def _saved_places(operation: Operation) -> int:
    return INDEX_BYTES * operation.numel


declare(window_means, cost=cost_of(gather_positions))
declare(
    window_maxima,
    cost=Cost(
        operations=windows,
        workspace=_maxima_workspace,
        backward_workspace=lambda nbytes: 0,
        saves=Saves(beside=_saved_places),
    ),
)
declare(window_places, cost=Cost(operations=windows, workspace=_maxima_workspace, saves=NOTHING))


@lru_cache(256)
def _members(axis: Adaptive) -> Taps:
    """The sum over each window as a weighted sum of positions, with weight 0 beyond the window's end."""
    places, sizes = _places(axis), window_sizes(axis)
    weights = (tuple(float(tap < size) for size in sizes) for tap in range(len(places)))
    return Taps(places, tuple(weights), tuple(sizes))


@lru_cache(256)
def _places(axis: Adaptive) -> tuple[tuple[int, ...], ...]:
    """The first position of every window, the second, and so on; shorter windows repeat their last one."""
    each = [axis.window(Interval(i, i + 1)) for i in range(axis.count)]
    longest = max(window.size for window in each)
    return tuple(tuple(min(window.start + tap, window.stop - 1) for window in each) for tap in range(longest))


class _Pyramid(nn.Module):
    """Pyramid pooling as in PSPNet, with each level as a gate on the map."""

    def forward(self, x: Tensor) -> Tensor:
        levels = [nn.functional.adaptive_avg_pool2d(x, size) for size in (1, 2, 3, 6, (5, 1))]
        peaks, _ = nn.functional.adaptive_max_pool2d(x, (3, 7), return_indices=True)
        summary = torch.cat([level.square().mean((2, 3), keepdim=True) for level in (*levels, peaks)], 1)
        return x * summary.mean(1, keepdim=True)


SAMPLES = (
    Sample("adaptive pooling to few positions", lambda: chain(nn.Conv2d(3, 4, 3), _Pyramid())),
    Sample(
        "adaptive average pooling to many positions",
        lambda: chain(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d((17, 9)), nn.AdaptiveAvgPool2d((20, 31))),
    ),
    Sample(
        "adaptive max pooling to many positions",
        lambda: chain(nn.Conv2d(3, 4, 3), nn.AdaptiveMaxPool2d((50, 9)), nn.AdaptiveMaxPool2d((25, 20))),
    ),
    Sample(
        "adaptive pooling by equal windows",
        lambda: chain(
            nn.Conv2d(3, 4, 4), nn.AdaptiveAvgPool2d((20, 34)), nn.AdaptiveMaxPool2d((10, 17)), nn.Tanh()
        ),
    ),
)
