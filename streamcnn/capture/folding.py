"""Axes of space that a reshape has merged: tokens, and windows as a longer batch.

Transformers see a map (N, C, H, W) as tokens (N, H * W, C), or windows of it as images of their own. No value
moves by that, so the map keeps its axes; what is remembered is how many of them each axis that the code sees
is made of. A call on what the code sees is translated to one on the map, which the rules of the operators
then stream like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from streamcnn.graph.ops import (
    along_axes,
    dropout,
    losses,
    normalization,
    pointwise,
    products,
    reductions,
    resampling,
    shape,
    sliding_blocks,
    top_positions,
)
from streamcnn.graph.ops.rules import Call, NotStreamable, Tracer, rule_for
from streamcnn.graph.program import Axes, Ref
from streamcnn.graph.schemas import places_of_axes, takes

aten = torch.ops.aten

Runs = tuple[int, ...]
"""By axis that the code sees: how many consecutive axes of the map it is made of."""


@dataclass(frozen=True, slots=True)
class Folded:
    """A map as the code sees it."""

    ref: Ref
    runs: Runs

    @property
    def starts(self) -> tuple[int, ...]:
        """By axis that the code sees: the first of the map's axes."""
        return tuple(accumulate(self.runs, initial=0))[:-1]

    def span(self, axis: int) -> range:
        """The map's axes behind one that the code sees."""
        start = self.starts[axis]
        return range(start, start + self.runs[axis])

    def seen(self, extents: Sequence[int]) -> tuple[int, ...]:
        """The shape that the code sees, of a map or a tile of these extents."""
        return tuple(math.prod(extents[i] for i in self.span(axis)) for axis in range(len(self.runs)))


class FoldingTracer(Tracer, Protocol):
    """What is asked of the tracer here besides what rules may ask."""

    def stream(self, call: Call) -> Any:
        """What the call's rule answers."""

    def gather(self, ref: Ref) -> Ref:
        """The whole of a map as a global value, recorded once."""

    def fake_seen(self, call: Call) -> Any:
        """The call's result on fake tensors as the code sees it."""


def is_folded(call: Call) -> bool:
    """Whether an operand has merged axes."""
    return any(isinstance(leaf, Folded) for leaf in pytree.tree_leaves((call.args, dict(call.kwargs))))


def stream_folded(tracer: FoldingTracer, call: Call) -> Any:
    """Carry out a call that merges axes of space, or whose operands have merged ones, on the map itself.

    The result is a ref, a :class:`Folded` one, a tuple of those, or :class:`NotStreamable`.
    """
    translate = TRANSLATIONS.get(rule_for(call.target))
    if translate is None:
        return NotStreamable("it has no rule for axes of space that are merged")
    return translate(tracer, call)


def unfolded(tracer: FoldingTracer, value: Folded) -> Ref:
    """The whole of a map as a global value, as the code sees it."""
    whole = tracer.gather(value.ref)
    return reshaped(tracer, whole, value.seen(tracer.spec(value.ref).shape))


# --- operators that regroup axes ---------------------------------------------------------------------


def _reshape(tracer: FoldingTracer, call: Call) -> Any:
    value = as_folded(tracer, call.args[0])
    axes = tracer.axes(value.ref)
    if axes is None:
        return NotStreamable("it gives a global value the shape of a map")
    after = tuple(tracer.fake_seen(call).shape)
    if call.target in (aten.expand.default, aten.broadcast_to.default):
        return _expand(tracer, value, after)
    found = regrouping(tracer.spec(value.ref).shape, axes, after)
    if found is None:
        return NotStreamable("it splits a spatial axis unevenly or merges it with another in parts")
    extents, runs = found
    ref = value.ref
    if extents != tracer.spec(ref).shape:
        ref = tracer.stream(Call(aten.reshape.default, (ref, extents), {}))
    return ref if isinstance(ref, NotStreamable) else as_seen(tracer, ref, runs, after)


