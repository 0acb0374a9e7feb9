"""Operators along an axis that is named: if it is no spatial one, each position is worked out by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from streamcnn.graph.costs import RESULT, Cost, declare
from streamcnn.graph.ops.convolution import chain
from streamcnn.graph.ops.pointwise import per_position, pointwise
from streamcnn.graph.ops.reduction_types import statistics_dtype
from streamcnn.graph.ops.reductions import extremum, mean_or_sum
from streamcnn.graph.ops.rules import Call, NotStreamable, Sample, Tracer, rule
from streamcnn.graph.program import Ref, refs_in

aten = torch.ops.aten

_ALONG_DIM = (
    aten.all.dim,
    aten.all.dims,
    aten.any.dim,
    aten.any.dims,
    aten.argmax.default,
    aten.argmin.default,
    aten.argsort.default,
    aten.argsort.stable,
    aten.count_nonzero.dim_IntList,
    aten.cummax.default,
    aten.cummin.default,
    aten.cumprod.default,
    aten.cumsum.default,
    aten.diff.default,
    aten.glu.default,
    aten.index_select.default,
    aten.kthvalue.default,
    aten.log_softmax.int,
    aten.logcumsumexp.default,
    aten.logsumexp.default,
    aten.max.dim,
    aten.median.dim,
    aten.min.dim,
    aten.mode.default,
    aten.nanmedian.dim,
    aten.nanmean.default,
    aten.nansum.default,
    aten.prod.dim_int,
    aten.softmax.int,
    aten.sort.default,
    aten.sort.stable,
    aten.topk.default,
)
"""Operators whose argument ``dim`` holds the axis or the axes."""


@rule(*_ALONG_DIM)
def along_axis(tracer: Tracer, call: Call) -> Any:
    """An operator along axes that are not spatial; each of its results is an operation of its own."""
    ref = call.args[0]
    axes, shape = tracer.axes(ref), tracer.spec(ref).shape
    dims = call.bind("dim")[0]
    dims = [dims] if isinstance(dims, int) else dims
    others = refs_in((call.args[1:], dict(call.kwargs)))
    if axes is None or any(_is_apart(tracer, ref, Ref(name)) for name in others):
        return NotStreamable("its operands have their spatial axes at different places")
    if call.target in SHARES and dims[0] % len(shape) in axes:
        return shares(tracer, call.target, ref, dims, tracer.fake(call).dtype)
    if not dims or any(dim % len(shape) in axes for dim in dims):
        return NotStreamable("it runs along a spatial axis")
    likes = tracer.fake(call)
    if isinstance(likes, Tensor):
        return per_position(tracer, call, ref, dropped=dims)
    parts = (Call(result_of, (call.target, index, *call.args), call.kwargs) for index in range(len(likes)))
    return tuple(per_position(tracer, part, ref, dropped=dims) for part in parts)


SHARES = (aten.softmax.int, aten.log_softmax.int)
"""Operators whose results along an axis, or their exponentials, have the sum one."""


def shares(tracer: Tracer, target: object, ref: Ref, dims: Sequence[int], dtype: torch.dtype) -> Any:
    """Softmax or its logarithm over axes of space, and any others: its maximum and its sum are reductions."""

    def made(name: Any, *args: Any) -> Any:
        return pointwise(tracer, Call(name, args, {}))

    within = statistics_dtype(dtype)
    x = ref if tracer.spec(ref).dtype == within else made(aten.to.dtype, ref, within)
    # The largest value makes no difference to the result, so that it needs no gradient.
    top = tracer.global_value(
        aten.detach.default, extremum(tracer, Call(aten.amax.default, (x, dims, True), {}))
    )
    lowered = made(aten.sub.Tensor, x, top)
    exponential = made(aten.exp.default, lowered)
    total = mean_or_sum(tracer, Call(aten.sum.dim_IntList, (exponential, dims, True), {}))
    if target is aten.softmax.int:
        result = made(aten.div.Tensor, exponential, total)
    else:
        result = made(aten.sub.Tensor, lowered, tracer.global_value(aten.log.default, total))
    return result if dtype == within else made(aten.to.dtype, result, dtype)


def _is_apart(tracer: Tracer, ref: Ref, other: Ref) -> bool:
    """Whether another operand has positions, and not those of ``ref``."""
    axes, shape = tracer.axes(ref), tracer.spec(other).shape
    if tracer.axes(other) is None:
        return len(shape) > 1
    assert axes is not None
    return tracer.axes(other) != axes or any(shape[axis] != tracer.spec(ref).shape[axis] for axis in axes)


def result_of(target: Callable[..., Any], index: int, *args: Any, **kwargs: Any) -> Tensor:
    """One of an operator's results."""
    result: Tensor = target(*args, **kwargs)[index]
    return result


declare(aten.softmax, aten._softmax, aten.log_softmax, cost=Cost(saves=RESULT))


class _Chosen(nn.Module):
    """The largest channels of each position, in order, and what they are taken from elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        largest, order = x.topk(3, 1)
        taken = x.sin().gather(1, order) * largest.softmax(1)
        ranked = torch.sort(x, dim=1, descending=True, stable=True).values.cumsum(1).roll(2, 1)
        return torch.cat((taken, ranked, x.median(1, keepdim=True).values), 1) * x.max(1).indices[:, None]


class _Shares(nn.Module):
    """How much of a map lies at each position, and at each row."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.softmax(2) * x.log_softmax(-1)
        gates = x.mean(1, keepdim=True).flatten(1).softmax(1).view(-1, 1, *x.shape[2:])
        return (x * gates).sum((2, 3)) + rows.square().mean((2, 3))


SAMPLES = (
    Sample("softmax over positions", lambda: nn.Sequential(nn.Conv2d(3, 5, 3), _Shares())),
    Sample("the largest channels", lambda: chain(nn.Conv2d(3, 5, 3), _Chosen())),
)
