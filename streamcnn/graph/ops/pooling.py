"""Max and average pooling, with ceil mode, dilation and both divisor rules."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from streamcnn.geometry.axis_maps import Broadcast, Same, Sliding, Transposed
from streamcnn.geometry.regions import Region
from streamcnn.geometry.windows import layout, placed
from streamcnn.graph.costs import (
    INDEX_BYTES,
    NOTHING,
    OPERANDS,
    Cost,
    Operation,
    Saves,
    declare,
    elements,
    windows,
)
from streamcnn.graph.ops.constants import brought
from streamcnn.graph.ops.pointwise import cast, per_position
from streamcnn.graph.ops.reduction_types import statistics_dtype
from streamcnn.graph.ops.rules import Call, NotStreamable, Pair, Sample, Tracer, as_pair, as_triple, rule
from streamcnn.graph.ops.samples import chain
from streamcnn.graph.program import Access, Ref

aten = torch.ops.aten
# Whatever the user puts in its place later.
_AVG_POOL = torch.nn.functional.avg_pool2d


@rule(aten.max_pool2d.default)
def max_pool2d(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """Max pooling; positions outside the map count as minus infinity."""
    if tracer.axes(call.args[0]) != (2, 3):
        return NotStreamable("it is not applied to a map of shape (N, C, H, W)")
    return _max_pooled(tracer, call, tracer.fake(call))


def _max_pooled(tracer: Tracer, call: Call, like: Tensor) -> Ref:
    ref, kernel, stride, padding, dilation = _pooling_windows(call)
    return tracer.local(
        max_pool,
        (ref, kernel, stride, dilation),
        like=like,
        axes=(2, 3),
        accesses={ref.name: _sliding(kernel, stride, padding, dilation)},
        fill=-math.inf,
        heavy=True,
    )


def _pooling_windows(call: Call) -> tuple[Ref, Pair, Pair, Pair, Pair]:
    """The operand, kernel, stride, padding and dilation of max pooling."""
    ref, kernel, stride, padding, dilation = call.bind("self", "kernel_size", "stride", "padding", "dilation")
    return ref, as_pair(kernel), as_pair(stride or kernel), as_pair(padding), as_pair(dilation)


def _sliding(*windows: Pair) -> Access:
    rows, cols = (Sliding(*axis) for axis in zip(*windows, strict=True))
    return Access(rows, cols)


@rule(aten.max_pool2d_with_indices.default)
def max_pool2d_with_indices(tracer: Tracer, call: Call) -> tuple[Ref, Ref] | NotStreamable:
    """Max pooling with the indices of the maxima in each plane."""
    if tracer.axes(call.args[0]) != (2, 3):
        return NotStreamable("it is not applied to a map of shape (N, C, H, W)")
    ref, *windows = _pooling_windows(call)
    values, places = tracer.fake(call)
    found = tracer.local(
        places_of_maxima,
        (ref, tuple(tracer.spec(ref).shape[2:]), *windows),
        like=places,
        axes=(2, 3),
        accesses={ref.name: _sliding(*windows)},
        fill=-math.inf,
        positional=True,
        heavy=True,
    )
    return _max_pooled(tracer, call, values), found


def places_of_maxima(
    x: Tensor,
    size: Pair,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    *,
    out: Region,
    origin: Region,
) -> Tensor:
    """Indices of the maxima in planes of ``size``, in row order; ``x`` is padded with minus infinity."""
    found = aten.max_pool2d_with_indices(x.detach(), kernel, stride, 0, dilation)[1]
    rows, cols = found // x.shape[3], found % x.shape[3]
    rows, cols = (
        _inside(each + interval.start * s - p, d)
        for each, interval, s, p, d in zip((rows, cols), out, stride, padding, dilation, strict=True)
    )
    return rows * size[1] + cols


def _inside(places: Tensor, dilation: int) -> Tensor:
    """Move a place before the map to its window's first place in the map: all of it is minus infinity."""
    return torch.where(places < 0, places % dilation, places)


