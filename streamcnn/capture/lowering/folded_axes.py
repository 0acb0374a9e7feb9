"""Translations of operators that leave merged axes alone: pointwise ones, and those along other axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from streamcnn.capture.lowering.folded_indices import at_indices, named_axes
from streamcnn.capture.lowering.folding import (
    TRANSLATIONS,
    Folded,
    FoldingTracer,
    Translation,
    as_folded,
    as_seen,
    is_merged_like,
    taken_apart,
    values_of,
)
from streamcnn.graph.ops import (
    along_axes,
    dropout,
    fourier,
    lookup,
    losses,
    normalization,
    padding,
    pointwise,
    reductions,
    shape,
    top_positions,
)
from streamcnn.graph.ops.rules import Call, NotStreamable, rule_for
from streamcnn.graph.program import Ref
from streamcnn.graph.schemas import takes

aten = torch.ops.aten


def along_new_axes(tracer: FoldingTracer, call: Call) -> Any:
    """Translate an operator of one map that puts what it finds at a position along new last axes."""
    like = tracer.fake_seen(call)
    (value,) = (value for value in values_of(call) if isinstance(value, Folded))
    args, kwargs = _mapped(lambda each: each.ref if each is value else each, call)
    runs = (*value.runs, *(1,) * (like.dim() - len(value.runs)))
    return as_seen(tracer, tracer.stream(Call(call.target, args, kwargs)), runs, like.shape)


def alike_folded(tracer: FoldingTracer, call: Call) -> Any:
    """Translate an operator that treats every position alike."""
    like = tracer.fake_seen(call)
    folded = [value for value in values_of(call) if isinstance(value, Folded)]
    if not isinstance(like, Tensor):
        return NotStreamable("it returns several tensors")
    added = like.dim() - max(len(value.runs) for value in folded)
    first = max(folded, key=lambda value: len(value.runs))
    maps = [value for value in values_of(call) if isinstance(value, Ref) and tracer.axes(value) is not None]
    if maps or not all(is_merged_like(tracer, value, first) for value in folded):
        return NotStreamable("its operands have their axes of space merged differently")
    extents = tracer.spec(first.ref).shape

    def apart(value: Any) -> Any:
        if isinstance(value, Folded):
            return value.ref
        if not isinstance(value, Ref):
            return value
        return taken_apart(
            tracer, value, Folded(first.ref, (1,) * added + first.runs), (1,) * added + extents
        )

    translated = Call(call.target, *_mapped(apart, call))
    return as_seen(tracer, tracer.stream(translated), (1,) * added + first.runs, like.shape)


def _trailing(tracer: FoldingTracer, call: Call) -> Any:
    """Translate operators along the last axes: linear layers and norms."""
    value = as_folded(tracer, call.args[0])
    count = 1 if rule_for(call.target) is pointwise.linear else len(call.args[1])
    if any(isinstance(other, Folded) for other in values_of(call)[1:]):
        return NotStreamable("its parameters depend on the position")
    if any(run > 1 for run in value.runs[-count:]):
        return NotStreamable("it mixes positions: it is applied along merged axes of space")
    result = tracer.stream(Call(call.target, (value.ref, *call.args[1:]), call.kwargs))
    return as_seen(tracer, result, value.runs, tracer.fake_seen(call).shape)


def _everywhere(tracer: FoldingTracer, call: Call) -> Any:
    """Translate operators that name no axis."""
    value: Folded = call.args[0]
    result = tracer.stream(Call(call.target, (value.ref, *call.args[1:]), call.kwargs))
    return as_seen(tracer, result, value.runs, tracer.fake_seen(call).shape)


def _along(tracer: FoldingTracer, call: Call) -> Any:
    """Translate operators along axes that are not merged: concat, split, select, sort, softmax."""
    like = tracer.fake_seen(call)
    parts = like if isinstance(like, (tuple, list)) else (like,)
    values = values_of(call)
    folded = [value for value in values if isinstance(value, Folded)]
    first = folded[0]
    most = len(first.runs) if rule_for(call.target) is shape.concatenate else 1
    if any(value.runs != first.runs or not is_merged_like(tracer, value, first) for value in folded) or any(
        tracer.axes(value) is not None or len(tracer.spec(value).shape) not in (0, 1, most)
        for value in values
        if isinstance(value, Ref)
    ):
        return NotStreamable("its operands have their axes of space merged differently")
    name = "dims" if takes(call.target, "dims") else "dim"
    (dims,) = call.bind(name)
    ndim, added = len(first.runs), parts[0].dim() - len(first.runs)
    listed = [dim % max(ndim, parts[0].dim()) for dim in ([dims] if isinstance(dims, int) else dims or [])]
    if not listed or (added <= 0 and any(first.runs[dim] > 1 for dim in listed)):
        return _along_merged(tracer, call, first, listed, parts)
    starts = [(*first.starts, sum(first.runs))[dim] for dim in listed]
    extents = tracer.spec(first.ref).shape

    def apart(value: Any) -> Any:
        if isinstance(value, Ref) and len(tracer.spec(value).shape) == len(first.runs) > 1:
            # A value without positions that a concat puts beside maps.
            return taken_apart(tracer, value, first, extents)
        return _unmerged(value)

    translated = Call(call.target, *_mapped(apart, call))
    result = tracer.stream(translated.replaced(name, starts[0] if isinstance(dims, int) else starts))
    if added > 0:
        runs = (*first.runs[: listed[0]], *((1,) * added), *first.runs[listed[0] :])
    else:
        runs = tuple(run for axis, run in enumerate(first.runs) if added == 0 or axis not in listed)
    if not isinstance(result, tuple):
        return as_seen(tracer, result, runs, parts[0].shape)
    return tuple(as_seen(tracer, each, runs, part.shape) for each, part in zip(result, parts, strict=True))


def _along_merged(
    tracer: FoldingTracer, call: Call, value: Folded, dims: Sequence[int], likes: Sequence[Tensor]
) -> Any:
    """Translate operators along axes that are merged: softmax, selection, a slice of all positions."""
    merged = [axis for dim in dims for axis in value.span(dim)]
    if call.target in along_axes.EXPONENTIAL and not set(merged).isdisjoint(tracer.axes(value.ref) or ()):
        result = along_axes.exponential(tracer, call.target, value.ref, merged, likes[0])
        return as_seen(tracer, result, value.runs, likes[0].shape)
    selects = call.target in along_axes.SELECTING or call.target is aten.topk.default
    if selects and tuple(merged) == tracer.axes(value.ref):
        return _select(tracer, call, value, dims[0], likes)
    same = likes[0].shape == value.seen(tracer.spec(value.ref).shape)
    whole = same and rule_for(call.target) is shape.slice_axis
    return value if whole else NotStreamable("it works along merged axes of space")


def _select(tracer: FoldingTracer, call: Call, value: Folded, merged: int, likes: Sequence[Tensor]) -> Any:
    """Select the largest or smallest values over all positions, with their indices."""
    if tracer.spec(value.ref).dtype in (torch.bool, torch.int64):
        return NotStreamable("it finds the place of truth values or of whole numbers of 64 bits")
    axes = tracer.axes(value.ref)
    assert axes is not None
    ndim = len(tracer.spec(value.ref).shape)
    order = [axis for axis in range(ndim) if axis not in axes] + list(axes)
    x = tracer.stream(Call(aten.permute.default, (value.ref, order), {}))
    if call.target is aten.topk.default:
        count, largest = call.bind("k", "largest")
        if count > top_positions.MOST:
            return NotStreamable("it works along merged axes of space")
        turned = [*range(merged), ndim - 2, *range(merged, ndim - 2)]
        results = along_axes.top_values(tracer, x, count, largest)
        return tuple(tracer.global_value(aten.permute.default, each, turned) for each in results)
    found = along_axes.selected(tracer, call.target, x, likes)
    return found if len(likes) > 1 else found[0]


def _unmerged(value: Any) -> Any:
    return value.ref if isinstance(value, Folded) else value


def _indexed(tracer: FoldingTracer, call: Call) -> Any:
    """Translate indexing by a tensor along one axis that is not merged."""
    value, indices = call.bind("self", "indices")
    named = named_axes(call)
    if not isinstance(value, Folded) or len(named) != 1 or value.runs[named[0]] > 1:
        return NotStreamable("it works along merged axes of space")
    index = indices[named[0]]
    places = [*(None,) * value.starts[named[0]], index]
    result = tracer.stream(Call(call.target, (value.ref, places), {}))
    like = tracer.fake_seen(call)
    ones = (1,) * (like.dim() - len(value.runs) + 1)
    runs = (*value.runs[: named[0]], *ones, *value.runs[named[0] + 1 :])
    return as_seen(tracer, result, runs, like.shape)


def _by_index(otherwise: Translation) -> Translation:
    """Translate operators that may take a few of all positions by their indices, or else ``otherwise``."""

    def translated(tracer: FoldingTracer, call: Call) -> Any:
        picked = at_indices(tracer, call)
        return otherwise(tracer, call) if picked is None else picked

    return translated


def _reduce(tracer: FoldingTracer, call: Call) -> Any:
    """Translate reductions such as sums and means, over merged or other axes."""
    value: Folded = call.args[0]
    like, ndim = tracer.fake_seen(call), len(value.runs)
    if not isinstance(like, Tensor):
        return NotStreamable("it returns several tensors")
    translated = Call(call.target, (value.ref, *call.args[1:]), call.kwargs)
    dims = call.bind("dim")[0] if takes(call.target, "dim") else None
    taken = (
        set(range(ndim))
        if dims in (None, [])
        else {d % ndim for d in ([dims] if isinstance(dims, int) else dims)}
    )
    if dims not in (None, []):
        axes = [i for axis in sorted(taken) for i in value.span(axis)]
        is_one = isinstance(dims, int) and len(axes) == 1
        if isinstance(dims, int) and not is_one:
            if call.target not in _OF_SEVERAL:
                return NotStreamable("it works along merged axes of space")
            translated = Call(_OF_SEVERAL[call.target], translated.args, translated.kwargs)
        translated = translated.replaced("dim", axes[0] if is_one else axes)
    result = tracer.stream(translated)
    keeps = like.dim() == ndim
    runs = tuple(run for axis, run in enumerate(value.runs) if keeps or axis not in taken)
    return as_seen(tracer, result, runs, like.shape)


_OF_SEVERAL = {aten.any.dim: aten.any.dims, aten.all.dim: aten.all.dims}
"""Operators along one axis, and their forms for several."""


def _mapped(function: Callable[[Any], Any], call: Call) -> tuple[Any, Any]:
    return pytree.tree_map(function, call.args), pytree.tree_map(function, dict(call.kwargs))


TRANSLATIONS.update(
    {
        pointwise.pointwise: alike_folded,
        **dict.fromkeys((dropout.dropout, pointwise.from_shape, pointwise.from_metadata), _everywhere),
        lookup.look_up: along_new_axes,
        shape.index_channels: _by_index(_indexed),
        **dict.fromkeys((pointwise.linear, normalization.layer_norm, pointwise.trailing_norm), _trailing),
        **dict.fromkeys(
            (shape.concatenate, shape.split, shape.unbind, shape.select, shape.slice_axis), _along
        ),
        **dict.fromkeys((shape.flip, padding.roll, fourier.transform), _along),
        **dict.fromkeys((along_axes.along_axis, losses.gather_channels), _by_index(_along)),
        **dict.fromkeys((reductions.mean_or_sum, reductions.extremum, reductions.truth), _reduce),
        **dict.fromkeys((reductions.vector_norm, reductions.variance, reductions.count), _reduce),
    }
)