def regrouping(
    before: Sequence[int], axes: Axes, after: Sequence[int]
) -> tuple[tuple[int, ...], Runs] | None:
    """A map's extents and its runs for a reshape of what the code sees to ``after``; None if it has none.

    Both shapes are cut into the shortest stretches of axes that hold the same elements. Where no axis of
    space is involved, the map takes the new axes. Where axes of space and others become one, they stay, as
    a run. An axis of space that is split, or merged with others after it, is left to the rule of reshape.
    """
    extents: list[int] = []
    runs: list[int] = []
    i = k = 0
    while i < len(before) or k < len(after):
        first, start = i, k
        if k < len(after) and after[k] == 1 and (i == len(before) or before[i] != 1):
            k += 1  # an axis of one position is put in
        elif i < len(before) and before[i] == 1 and i not in axes and (k == len(after) or after[k] != 1):
            i += 1  # or taken out
        elif i == len(before) or k == len(after):
            return None
        else:
            i, k = i + 1, k + 1
            while (held := math.prod(before[first:i])) != (holds := math.prod(after[start:k])):
                if held < holds and i < len(before):
                    i += 1
                elif holds < held and k < len(after):
                    k += 1
                else:
                    return None
        spatial = [axis for axis in axes if first <= axis < i]
        if spatial and k - start == 1 and (len(spatial) > 1 or spatial[0] > first):
            extents += before[first:i]
            runs.append(i - first)
        elif spatial and (len(spatial) > 1 or spatial[0] > first):
            inner = math.prod(after[start + 1 : k])
            if spatial != [i - 1] or before[i - 1] % inner:
                return None
            # Its outer part goes with what is before it, its inner part is of other axes.
            extents += (*before[first : i - 1], before[i - 1] // inner, *after[start + 1 : k])
            runs += [i - first] + [1] * (k - start - 1)
        else:
            extents += after[start:k]
            runs += [1] * (k - start)
    return tuple(extents), tuple(runs)


def _expand(tracer: FoldingTracer, value: Folded, after: tuple[int, ...]) -> Any:
    extents = tracer.spec(value.ref).shape
    before = value.seen(extents)
    added = len(after) - len(before)
    wanted = list(after[:added])
    for axis, extent in enumerate(after[added:]):
        if value.runs[axis] > 1 and extent != before[axis]:
            return NotStreamable("it repeats merged axes of space")
        wanted += [extents[i] for i in value.span(axis)] if value.runs[axis] > 1 else [extent]
    result = tracer.stream(Call(aten.expand.default, (value.ref, wanted), {}))
    return as_seen(tracer, result, (1,) * added + value.runs, after)


def _permute(tracer: FoldingTracer, call: Call) -> Any:
    value = as_folded(tracer, call.args[0])
    places = places_of_axes(call.target, len(value.runs), call.args[1:], call.kwargs)
    order = sorted(range(len(places)), key=places.__getitem__)
    axes = [i for axis in order for i in value.span(axis)]
    result = tracer.stream(Call(aten.permute.default, (value.ref, axes), {}))
    return as_seen(tracer, result, tuple(value.runs[axis] for axis in order), tracer.fake_seen(call).shape)


# --- operators that leave merged axes alone -----------------------------------------------------------


def alike_folded(tracer: FoldingTracer, call: Call) -> Any:
    """An operator that treats every position alike."""
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


def is_merged_like(tracer: FoldingTracer, value: Folded, first: Folded) -> bool:
    """Whether a map has the axes merged that ``first`` has, of the same extents or of one position.

    As many positions can be of other extents: those of a map that was turned.
    """
    before = len(first.runs) - len(value.runs)
    pairs = [
        (parts_of(tracer, value, axis), parts_of(tracer, first, axis + before))
        for axis in range(len(value.runs))
    ]
    return all(
        len(own) == len(others) and (len(own) == 1 or own == others or 1 in map(math.prod, (own, others)))
        for own, others in pairs
    )


def parts_of(tracer: FoldingTracer, value: Folded, axis: int) -> tuple[int, ...]:
    """The extents of the map's axes behind one that the code sees."""
    extents = tracer.spec(value.ref).shape
    return tuple(extents[i] for i in value.span(axis))


def taken_apart(tracer: FoldingTracer, ref: Ref, beside: Folded, extents: Sequence[int]) -> Ref:
    """A global value that meets a map of these extents, with the axes apart that are merged there."""
    before = tracer.spec(ref).shape
    after: list[int] = []
    for axis, extent in zip(reversed(range(len(beside.runs))), reversed(before), strict=False):
        run = [extents[i] for i in beside.span(axis)] if beside.runs[axis] > 1 else [extent]
        after[:0] = run if extent > 1 else [1] * len(run)
    return reshaped(tracer, ref, tuple(after))


def _trailing(tracer: FoldingTracer, call: Call) -> Any:
    """The last axes: linear layers and norms."""
    value = as_folded(tracer, call.args[0])
    count = 1 if rule_for(call.target) is pointwise.linear else len(call.args[1])
    if any(isinstance(other, Folded) for other in values_of(call)[1:]):
        return NotStreamable("its parameters depend on the position")
    if any(run > 1 for run in value.runs[-count:]):
        return NotStreamable("it mixes positions: it is applied along merged axes of space")
    result = tracer.stream(Call(call.target, (value.ref, *call.args[1:]), call.kwargs))
    return as_seen(tracer, result, value.runs, tracer.fake_seen(call).shape)


def _everywhere(tracer: FoldingTracer, call: Call) -> Any:
    """No axis in particular, or a tensor of a shape of its own."""
    value: Folded = call.args[0]
    result = tracer.stream(Call(call.target, (value.ref, *call.args[1:]), call.kwargs))
    return as_seen(tracer, result, value.runs, tracer.fake_seen(call).shape)


def _along(tracer: FoldingTracer, call: Call) -> Any:
    """Axes that are not merged: joined, split, selected, sorted, normalised."""
    like = tracer.fake_seen(call)
    parts = like if isinstance(like, (tuple, list)) else (like,)
    values = values_of(call)
    first = next(value for value in values if isinstance(value, Folded))
    folded = [value for value in values if isinstance(value, Folded)]
    if any(value.runs != first.runs or not is_merged_like(tracer, value, first) for value in folded) or any(
        tracer.axes(value) is not None or len(tracer.spec(value).shape) > 1
        for value in values
        if isinstance(value, Ref)
    ):
        return NotStreamable("its operands have their axes of space merged differently")
    name = "dims" if takes(call.target, "dims") else "dim"
    (dims,) = call.bind(name)
    ndim, added = len(first.runs), parts[0].dim() - len(first.runs)
    listed = [dim % max(ndim, parts[0].dim()) for dim in ([dims] if isinstance(dims, int) else dims or [])]
    if not listed or (added <= 0 and any(first.runs[dim] > 1 for dim in listed)):
        same = parts[0].shape == first.seen(tracer.spec(first.ref).shape)
        merged = [i for dim in listed for i in first.span(dim)]
        if call.target in along_axes.EXPONENTIAL and not set(merged).isdisjoint(tracer.axes(first.ref) or ()):
            result = along_axes.exponential(tracer, call.target, first.ref, merged, parts[0])
            return as_seen(tracer, result, first.runs, parts[0].shape)
        selects = call.target in along_axes.SELECTING or call.target is aten.topk.default
        if selects and tuple(merged) == tracer.axes(first.ref):
            return _select(tracer, call, first, listed[0], parts)
        whole = same and rule_for(call.target) is shape.slice_axis
        return first if whole else NotStreamable("it works along merged axes of space")
    starts = [(*first.starts, sum(first.runs))[dim] for dim in listed]
    translated = Call(call.target, *_mapped(_unmerged, call))
    result = tracer.stream(translated.replaced(name, starts[0] if isinstance(dims, int) else starts))
    if added > 0:
        runs = (*first.runs[: listed[0]], *((1,) * added), *first.runs[listed[0] :])
    else:
        runs = tuple(run for axis, run in enumerate(first.runs) if added == 0 or axis not in listed)
    if not isinstance(result, tuple):
        return as_seen(tracer, result, runs, parts[0].shape)
    return tuple(as_seen(tracer, each, runs, part.shape) for each, part in zip(result, parts, strict=True))


def _select(tracer: FoldingTracer, call: Call, value: Folded, merged: int, likes: Sequence[Tensor]) -> Any:
    """The largest or smallest of all positions, or some of them, and their places among them."""
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
    """Entries that a tensor names, of one axis that is not merged."""
    value, indices = call.bind("self", "indices")
    named = [axis for axis, index in enumerate(indices) if index is not None]
    if not isinstance(value, Folded) or len(named) != 1 or value.runs[named[0]] > 1:
        return NotStreamable("it works along merged axes of space")
    index = indices[named[0]]
    places = [*(None,) * value.starts[named[0]], index]
    result = tracer.stream(Call(call.target, (value.ref, places), {}))
    like = tracer.fake_seen(call)
    ones = (1,) * (like.dim() - len(value.runs) + 1)
    runs = (*value.runs[: named[0]], *ones, *value.runs[named[0] + 1 :])
    return as_seen(tracer, result, runs, like.shape)


def _reduce(tracer: FoldingTracer, call: Call) -> Any:
    """Sums, means and the like, over merged axes or beside them."""
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


# --- shared -------------------------------------------------------------------------------------------


def as_folded(tracer: FoldingTracer, value: Ref | Folded) -> Folded:
    """A value as one with merged axes, if only in runs of one."""
    return value if isinstance(value, Folded) else Folded(value, (1,) * len(tracer.spec(value).shape))


def as_seen(tracer: FoldingTracer, result: Any, runs: Runs, shape: Sequence[int]) -> Any:
    """A map or a global value as the code sees it, or why there is none."""
    if isinstance(result, NotStreamable):
        return result
    if tracer.axes(result) is None:
        return reshaped(tracer, result, tuple(shape))
    folded = Folded(result, runs)
    extents = tracer.spec(result).shape
    assert sum(runs) == len(extents), (runs, extents)
    assert folded.seen(extents) == tuple(shape), (runs, extents, shape)
    return folded if any(run > 1 for run in runs) else result


def reshaped(tracer: FoldingTracer, ref: Ref, after: tuple[int, ...]) -> Ref:
    if tracer.spec(ref).shape == after:
        return ref
    result: Ref = tracer.global_value(torch.Tensor.reshape, ref, after)
    return result


def values_of(call: Call) -> list[Ref | Folded]:
    leaves = pytree.tree_leaves((call.args, dict(call.kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, (Ref, Folded))]


def _mapped(function: Callable[[Any], Any], call: Call) -> tuple[Any, Any]:
    return pytree.tree_map(function, call.args), pytree.tree_map(function, dict(call.kwargs))


TRANSLATIONS: dict[Any, Callable[[FoldingTracer, Call], Any]] = {
    shape.reshape: _reshape,
    shape.permute: _permute,
    pointwise.pointwise: alike_folded,
    **dict.fromkeys((dropout.dropout, pointwise.from_shape, pointwise.from_metadata), _everywhere),
    shape.index_channels: _indexed,
    **dict.fromkeys((pointwise.linear, normalization.layer_norm, pointwise.trailing_norm), _trailing),
    **dict.fromkeys((shape.concatenate, shape.split, shape.unbind, shape.select, shape.slice_axis), _along),
    **dict.fromkeys((shape.flip, resampling.roll, along_axes.along_axis, losses.gather_channels), _along),
    **dict.fromkeys((reductions.mean_or_sum, reductions.extremum, reductions.truth), _reduce),
    **dict.fromkeys((reductions.vector_norm, reductions.variance, reductions.count), _reduce),
}
"""How a call is translated, by the rule that its operator has."""

MERGING = (shape.reshape, products.matrix_product, products.attention, sliding_blocks.blocks)
"""Rules of operators whose operands are whole maps, and that stream more than their rule does here."""
