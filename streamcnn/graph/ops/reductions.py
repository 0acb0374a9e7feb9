"""Operators that reduce a map over space: means, sums, maxima, norms, variances."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from streamcnn.graph.costs import NOTHING, Cost, declare
from streamcnn.graph.ops.moments import Moments
from streamcnn.graph.ops.pointwise import cast, per_position, pointwise
from streamcnn.graph.ops.reduction_types import (
    AlongOneAxis,
    Extremum,
    Placeable,
    Sum,
    VectorNorm,
    statistics_dtype,
)
from streamcnn.graph.ops.rules import Call, NotStreamable, Sample, Tracer, rule
from streamcnn.graph.ops.samples import chain
from streamcnn.graph.program import Ref

aten = torch.ops.aten


def spatial_dims(tracer: Tracer, ref: Ref, dims: Sequence[int] | None) -> tuple[int, ...] | None:
    """The reduced dims if they hold a spatial axis, else ``None``."""
    ndim = len(tracer.spec(ref).shape)
    axes = tracer.axes(ref)
    assert axes is not None
    chosen = tuple(sorted(dim % ndim for dim in dims)) if dims else tuple(range(ndim))
    return None if set(axes).isdisjoint(chosen) else chosen


def _reduce_or_local(
    tracer: Tracer,
    call: Call,
    dims: Sequence[int] | None,
    keepdim: bool,
    build: Callable[[tuple[int, ...], tuple[int, ...], bool], Placeable],
) -> Any:
    ref = call.args[0]
    chosen = spatial_dims(tracer, ref, dims)
    if chosen is None:
        assert dims is not None
        return per_position(tracer, call, ref, dropped=dims)
    return reduced(tracer, ref, build(tracer.spec(ref).shape, chosen, keepdim))


def reduced(tracer: Tracer, ref: Ref, reduction: Placeable) -> Any:
    """Record a reduction over one spatial axis or both."""
    axes = tracer.axes(ref)
    assert axes is not None
    over_both = set(axes) <= set(reduction.dims)
    return tracer.reduce(reduction if over_both else AlongOneAxis.of(reduction, axes), ref)


@rule(aten.mean.dim, aten.mean.default, aten.sum.dim_IntList, aten.sum.default)
def mean_or_sum(tracer: Tracer, call: Call) -> Any:
    """Mean or sum over spatial axes and any others."""
    everything = call.target in (aten.mean.default, aten.sum.default)
    dims, keepdim = (None, False) if everything else call.bind("dim", "keepdim")
    average = call.target in (aten.mean.default, aten.mean.dim)

    def build(shape: tuple[int, ...], chosen: tuple[int, ...], keep: bool) -> Placeable:
        return Sum(shape, chosen, keep, math.prod(shape[dim] for dim in chosen) if average else 1)

    like = tracer.fake(call)
    if like.dtype != tracer.spec(call.args[0]).dtype:
        # A sum of integers or of a mask is an integer, unless dtype= says otherwise.
        counted = pointwise(tracer, Call(aten.to.dtype, (call.args[0], like.dtype), {}))
        call = Call(call.target, (counted, *call.args[1:]), call.kwargs)
    result = _reduce_or_local(tracer, call, dims, keepdim, build)
    return result[0] if isinstance(result, tuple) else result


declare(
    *(aten.mean, aten.sum),
    cost=Cost(
        workspace=lambda nbytes: 2 * (nbytes.operands + nbytes.result) * nbytes.is_half,
        backward_workspace=lambda nbytes: 0,
        saves=NOTHING,
    ),
)
declare(
    *(aten.amax, aten.amin),
    # A byte for each value, whether it is the largest, and 64 bits where these are counted.
    cost=Cost(backward_workspace=lambda nbytes: 9 * nbytes.operands // nbytes.itemsize),
)
declare(
    *(aten.linalg_vector_norm, aten.var, aten.std),
    cost=Cost(backward_workspace=lambda nbytes: nbytes.operands + 2 * nbytes.result),
)


@rule(aten.amax.default, aten.amin.default, aten.max.default, aten.min.default)
def extremum(tracer: Tracer, call: Call) -> Any:
    """Largest or smallest value over spatial axes and any others."""
    everything = call.target in (aten.max.default, aten.min.default)
    dims, keepdim = (None, False) if everything else call.bind("dim", "keepdim")
    sign = 1 if call.target in (aten.amax.default, aten.max.default) else -1
    result = _reduce_or_local(
        tracer, call, dims, keepdim, lambda shape, chosen, keep: Extremum(shape, chosen, keep, sign)
    )
    return result[0] if isinstance(result, tuple) else result


@rule(aten.any.default, aten.any.dim, aten.any.dims, aten.all.default, aten.all.dim, aten.all.dims)
def truth(tracer: Tracer, call: Call) -> Any:
    """``any`` and ``all``: whether any value, or every value, is not zero."""
    everything = call.target in (aten.any.default, aten.all.default)
    dims, keepdim = (None, False) if everything else call.bind("dim", "keepdim")
    dims = [dims] if isinstance(dims, int) else dims
    ref = call.args[0]
    if dims == [] and not everything:
        # Here no axes mean none, unlike in a sum.
        return pointwise(tracer, call)
    if spatial_dims(tracer, ref, dims) is None:
        return per_position(tracer, call, ref, dropped=dims or ())
    numbers = pointwise(tracer, Call(is_true, (ref,), {}))
    target = aten.amax.default if call.target in _ANY else aten.amin.default
    found = extremum(tracer, Call(target, (numbers, dims or [], keepdim), {}))
    return tracer.global_value(aten.to.dtype, found, tracer.fake(call).dtype)


_ANY = (aten.any.default, aten.any.dim, aten.any.dims)


def is_true(x: Tensor) -> Tensor:
    """1 for every value that is not zero, else 0, as uint8."""
    return (x != 0).to(torch.uint8)


@rule(aten.count_nonzero.default, aten.count_nonzero.dim_IntList)
def count(tracer: Tracer, call: Call) -> Any:
    """``count_nonzero``: the number of values that are not zero."""
    dims = call.bind("dim")[0]
    dims = [dims] if isinstance(dims, int) else dims
    if spatial_dims(tracer, call.args[0], dims) is None:
        return per_position(tracer, call, call.args[0], dropped=dims or ())
    counted = pointwise(tracer, Call(aten.ne.Scalar, (call.args[0], 0), {}))
    return mean_or_sum(tracer, Call(aten.sum.dim_IntList, (counted, dims or [], False), {}))


declare(is_true, cost=Cost(saves=NOTHING, detaches=True))


@rule(aten.linalg_vector_norm.default)
def vector_norm(tracer: Tracer, call: Call) -> Any:
    """The p-norm over spatial axes and any others."""
    power, dims, keepdim, dtype = call.bind("ord", "dim", "keepdim", "dtype")
    if dtype is None and math.isinf(power):
        sizes = pointwise(tracer, Call(aten.abs.default, (call.args[0],), {}))
        target = aten.amax.default if power > 0 else aten.amin.default
        return extremum(tracer, Call(target, (sizes, dims or [], keepdim), {}))
    if dtype is not None or power < 1:
        return NotStreamable(
            f"norms with dtype= or of order {power} are not streamed: allowed are orders >= 1 and -inf"
        )
    result = _reduce_or_local(
        tracer, call, dims, keepdim, lambda shape, chosen, keep: VectorNorm(shape, chosen, keep, power)
    )
    return result[0] if isinstance(result, tuple) else result


@rule(
    aten.var.correction,
    aten.var.dim,
    aten.var.default,
    aten.std.correction,
    aten.std.dim,
    aten.std.default,
    aten.var_mean.correction,
    aten.var_mean.dim,
    aten.var_mean.default,
    aten.std_mean.correction,
    aten.std_mean.dim,
    aten.std_mean.default,
)
def variance(tracer: Tracer, call: Call) -> Any:
    """Variance or standard deviation, with the mean if asked for, over spatial axes and any others."""
    name = str(call.target)
    dims = None if name.endswith("default") else call.bind("dim")[0]
    keepdim = False if name.endswith("default") else call.bind("keepdim")[0]
    chosen = spatial_dims(tracer, call.args[0], dims)
    if chosen is None and "_mean" not in name:
        assert dims is not None
        return per_position(tracer, call, call.args[0], dropped=dims)
    if chosen is None:
        return NotStreamable("it returns several tensors per position")
    shape = tracer.spec(call.args[0]).shape
    if set(tracer.axes(call.args[0]) or ()) <= set(chosen):
        mean, biased = tracer.reduce(Moments(shape, chosen, keepdim), call.args[0])
    else:
        mean, biased = _moments_of_lines(tracer, call.args[0], chosen, keepdim)
    count = math.prod(shape[dim] for dim in chosen)
    result = tracer.global_value(torch.mul, biased, count / max(count - _correction(call, name), 0))
    if "std" in name:
        result = tracer.global_value(deviation, result)
    likes = tracer.fake(call)
    if "_mean" not in name:
        return _rounded(tracer, result, likes)
    return tuple(_rounded(tracer, *each) for each in zip((result, mean), likes, strict=True))


def _moments_of_lines(tracer: Tracer, ref: Ref, dims: tuple[int, ...], keepdim: bool) -> tuple[Ref, Ref]:
    """The mean and the mean square deviation over axes of which one is spatial."""
    x = cast(tracer, ref, statistics_dtype(tracer.spec(ref).dtype))
    mean = mean_or_sum(tracer, Call(aten.mean.dim, (x, dims, True), {}))
    deviations = pointwise(tracer, Call(aten.sub.Tensor, (x, mean), {}))
    squares = pointwise(tracer, Call(aten.square.default, (deviations,), {}))
    biased = mean_or_sum(tracer, Call(aten.mean.dim, (squares, dims, keepdim), {}))
    kept = tracer.spec(biased).shape
    return tracer.global_value(aten.reshape.default, mean, kept), biased


def _rounded(tracer: Tracer, ref: Ref, like: Tensor) -> Ref:
    """A statistic in the dtype of ATen's result: half precision if the map is."""
    if tracer.spec(ref).dtype == like.dtype:
        return ref
    cast: Ref = tracer.global_value(aten.to.dtype, ref, like.dtype)
    return cast


