"""Operators along a given axis. If it is not a spatial one, each position is computed by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from streamcnn.geometry.axis_maps import Adaptive, AxisMap, Line, Same, Sliding
from streamcnn.graph.costs import INDEX_BYTES, NOTHING, RESULT, Cost, Operation, Saves, declare
from streamcnn.graph.ops.chosen_lines import lines_at
from streamcnn.graph.ops.pointwise import per_position, pointwise
from streamcnn.graph.ops.reduction_types import Selection, statistics_dtype
from streamcnn.graph.ops.reductions import extremum, mean_or_sum, truth
from streamcnn.graph.ops.rules import Call, NotStreamable, Sample, Tracer, rule
from streamcnn.graph.ops.samples import chain
from streamcnn.graph.ops.top_positions import TopPositions
from streamcnn.graph.ops.window_reductions import WindowMaxima
from streamcnn.graph.program import Access, Ref, refs_in
from streamcnn.graph.schemas import takes

aten = torch.ops.aten

_ALONG_DIM = (
    aten.argmax.default,
    aten.argmin.default,
    aten.argsort.default,
    aten.argsort.stable,
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
    """An operator along axes that are not spatial; each of its results is a node of its own."""
    ref = call.args[0]
    axes, shape = tracer.axes(ref), tracer.spec(ref).shape
    dims = call.bind("dim")[0]
    dims = [dims] if isinstance(dims, int) else dims or []
    others = refs_in((call.args[1:], dict(call.kwargs)))
    if axes is None or any(_is_apart(tracer, ref, Ref(name)) for name in others):
        return NotStreamable("its operands have their spatial axes at different places")
    if call.target in EXPONENTIAL and any(dim % len(shape) in axes for dim in dims):
        return exponential(tracer, call.target, ref, dims, tracer.fake(call))
    likes = tracer.fake(call)
    if len(dims) == 1 and dims[0] % len(shape) in axes:
        return _along_lines(tracer, call, ref, dims[0] % len(shape), likes)
    if not dims or any(dim % len(shape) in axes for dim in dims):
        return NotStreamable("it runs along axes of space and others at once")
    return _results(tracer, call, ref, likes, dropped=dims)


def _results(tracer: Tracer, call: Call, ref: Ref, likes: Any, **options: Any) -> Ref | tuple[Ref, ...]:
    """Record each result of a call as a node, as :func:`per_position` does."""
    if isinstance(likes, Tensor):
        return per_position(tracer, call, ref, **options)
    parts = (Call(result_of, (call.target, index, *call.args), call.kwargs) for index in range(len(likes)))
    return tuple(per_position(tracer, part, ref, **options) for part in parts)


OF_LINES = frozenset(_ALONG_DIM) - {
    *(
        aten.diff.default,
        aten.glu.default,
        aten.index_select.default,
        aten.nanmean.default,
        aten.nansum.default,
    )
}
"""Operators along one axis, which tiles of whole lines compute, as large as lines or smaller."""


_ALONG_SPACE = NotStreamable("it runs along a spatial axis")


def _along_lines(tracer: Tracer, call: Call, ref: Ref, dim: int, likes: Any) -> Any:
    """An operator along one spatial axis: a few neighbours, or whole lines, meet."""
    axes, spec = tracer.axes(ref), tracer.spec(ref)
    assert axes is not None
    ndim = len(spec.shape)
    if call.target is aten.index_select.default:
        (index,) = call.bind("index")
        return (
            lines_at(tracer, ref, dim, index, likes) if len(tracer.spec(index).shape) == 1 else _ALONG_SPACE
        )
    if (
        call.target in SELECTING
        and axes == (ndim - 2, ndim - 1)
        and spec.dtype not in (torch.bool, torch.int64)
    ):
        return _selected_along(tracer, call.target, ref, dim, pytree.tree_leaves(likes))
    if call.target is aten.diff.default and call.bind("prepend", "append") == [None, None]:
        along: AxisMap = Sliding(1 + call.bind("n")[0])
    elif call.target in OF_LINES:
        along = Line(spec.shape[dim])
    else:
        return _ALONG_SPACE
    access = Access(*(along if axis == dim else Same() for axis in axes))
    if not takes(call.target, "keepdim") or call.bind("keepdim")[0]:
        return _results(tracer, call, ref, likes, access=access)
    # A map of one row or column first.
    call = call.replaced("keepdim", True)
    found = _results(tracer, call, ref, tracer.fake(call), access=access)
    sums = [_only(tracer, each, dim) for each in pytree.tree_leaves(found)]
    return tuple(sums) if isinstance(found, tuple) else sums[0]


def _only(tracer: Tracer, ref: Ref, dim: int) -> Any:
    """The only row or column of a map, as a global value."""
    if tracer.spec(ref).dtype == torch.bool:
        return truth(tracer, Call(aten.any.dim, (ref, dim, False), {}))
    return mean_or_sum(tracer, Call(aten.sum.dim_IntList, (ref, [dim], False), {}))


EXPONENTIAL = (aten.softmax.int, aten.log_softmax.int, aten.logsumexp.default)
"""Operators on exponentials and their sum along axes, which :func:`exponential` streams over space too."""


def exponential(tracer: Tracer, target: object, ref: Ref, dims: Sequence[int], like: Tensor) -> Any:
    """Softmax, log-softmax or log-sum-exp over spatial axes and any others.

    The maximum and the sum are reductions. ``like`` is a fake tensor of the whole result.
    """

    def made(name: Any, *args: Any) -> Any:
        return pointwise(tracer, Call(name, args, {}))

    dtype = statistics_dtype(like.dtype)
    x = ref if tracer.spec(ref).dtype == dtype else made(aten.to.dtype, ref, dtype)
    largest = extremum(tracer, Call(aten.amax.default, (x, dims, True), {}))
    top = tracer.global_value(offset, largest, target is aten.logsumexp.default)
    lowered = made(aten.sub.Tensor, x, top)
    powers = made(aten.exp.default, lowered)
    total = mean_or_sum(tracer, Call(aten.sum.dim_IntList, (powers, dims, True), {}))
    if target is aten.softmax.int:
        result = made(aten.div.Tensor, powers, total)
    elif target is aten.log_softmax.int:
        result = made(aten.sub.Tensor, lowered, tracer.global_value(aten.log.default, total))
    else:
        logarithm = tracer.global_value(aten.log.default, total)
        whole = tracer.global_value(aten.add.Tensor, logarithm, top)
        return tracer.global_value(rounded_as, whole, tuple(like.shape), like.dtype)
    return result if like.dtype == dtype else made(aten.to.dtype, result, like.dtype)


SELECTING: dict[object, int] = {
    aten.max.dim: 1,
    aten.min.dim: -1,
    aten.argmax.default: 1,
    aten.argmin.default: -1,
}
"""Operators that find the largest (1) or smallest (-1) value along an axis, and its index."""


def selected(
    tracer: Tracer, target: object, ref: Ref, likes: Sequence[Tensor], counts: tuple[int, int] = (1, 1)
) -> tuple[Ref, ...]:
    """The largest or smallest values of a map (..., H, W) with their indices, or the indices alone.

    ``counts`` are the numbers of values along rows and columns: (1, 1) over all positions, whose indices are
    in row order, or all of one axis and 1 of the other. ``likes`` are fake tensors of the whole results.
    Among equal values the first is taken, and gets the gradient.
    """
    axes, shape = tracer.axes(ref), tracer.spec(ref).shape
    assert axes is not None
    width = shape[axes[1]]
    windows = (Adaptive(shape[axes[0]], counts[0]), Adaptive(width, counts[1]))
    values, places = _of_sign(
        tracer, ref, WindowMaxima(shape, axes, True, windows), largest=SELECTING[target] > 0
    )
    if max(counts) > 1:
        places = tracer.global_value(place_along, places, width, counts[0] == 1)
    parts = zip((values, places)[-len(likes) :], likes, strict=True)
    return tuple(tracer.global_value(aten.reshape.default, part, tuple(like.shape)) for part, like in parts)


def _selected_along(
    tracer: Tracer, target: object, ref: Ref, dim: int, likes: Sequence[Tensor]
) -> tuple[Ref, ...] | Ref:
    """The largest or smallest value along one spatial axis of a map (..., H, W), as :func:`selected`."""
    height, width = tracer.spec(ref).shape[-2:]
    is_row = dim == len(tracer.spec(ref).shape) - 2
    results = selected(tracer, target, ref, likes, (1, width) if is_row else (height, 1))
    return results if len(likes) > 1 else results[0]


def place_along(places: Tensor, width: int, is_row: bool) -> Tensor:
    """The row or the column of each index in row order, in a map of ``width`` columns."""
    return places // width if is_row else places % width


def top_values(tracer: Tracer, ref: Ref, count: int, largest: bool) -> tuple[Ref, Ref]:
    """The largest or smallest values (..., count) over all positions (..., H, W), and their indices."""
    axes = tracer.axes(ref)
    assert axes is not None
    reduction = TopPositions(tracer.spec(ref).shape, axes, True, count, nan_first=largest)
    return _of_sign(tracer, ref, reduction, largest=largest)


def _of_sign(tracer: Tracer, ref: Ref, reduction: Selection, *, largest: bool) -> tuple[Ref, Ref]:
    """The values and indices that a reduction picks as a map's largest, or those of its smallest."""
    x = ref if largest else pointwise(tracer, Call(aten.neg.default, (ref,), {}))
    values, places = tracer.reduce(reduction, x)
    return values if largest else tracer.global_value(aten.neg.default, values), places


