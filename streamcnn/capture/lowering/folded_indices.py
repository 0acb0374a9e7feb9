"""A few of a map's tokens by their indices, such as those with the largest scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from streamcnn.capture.lowering.folding import Folded, FoldingTracer, is_global, reshaped
from streamcnn.graph.costs import NOTHING, Cost, declare
from streamcnn.graph.fakes import is_fake
from streamcnn.graph.ops.late_checks import check_late
from streamcnn.graph.ops.rules import Call
from streamcnn.graph.ops.top_positions import MOST, AtIndices
from streamcnn.graph.program import Ref

aten = torch.ops.aten

_BY_INDEX = (aten.gather.default, aten.index_select.default, aten.index.Tensor)


def at_indices(tracer: FoldingTracer, call: Call) -> Ref | None:
    """The values at given indices of all positions; None if the call is another, or picks too many."""
    if call.target not in _BY_INDEX:
        return None
    if call.target is aten.index.Tensor and len(named_axes(call)) == 2:
        return _of_other_images(tracer, call)
    value, axis, index = _operands(call)
    if not isinstance(value, Folded) or index is None or not is_global(tracer, index):
        return None
    extents, axes = tracer.spec(value.ref).shape, tracer.axes(value.ref)
    seen, given = value.seen(extents), tracer.spec(index).shape
    axis %= len(seen)
    assert axes is not None
    if tracer.spec(index).dtype not in (torch.int64, torch.int32) or _merged(value, axis, extents) != axes:
        return None
    is_gather = call.target is aten.gather.default
    count = given[axis] if is_gather else math.prod(given)
    beside = [place for place in range(len(seen)) if place != axis]
    if not 0 < count <= MOST or (is_gather and any(given[place] != seen[place] for place in beside)):
        return None
    others = [place for place in range(len(extents)) if place not in axes]
    x = tracer.stream(Call(aten.permute.default, (value.ref, [*others, *axes]), {}))
    shape = tracer.spec(x).shape
    places = tracer.global_value(known_places, index, seen[axis], call.target is aten.index.Tensor)
    if is_gather:
        turned = tracer.global_value(aten.permute.default, places, [*beside, axis])
        places = reshaped(tracer, turned, (*shape[:-2], count))
    else:
        line = reshaped(tracer, places, (count,))
        places = tracer.global_value(aten.expand.default, line, (*shape[:-2], count))
    reduction = AtIndices(shape, (len(shape) - 2, len(shape) - 1), True, count)
    values, _ = tracer.reduce(reduction, x, places)
    values = reshaped(tracer, values, (*(seen[place] for place in beside), count))
    order = [*range(axis), len(beside), *range(axis, len(beside))]
    values = tracer.global_value(aten.permute.default, values, order)
    return reshaped(tracer, values, tuple(tracer.fake_seen(call).shape))


def _operands(call: Call) -> tuple[Any, int, Any]:
    """What is indexed, along which axis, and the indices; None for those of several axes."""
    if call.target is not aten.index.Tensor:
        value, axis, index = call.bind("self", "dim", "index")
        return value, axis, index
    value, indices = call.bind("self", "indices")
    named = named_axes(call)
    return value, named[0], indices[named[0]] if len(named) == 1 else None


def named_axes(call: Call) -> list[int]:
    """The axes for which ``x[...]`` has indices."""
    return [place for place, index in enumerate(call.bind("indices")[0]) if index is not None]


def _of_other_images(tracer: FoldingTracer, call: Call) -> Ref | None:
    """Tokens by indices of theirs and of another axis, as ``x[torch.arange(n)[:, None], index]``.

    The tokens at all of the indices are taken of each image first.
    """
    value, indices = call.bind("self", "indices")
    places = named_axes(call)
    if not isinstance(value, Folded) or not all(is_global(tracer, indices[place]) for place in places):
        return None
    merged = [
        place for place in places if not set(value.span(place)).isdisjoint(tracer.axes(value.ref) or ())
    ]
    if len(merged) != 1 or any(tracer.spec(indices[place]).dtype != torch.int64 for place in places):
        return None
    (axis,) = merged
    (other,) = (place for place in places if place != axis)
    given = (tracer.spec(indices[place]).shape for place in places)
    shape = torch.broadcast_shapes(*given)  # type: ignore[no-untyped-call]
    each = tracer.global_value(aten.expand.default, indices[axis], shape)
    line = reshaped(tracer, each, (math.prod(shape),))
    of_each = at_indices(tracer, Call(aten.index.Tensor, (value, [*(None,) * axis, line]), {}))
    if of_each is None:
        return None
    numbered = tracer.global_value(order_of, each)
    found = [None] * len(indices)
    found[axis], found[other] = numbered, indices[other]
    result: Ref = tracer.global_value(aten.index.Tensor, of_each, found)
    return result


def order_of(index: Tensor) -> Tensor:
    """The place of each entry among all, in the shape of ``index``."""
    return torch.arange(index.numel(), device=index.device).view(index.shape)


def _merged(value: Folded, axis: int, extents: Sequence[int]) -> tuple[int, ...]:
    """The map's axes of more than one position that make up an axis, in order, and its spatial ones."""
    return tuple(place for place in value.span(axis) if extents[place] > 1)


def known_places(index: Tensor, total: int, wraps: bool) -> Tensor:
    """Indices as integers of 64 bits, counted from the front; a late check refuses those out of bounds.

    Parameters
    ----------
    wraps
        Whether negative indices count from the end.

    Raises
    ------
    IndexError
        For an index out of bounds; on a GPU when the phase ends.
    """
    places = index.long()
    if wraps:
        places = torch.where(places < 0, places + total, places)
    if not is_fake(places):

        def check(found: list[int]) -> None:
            for place in found:
                if not 0 <= place < total:
                    raise IndexError(f"index {place} is out of bounds for {total} positions")

        check_late(torch.stack(places.aminmax()), check)
    return places.clamp(0, total - 1)


declare(known_places, order_of, cost=Cost(saves=NOTHING, detaches=True))