def deviation(variance: Tensor) -> Tensor:
    """The standard deviation. Where it is 0 so is its gradient, as in ATen, though the root's is infinite."""
    is_zero = variance == 0
    return variance.masked_fill(is_zero, 1).sqrt().masked_fill(is_zero, 0)


def _correction(call: Call, name: str) -> float:
    if name.endswith("correction"):
        value = call.bind("correction")[0]
        return 1.0 if value is None else float(value)
    return float(bool(call.bind("unbiased")[0]))


class _Reductions(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        gate = torch.sigmoid(x.mean((2, 3), keepdim=True))
        x = x * gate + x.amax((-1, -2), keepdim=True) * x.mean(1, keepdim=True)
        x = x / (1 + torch.linalg.vector_norm(x, 2, (2, 3), keepdim=True)) * x.numel()
        deviation, mean = torch.std_mean(x, (0, 2, 3), keepdim=True)
        x = (x - mean) / deviation
        peak = nn.functional.adaptive_max_pool2d(x.sin(), 1).flatten(1)
        norm = torch.linalg.vector_norm(x, 3.0, (1, 2, 3))
        pooled = nn.functional.adaptive_avg_pool2d(x * x.amin((2, 3), keepdim=True), 1).flatten(1)
        return peak, norm, pooled, x.var((2, 3)), (x * x).sum()


class _Strips(nn.Module):
    """Coordinate attention, also with other reductions."""

    def forward(self, x: Tensor) -> Tensor:
        _, c, h, w = x.shape
        strips = torch.cat((x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)), 2)
        rows, cols = torch.split(strips.tanh(), [h, w], 2)
        x = x * rows.sigmoid() * cols.transpose(2, 3).sigmoid()
        x = x + x.amax((1, 2), keepdim=True) * x.amin(3)[..., None]
        norms: Tensor = torch.linalg.vector_norm(x, 3.0, 2, keepdim=True)
        return x * norms + x.sum((0, 3)).view(c, h, 1)


SAMPLES = (
    Sample("means, maxima, norms, deviations", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), _Reductions())),
    Sample("sums over rows and columns", lambda: chain(nn.Conv2d(3, 4, 3), _Strips())),
)