def offset(largest: Tensor, is_finite: bool) -> Tensor:
    """The value to subtract before exponentials, which changes neither the result nor its gradient."""
    return (largest.masked_fill(largest.isinf(), 0) if is_finite else largest).detach()


def rounded_as(value: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A value in another shape and dtype."""
    return value.to(dtype).reshape(shape)


declare(offset, place_along, cost=Cost(saves=NOTHING, detaches=True))


def _is_apart(tracer: Tracer, ref: Ref, other: Ref) -> bool:
    """Whether another operand has positions that are not those of ``ref``."""
    axes, shape = tracer.axes(ref), tracer.spec(other).shape
    if tracer.axes(other) is None:
        return len(shape) > 1
    assert axes is not None
    return tracer.axes(other) != axes or any(shape[axis] != tracer.spec(ref).shape[axis] for axis in axes)


def result_of(target: Callable[..., Any], index: int, *args: Any, **kwargs: Any) -> Tensor:
    """One of an operator's results."""
    result: Tensor = target(*args, **kwargs)[index]
    return result


def _index_bytes(operation: Operation) -> int:
    """Bytes of the indices of values, which autograd saves whether they are read or not."""
    return operation.results[1].nbytes


declare(aten.softmax, aten._softmax, aten.log_softmax, cost=Cost(saves=RESULT))
declare(aten.cumsum, cost=Cost(backward_workspace=lambda nbytes: 2 * nbytes.result, saves=NOTHING))
declare(aten.cumprod, cost=Cost(backward_workspace=lambda nbytes: 4 * nbytes.result))
declare(aten.logcumsumexp, cost=Cost(backward_workspace=lambda nbytes: 7 * nbytes.result))
declare(
    *(aten.prod, aten.nansum),
    cost=Cost(backward_workspace=lambda nbytes: (4 if nbytes.is_half else 2) * nbytes.operands),
)
declare(
    aten.logsumexp,
    # The exponentials of all values, and the maxima subtracted first; backward the same again.
    cost=Cost(
        workspace=lambda nbytes: nbytes.operands + 2 * nbytes.result,
        backward_workspace=lambda nbytes: 2 * nbytes.operands,
    ),
)
declare(aten.diff, cost=Cost(backward_workspace=lambda nbytes: 2 * nbytes.operands, saves=NOTHING))
declare(
    result_of,
    # The other result, and for some operators a copy of the values to sort.
    cost=Cost(
        workspace=lambda nbytes: nbytes.operands + INDEX_BYTES * nbytes.result // nbytes.itemsize,
        # In half precision gradients are scattered in float32.
        backward_workspace=lambda nbytes: 2 * nbytes.operands * nbytes.is_half,
        saves=Saves(beside=lambda operation: INDEX_BYTES * operation.numel),
    ),
)
declare(aten.sort, aten.topk, cost=Cost(saves=Saves(beside=_index_bytes)))


class _Chosen(nn.Module):
    """The largest channels of each position, in order, and values gathered by their indices."""

    def forward(self, x: Tensor) -> Tensor:
        largest, order = x.topk(3, 1)
        taken = x.sin().gather(1, order) * largest.softmax(1)
        ranked = torch.sort(x, dim=1, descending=True, stable=True).values.cumsum(1).roll(2, 1)
        return torch.cat((taken, ranked, x.median(1, keepdim=True).values), 1) * x.max(1).indices[:, None]


class _Shares(nn.Module):
    """How much of a map lies at each position, and at each row."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.softmax(2) * x.log_softmax(-1) + x.logsumexp(3, keepdim=True)
        gates = x.mean(1, keepdim=True).flatten(1).softmax(1).view(-1, 1, *x.shape[2:])
        return (x * gates).sum((2, 3)) + rows.square().mean((2, 3)) * x.logsumexp((0, 2, 3)).sin()


SAMPLES = (
    Sample("softmax over positions", lambda: nn.Sequential(nn.Conv2d(3, 5, 3), _Shares())),
    Sample("the largest channels", lambda: chain(nn.Conv2d(3, 5, 3), _Chosen())),
)
