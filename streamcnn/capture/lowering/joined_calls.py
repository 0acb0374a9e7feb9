"""Calls on tokens of a map that are joined with others, part by part."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from streamcnn.capture.lowering.folding import Folded, as_folded, is_global
from streamcnn.capture.lowering.joined import (
    HANDLERS,
    MEET,
    Caller,
    Joined,
    as_type,
    first_ref,
    is_merged,
    joined_in,
    shape_seen,
    sizes_of,
    values_seen,
)
from streamcnn.graph.ops import (
    along_axes,
    dropout,
    losses,
    normalization,
    padding,
    pointwise,
    reductions,
    shape,
    writing,
)
from streamcnn.graph.ops.reduction_types import statistics_dtype
from streamcnn.graph.ops.rules import Call, NotStreamable, rule_for
from streamcnn.graph.program import Ref
from streamcnn.graph.schemas import takes

aten = torch.ops.aten


def joins_tokens(caller: Caller, call: Call) -> Any:
    """The result of a concat or padding along merged axes of space, in parts."""
    rule, tracer = rule_for(call.target), caller.recording
    if rule is padding.pad:
        return _padded(caller, call)
    if rule is not shape.concatenate or call.target is aten.stack.default:
        return MEET
    values, dim = call.bind("tensors", "dim")
    dim = dim % len(shape_seen(tracer, values[0]))
    maps = [value for value in values if isinstance(value, Joined) or not is_global(tracer, value)]
    if any(each.axis != dim if isinstance(each, Joined) else not is_merged(each, dim) for each in maps):
        return MEET
    parts = [part for value in values for part in (value.parts if isinstance(value, Joined) else (value,))]
    dtype = tracer.fake_seen(call).dtype
    # Lists begin with tensors of shape (0,), which count for the dtype alone.
    kept = [as_type(caller, part, dtype) for part in parts if 0 not in shape_seen(tracer, part)]
    return kept[0] if len(kept) == 1 else Joined(tuple(kept), dim)


def _padded(caller: Caller, call: Call) -> Any:
    """Padding of tokens by constants at their ends."""
    value, pads = call.bind("self", "pad")
    like = caller.recording.fake_seen(call)
    places = [like.dim() - 1 - index // 2 for index, pad in enumerate(pads) if pad]
    constant = call.target is aten.constant_pad_nd.default or call.bind("mode")[0] == "constant"
    if not constant or len(set(places)) != 1 or min(pads) < 0 or not is_merged(value, places[0]):
        return NotStreamable("it works along merged axes of space")
    axis, fill = places[0], call.bind("value")[0] or 0.0

    def tokens(count: int) -> tuple[Ref, ...]:
        if not count:
            return ()
        extents = [count if each == axis else extent for each, extent in enumerate(like.shape)]
        options = {"dtype": like.dtype, "device": like.device}
        return (caller.recording.global_value(aten.full.default, extents, fill, **options),)

    before, after = (pads[2 * (like.dim() - 1 - axis) + end] for end in (0, 1))
    return Joined((*tokens(before), value, *tokens(after)), axis)


# --- what treats every token alike ----------------------------------------------------------------------


def each_part(caller: Caller, call: Call) -> Any:
    """Apply a call to each part, with the same tokens of other operands."""
    tracer, joined = caller.recording, joined_in(call)
    first = joined[0]
    sizes, ndim = sizes_of(tracer, first), len(shape_seen(tracer, first))
    place = first.axis - ndim
    for value in values_seen(call):
        extents = shape_seen(tracer, value)
        if isinstance(value, Joined):
            if value.axis - len(extents) != place or sizes_of(tracer, value) != sizes:
                return MEET
        elif not is_global(tracer, value):
            return MEET

    is_aligned = rule_for(call.target) in _ALIGNED

    def part(value: Any, index: int) -> Any:
        if isinstance(value, Joined):
            return value.parts[index]
        if not isinstance(value, Ref) or not is_aligned:
            return value
        extents = shape_seen(tracer, value)
        if len(extents) < -place or extents[place] == 1:
            return value
        start = sum(sizes[:index])
        return caller.called(Call(aten.slice.Tensor, (value, place, start, start + sizes[index]), {}))

    return _put_together(caller, call, [_mapped(call, part, index) for index in range(len(sizes))])


_ALIGNED = (
    *(pointwise.pointwise, shape.concatenate, losses.loss_of_values, losses.gather_channels),
    writing.slice_scatter,
)
"""Rules of operators whose operands have their axes side by side, counted from the last."""


def _put_together(caller: Caller, call: Call, calls: Sequence[Call]) -> Any:
    """The results of calls on the parts, along the axis on which they differ from the whole result."""
    tracer = caller.recording
    like = tracer.fake_seen(call)
    found = [caller.called(each) for each in calls]
    if isinstance(like, Tensor):
        return beside(caller, found, like.shape)
    columns = zip(*found, strict=True)
    return tuple(beside(caller, each, part.shape) for each, part in zip(columns, like, strict=True))


def beside(caller: Caller, parts: Sequence[Any], extents: Sequence[int]) -> Any:
    """Values in parts, along the axis on which the first differs from the whole of these ``extents``."""
    tracer = caller.recording
    shapes = [shape_seen(tracer, part) for part in parts]
    axis = next((axis for axis, extent in enumerate(extents) if extent != shapes[0][axis]), None)
    if axis is None or sum(each[axis] for each in shapes) != extents[axis]:
        return MEET
    value = Joined(tuple(parts), axis)
    return caller.whole(value) if all(is_global(tracer, part) for part in parts) else value


def _dropout(caller: Caller, call: Call) -> Any:
    """Dropout with the mask that the whole would have."""
    tracer, (value,) = caller.recording, joined_in(call)
    probability, train = call.bind("p", "train")
    if not train or probability in (0, 1):
        return each_part(caller, call)
    like = tracer.fake_seen(call)
    seed = dropout.seed_of(tracer, like.device)
    strides = dropout.strides_of(like.shape)
    starts = accumulate(sizes_of(tracer, value), initial=0)
    found: list[Ref | Folded] = []
    for part, start in zip(value.parts, starts, strict=False):
        own = as_folded(tracer, part)
        extents = tracer.spec(own.ref).shape
        apart = tuple(
            strides[axis] * each
            for axis in range(len(strides))
            for each in dropout.strides_of([extents[i] for i in own.span(axis)])
        )
        kept = dropout.dropped(tracer, own.ref, seed, probability, apart, start * strides[value.axis])
        found.append(Folded(kept, own.runs) if isinstance(part, Folded) else kept)
    return Joined(tuple(found), value.axis)


def _trailing(caller: Caller, call: Call) -> Any:
    """Linear layers and norms, along the last axes."""
    value = call.args[0]
    if not isinstance(value, Joined) or len(joined_in(call)) > 1:
        return MEET
    count = 1 if rule_for(call.target) is pointwise.linear else len(call.args[1])
    if value.axis >= len(shape_seen(caller.recording, value)) - count:
        return MEET
    calls = [Call(call.target, (part, *call.args[1:]), call.kwargs) for part in value.parts]
    return _put_together(caller, call, calls)


def _reshape(caller: Caller, call: Call) -> Any:
    """A reshape that leaves each part's tokens together."""
    tracer, value = caller.recording, call.args[0]
    if not isinstance(value, Joined):
        # A map or a global value gets the shape of tokens.
        return MEET
    before, after = shape_seen(tracer, value), tuple(tracer.fake_seen(call).shape)
    expands = call.target in (aten.expand.default, aten.broadcast_to.default)
    sizes = sizes_of(tracer, value)
    axis = value.axis + len(after) - len(before) if expands else outermost(before, after, value.axis)
    if axis is None or any(size * after[axis] % before[value.axis] for size in sizes):
        return NotStreamable(
            "it merges tokens of a map, and others that are joined with them, with another axis"
        )
    target = aten.expand.default if expands else aten.reshape.default
    shares = [size * after[axis] // before[value.axis] for size in sizes]
    calls = [
        Call(target, (part, [*after[:axis], share, *after[axis + 1 :]]), {})
        for part, share in zip(value.parts, shares, strict=True)
    ]
    return _put_together(caller, call, calls)


def outermost(before: Sequence[int], after: Sequence[int], axis: int) -> int | None:
    """The axis after a reshape that begins where ``axis`` does, so that it has its parts one after the other.

    It may be ``axis`` merged with axes after it, or the outer part of ``axis``.
    """
    outer = math.prod(before[:axis])
    return max((i for i in range(len(after)) if math.prod(after[:i]) == outer), default=None)


def _of_type(caller: Caller, call: Call) -> Any:
    """A new tensor with the dtype and device of tokens, whose values it does not read."""
    (value,) = joined_in(call)
    return caller.called(Call(call.target, (value.parts[0], *call.args[1:]), call.kwargs))


# --- along an axis --------------------------------------------------------------------------------------


def _along(caller: Caller, call: Call) -> Any:
    """Operators along a given axis: another one, or that of the tokens."""
    tracer, first = caller.recording, joined_in(call)[0]
    if rule_for(call.target) is shape.concatenate and call.target is not aten.stack.default:
        dim = call.bind("dim")[0] % len(shape_seen(tracer, first))
        return joins_tokens(caller, call) if dim == first.axis else each_part(caller, call)
    dims = call.bind("dims" if takes(call.target, "dims") else "dim")[0]
    ndim = len(shape_seen(tracer, first)) + (call.target is aten.stack.default)
    listed = listed_axes(dims, ndim)
    if call.target is not aten.stack.default and first.axis in listed:
        along = _ALONG_TOKENS.get(rule_for(call.target))
        return MEET if along is None or len(listed) > 1 else along(caller, call, first)
    return each_part(caller, call)


def listed_axes(dims: int | Sequence[int] | None, ndim: int) -> list[int]:
    """The axes, of ``ndim``, that ``dims`` names, counted from the front; all of them if it names none."""
    return [dim % ndim for dim in ([dims] if isinstance(dims, int) else dims or range(ndim))]


def _slice(caller: Caller, call: Call, value: Joined) -> Any:
    """A range of the tokens."""
    tracer = caller.recording
    total = shape_seen(tracer, value)[value.axis]
    if call.target is aten.narrow.default:
        start, length = call.bind("start", "length")
        start %= total
        bounds = slice(start, start + length)
    else:
        bounds = slice(*call.bind("start", "end", "step"))
    start, stop, step = bounds.indices(total)
    return MEET if step != 1 else _range(caller, value, start, stop)


def _range(caller: Caller, value: Joined, start: int, stop: int) -> Any:
    """The tokens from ``start`` to ``stop``."""
    tracer = caller.recording
    found, off = [], []
    ends = accumulate(sizes_of(tracer, value), initial=0)
    for part, (first, last) in zip(value.parts, pairwise(ends), strict=True):
        begin, end = max(start, first), min(stop, last)
        if (begin, end) == (first, last):
            found.append(part)
        elif begin < end and not is_global(tracer, part):
            return MEET
        elif begin < end:
            found.append(
                caller.called(Call(aten.slice.Tensor, (part, value.axis, begin - first, end - first), {}))
            )
        else:
            off.append(first_ref(part))
    for part in found:
        tracer.cut_off(off, first_ref(part))
    if len(found) <= 1:
        return found[0] if found else MEET
    cut = Joined(tuple(found), value.axis)
    return caller.whole(cut) if all(is_global(tracer, part) for part in found) else cut


def _select(caller: Caller, call: Call, value: Joined) -> Any:
    """One token."""
    index = call.bind("index")[0] % shape_seen(caller.recording, value)[value.axis]
    token = _range(caller, value, index, index + 1)
    if isinstance(token, NotStreamable):
        return token
    return caller.called(Call(aten.select.int, (token, value.axis, 0), {}))


def _split(caller: Caller, call: Call, value: Joined) -> Any:
    """Consecutive ranges of the tokens."""
    sizes = [part.shape[value.axis] for part in caller.recording.fake_seen(call)]
    ends = accumulate(sizes, initial=0)
    found = tuple(_range(caller, value, start, stop) for start, stop in pairwise(ends))
    return MEET if any(isinstance(each, NotStreamable) for each in found) else found


def _exponential(caller: Caller, call: Call, value: Joined) -> Any:
    """Softmax over all tokens, by the logarithms of the parts' sums of exponentials."""
    if call.target not in along_axes.EXPONENTIAL:
        return MEET
    like = caller.recording.fake_seen(call)
    dtype = statistics_dtype(like.dtype)
    lowest = torch.finfo(dtype).min

    def called(target: Any, *args: Any) -> Any:
        return caller.called(Call(target, args, {}))

    parts = [as_type(caller, part, dtype) for part in value.parts]
    # A part that a mask hides has a sum of 0, and its logarithm no gradient.
    shown = [called(aten.clamp.default, part, lowest) for part in parts]
    sums = [called(aten.logsumexp.default, part, [value.axis], True) for part in shown]
    every = called(aten.cat.default, sums, value.axis)
    keeps = call.target is not aten.logsumexp.default or call.bind("keepdim")[0]
    total = called(aten.logsumexp.default, every, [value.axis], keeps)
    is_hidden = called(aten.le.Scalar, total, lowest)
    if call.target is aten.logsumexp.default:
        return as_type(caller, called(aten.masked_fill.Scalar, total, is_hidden, -math.inf), like.dtype)
    # As in plain PyTorch, where the largest value is subtracted first.
    is_infinite = called(aten.eq.Scalar, total, math.inf)
    undefined = called(aten.logical_or.default, is_hidden, is_infinite)
    total = called(aten.masked_fill.Scalar, total, undefined, math.nan)
    found = [called(aten.sub.Tensor, part, total) for part in parts]
    if call.target is aten.softmax.int:
        found = [called(aten.exp.default, part) for part in found]
    return Joined(tuple(as_type(caller, part, like.dtype) for part in found), value.axis)


def _sum(caller: Caller, call: Call) -> Any:
    """Sums and means, over the tokens or other axes."""
    tracer, (value,) = caller.recording, joined_in(call)
    dims = call.bind("dim")[0] if takes(call.target, "dim") else None
    ndim = len(shape_seen(tracer, value))
    listed = listed_axes(dims, ndim)
    if value.axis not in listed:
        return each_part(caller, call)
    keepdim = call.bind("keepdim")[0] if takes(call.target, "keepdim") else False
    like = tracer.fake_seen(call)
    parts = [as_type(caller, part, like.dtype) for part in value.parts]
    sums = [caller.called(Call(aten.sum.dim_IntList, (part, listed, keepdim), {})) for part in parts]
    total = added(caller, sums)
    if call.target not in (aten.mean.default, aten.mean.dim):
        return total
    count = math.prod(shape_seen(tracer, value)[dim] for dim in listed)
    return caller.called(Call(aten.div.Tensor, (total, count), {}))


def added(caller: Caller, values: Sequence[Any]) -> Any:
    """The sum of values."""
    total = values[0]
    for value in values[1:]:
        total = caller.called(Call(aten.add.Tensor, (total, value), {}))
    return total


def _mapped(call: Call, function: Callable[[Any, int], Any], index: int) -> Call:
    args, kwargs = pytree.tree_map(lambda value: function(value, index), (call.args, dict(call.kwargs)))
    return Call(call.target, args, kwargs)


_ALONG_TOKENS: dict[Any, Callable[[Caller, Call, Joined], Any]] = {
    shape.slice_axis: _slice,
    shape.select: _select,
    shape.split: _split,
    along_axes.along_axis: _exponential,
}
HANDLERS.update(
    {
        **dict.fromkeys((pointwise.pointwise, pointwise.from_shape, shape.permute), each_part),
        dropout.dropout: _dropout,
        **dict.fromkeys((pointwise.linear, normalization.layer_norm, pointwise.trailing_norm), _trailing),
        **dict.fromkeys((shape.concatenate, shape.split, shape.unbind, shape.select), _along),
        **dict.fromkeys((shape.slice_axis, shape.flip, along_axes.along_axis), _along),
        losses.gather_channels: _along,
        losses.one_hot: each_part,
        pointwise.from_metadata: _of_type,
        shape.reshape: _reshape,
        reductions.mean_or_sum: _sum,
    }
)