@rule(aten.max_unpool2d.default)
def max_unpool2d(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """Values put back at the positions of max pooling's maxima."""
    ref, places, size = call.bind("self", "indices", "output_size")
    made = tracer.recorded(places)
    if made is None or made.target is not places_of_maxima or tracer.axes(ref) != (2, 3):
        return NotStreamable("its places are not as max pooling gave them")
    _, pooled, kernel, stride, padding, dilation = made.args
    if tuple(size) != pooled:
        return NotStreamable("its places are those of another size")
    if any(d * (k - 1) >= s for k, s, d in zip(kernel, stride, dilation, strict=True)):
        return NotStreamable("its windows overlap")
    rows, cols = (Transposed(*axis) for axis in zip(kernel, stride, padding, dilation, strict=True))
    return tracer.local(
        unpooled,
        (ref, places, *made.args[1:]),
        like=tracer.fake(call),
        axes=(2, 3),
        accesses={ref.name: Access(rows, cols), places.name: Access(rows, cols)},
        positional=True,
        heavy=True,
    )


def unpooled(
    x: Tensor,
    places: Tensor,
    size: Pair,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    *,
    out: Region,
    origin: Region,
) -> Tensor:
    """Positions ``out`` of a map that has ``x`` (N, C, h, w), which covers ``origin``, at ``places``."""
    reach = Region(
        *(
            Transposed(*axis).result(interval, interval)
            for interval, *axis in zip(origin, kernel, stride, padding, dilation, strict=True)
        )
    )
    rows, cols = places // size[1] - reach.rows.start, places % size[1] - reach.cols.start
    within = (rows * reach.cols.size + cols).flatten(2)
    planes = x.new_zeros((*x.shape[:2], reach.rows.size * reach.cols.size))
    values = planes.scatter(2, within, x.flatten(2)).reshape(*x.shape[:2], *reach.size)
    return placed(values, (2, 3), reach, out)


def max_pool(
    x: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
) -> Tensor:
    """Max pooling of a window ``x`` (N, C, h, w) with minus infinity around it."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or layout(x) is torch.channels_last:
        return torch.max_pool2d(x, kernel, stride, padding, dilation)
    result: Tensor = _MaxPool.apply(x.contiguous(), kernel, stride, padding, dilation)  # type: ignore[no-untyped-call]
    return result


class _MaxPool(torch.autograd.Function):
    """Max pooling on a CPU by ATen's vectorised kernel for channels last.

    For 32 MiB with 64 channels on two cores, the kernel for contiguous operands takes 35 ms, this one 2 ms,
    and 14 ms with the reordering of operand and result. Backward there is no such difference, and a gradient
    in another memory format than the values would cost more than this gains.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *window: tuple[int, int]) -> Tensor:
        result, index = aten.max_pool2d_with_indices(_channels_last(x), *window)
        ctx.window = window
        ctx.save_for_backward(x, _channels_first(index))
        return _channels_first(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, index = ctx.saved_tensors
        gradient = aten.max_pool2d_with_indices_backward(grads[0].contiguous(), x, *ctx.window, False, index)
        return gradient, None, None, None, None


def _channels_last(x: Tensor) -> Tensor:
    """A contiguous ``x`` (N, C, h, w) as a copy in channels last."""
    result = torch.empty_like(x, memory_format=torch.channels_last)
    for to, each in zip(result, x, strict=True):
        # ATen transposes matrices block by block, but other operands element by element.
        to.permute(1, 2, 0).flatten(0, 1).copy_(each.flatten(1).t())
    return result


def _channels_first(x: Tensor) -> Tensor:
    """A contiguous copy of ``x`` (N, C, h, w), which is in channels last."""
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    for to, each in zip(result, x, strict=True):
        to.flatten(1).copy_(each.permute(1, 2, 0).flatten(0, 1).t())
    return result


def _places(operation: Operation) -> int:
    """Bytes of the indices of the maxima, unless the operator returns them as a result."""
    return INDEX_BYTES * operation.numel if len(operation.results) == 1 else 0


declare(
    max_pool,
    # On a CPU, operand, result and indices in another memory format, and the indices twice.
    cost=Cost(
        operations=windows,
        workspace=lambda nbytes: (
            nbytes.operands + nbytes.result + 2 * INDEX_BYTES * nbytes.result // nbytes.itemsize
        ),
        backward_workspace=lambda nbytes: 0,
        saves=Saves(operands=True, beside=_places),
        pads=True,
    ),
)
declare(
    places_of_maxima,
    # The maxima, their indices in the tile, rows and columns, and these twice.
    cost=Cost(operations=windows, workspace=lambda nbytes: 6 * nbytes.result, saves=NOTHING, makes_new=True),
)
declare(
    unpooled,
    # Places within the tile, as rows, columns and indices; zeros, and the result written into them.
    cost=Cost(
        operations=elements,
        workspace=lambda nbytes: 3 * nbytes.operands + 2 * nbytes.result,
        saves=Saves(beside=lambda operation: INDEX_BYTES * int(operation.args[0].tensor.numel)),
    ),
)
declare(aten.max_pool1d, aten.max_pool2d, aten.max_pool3d, cost=Cost(saves=replace(OPERANDS, beside=_places)))


@rule(aten.avg_pool2d.default)
def avg_pool2d(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """Average pooling: sums of windows, then a divisor per row and per column."""
    ref, kernel, stride, padding, ceil_mode, count_padding, divisor = call.bind(
        "self", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"
    )
    if tracer.axes(ref) != (2, 3):
        return NotStreamable("it is not applied to a map of shape (N, C, H, W)")
    like = tracer.fake(call)
    kernel, padding = as_pair(kernel), as_pair(padding)
    stride = as_pair(stride or kernel)
    axis_maps = [Sliding(k, s, p) for k, s, p in zip(kernel, stride, padding, strict=True)]
    uniform = divisor is not None or (not ceil_mode and (count_padding or padding == (0, 0)))
    if not uniform:
        # Sums of half precision may exceed its range, and would be rounded before the division.
        ref = cast(tracer, ref, statistics_dtype(like.dtype))
        like = like.to(tracer.spec(ref).dtype)
    pooled = tracer.local(
        avg_pool,
        (ref, kernel, stride, divisor if uniform else 1),
        like=like,
        axes=(2, 3),
        accesses={ref.name: Access(*axis_maps)},
        fill=0.0,
        heavy=True,
    )
    if uniform:
        return pooled
    for axis in (0, 1):
        size = tracer.spec(ref).shape[axis + 2]
        counts = _window_counts(axis_maps[axis], like.shape[axis + 2], size, count_padding)
        shape = (1, 1, -1, 1) if axis == 0 else (1, 1, 1, -1)
        counted = tracer.global_value(
            _numbers, tuple(counts), shape, dtype=like.dtype, device=torch.device(like.device)
        )
        mapped = tracer.promote(counted, (2, 3))
        accesses = {pooled.name: Access(), mapped.name: _only(axis)}
        pooled = tracer.local(aten.div.Tensor, (pooled, mapped), like=like, axes=(2, 3), accesses=accesses)
    result: Ref = cast(tracer, pooled, tracer.fake(call).dtype)
    return result


@rule(aten.avg_pool3d.default, aten.max_pool3d.default)
def pool_channels(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """Pooling only over the axis before the spatial ones, as in local response norm."""
    ref, kernel, stride, padding = call.bind("self", "kernel_size", "stride", "padding")
    ndim = len(tracer.spec(ref).shape)
    windows = (kernel, stride or kernel, padding)
    if tracer.axes(ref) != (ndim - 2, ndim - 1) or any(
        tuple(as_triple(each)[1:]) != (fixed, fixed) for each, fixed in zip(windows, (1, 1, 0), strict=True)
    ):
        return NotStreamable("its windows reach along a spatial axis")
    return per_position(tracer, call, ref)


def avg_pool(x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], divisor: int | None) -> Tensor:
    """Unpadded average pooling of a window ``x`` (N, C, h, w)."""
    return _AVG_POOL(x, kernel, stride, divisor_override=divisor)


declare(avg_pool, aten.avg_pool3d, cost=Cost(operations=windows))


def _window_counts(axis_map: Sliding, num_out: int, size: int, count_padding: bool) -> list[int]:
    """Positions that each window along one axis counts, by ATen's rule."""
    counts = []
    for index in range(num_out):
        first = index * axis_map.stride - axis_map.padding
        last = min(first + axis_map.kernel, size + axis_map.padding)
        counts.append(last - first if count_padding else min(last, size) - max(first, 0))
    return counts


def _numbers(
    counts: tuple[int, ...], shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    return brought(torch.tensor(counts, dtype=dtype).reshape(shape), device)


def _only(axis: int) -> Access:
    """The access that reads along one spatial axis and broadcasts along the other."""
    return Access(Same(), Broadcast()) if axis == 0 else Access(Broadcast(), Same())


class _Unpooled(nn.Module):
    """Pooled maxima, changed and put back, as in SegNet."""

    def forward(self, x: Tensor) -> Tensor:
        y, places = nn.functional.max_pool2d(x, 2, padding=1, ceil_mode=True, return_indices=True)
        y, coarser = nn.functional.max_pool2d(y.sin(), (1, 2), (2, 3), return_indices=True)
        y = nn.functional.max_unpool2d(y.cos(), coarser, (1, 2), (2, 3), output_size=places.shape[2:])
        return x * nn.functional.max_unpool2d(y + 1, places, (2, 2), padding=(1, 1), output_size=x.shape[2:])


SAMPLES = (
    Sample("unpooling", lambda: chain(nn.Conv2d(3, 4, 3), _Unpooled())),
    Sample(
        "max pooling: ceil mode, dilation, padding",
        lambda: chain(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.MaxPool2d(3, 2, 1, ceil_mode=True),
            nn.MaxPool2d((2, 3), (1, 2), (1, 1), dilation=(2, 1)),
        ),
    ),
    *(
        Sample(
            f"average pooling: ceil mode {ceil}, count padding {count}",
            lambda ceil=ceil, count=count: chain(  # type: ignore[misc]
                nn.Conv2d(3, 4, 3, padding=1),
                nn.AvgPool2d((3, 2), 2, (1, 0), ceil_mode=ceil, count_include_pad=count),
                nn.AvgPool2d(3, 1, 1, ceil_mode=ceil, count_include_pad=count),
            ),
        )
        for ceil in (False, True)
        for count in (False, True)
    ),
    Sample("local response norm", lambda: chain(nn.Conv2d(3, 7, 3), nn.LocalResponseNorm(3, 2.0, 0.5, 0.3))),
    Sample(
        "average pooling: own divisor",
        lambda: chain(nn.Conv2d(3, 4, 3), nn.AvgPool2d(3, 2, 1, divisor_override=7)),
    ),
)
