"""Maps whose rows and columns the user's code has merged into one axis, as losses are often written.

``logits.view(n, c, -1)`` cannot be cut into tiles. Where all that follows treats every position alike, up to
sums over them, the same is done to the map as it was: only then is it taken for a :class:`FlatMap`. What fits
none of the forms here makes it whole, as any operator without a rule does.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from streamcnn.capture.capture import RawGraph, RawNode
from streamcnn.graph.ops.losses import Over, broadcast, loss_of_classes, loss_of_values, one_hot
from streamcnn.graph.ops.pointwise import along_channels, pointwise, rename
from streamcnn.graph.ops.reductions import extremum, mean_or_sum
from streamcnn.graph.ops.rules import Call, Tracer, rule_for
from streamcnn.graph.ops.shape import permute
from streamcnn.graph.program import Ref, refs_in
from streamcnn.graph.schemas import places_of_axes

aten = torch.ops.aten

_MERGING = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints)


@dataclass(frozen=True, slots=True)
class FlatMap:
    """A map (N, C, H, W), or of other axes, as a tensor that has several of its axes as one."""

    map: Ref
    groups: tuple[int, ...]
    """How many axes of the map each axis of the tensor stands for, one after another."""

    def axes(self, axis: int) -> tuple[int, ...]:
        """The map's axes that an axis of the tensor stands for."""
        start = sum(self.groups[:axis])
        return tuple(range(start, start + self.groups[axis]))

    def shape(self, tracer: Tracer) -> tuple[int, ...]:
        """The shape of the tensor."""
        extents = tracer.spec(self.map).shape
        return tuple(math.prod(extents[each] for each in self.axes(axis)) for axis in range(len(self.groups)))


def merges_for_sums(graph: RawGraph) -> frozenset[str]:
    """The reshapes after which only operators come that are alike at every position, up to sums."""
    asked = {*refs_in(graph.outputs), *graph.updates.values()}
    readers: dict[str, list[RawNode]] = {}
    found: dict[str, bool] = {}
    for node in reversed(graph.nodes):
        found[node.name] = node.name not in asked and all(
            _ends(reader) or (_is_alike(reader.target) and found[reader.name])
            for reader in readers.get(node.name, ())
        )
        for operand in node.operands:
            readers.setdefault(operand, []).append(node)
    return frozenset(node.name for node in graph.nodes if node.target in _MERGING and found[node.name])


def _ends(node: RawNode) -> bool:
    """Whether a call gives sums over positions."""
    rule = rule_for(node.target)
    if rule in (loss_of_values, loss_of_classes):
        return Over(Call(node.target, node.args, node.kwargs).bind("reduction")[0]) is not Over.NONE
    return rule in (mean_or_sum, extremum)


def _is_alike(target: Callable[..., Any]) -> bool:
    alike = (pointwise, along_channels, loss_of_values, loss_of_classes, one_hot, permute, broadcast)
    others = (aten.unsqueeze.default, operator.getitem, *_MERGING)
    return rule_for(target) in alike or target in others


def flat_maps_in(call: Call) -> Iterator[FlatMap]:
    """The flat maps among a call's arguments, once for each place."""
    pending: list[Any] = [*call.args, *call.kwargs.values()]
    while pending:
        value = pending.pop(0)
        if isinstance(value, FlatMap):
            yield value
        elif isinstance(value, (list, tuple)):
            pending[:0] = value


def merged(tracer: Tracer, call: Call) -> FlatMap | None:
    """The result of a reshape that merges the spatial axes of a map; ``None`` if that is not all it does."""
    operand = call.args[0]
    ref = operand.map if isinstance(operand, FlatMap) else operand
    if not isinstance(ref, Ref) or tracer.axes(ref) is None:
        return None
    before = operand.shape(tracer) if isinstance(operand, FlatMap) else tracer.spec(ref).shape
    after = call.target(torch.empty(before, device="meta"), *call.args[1:], **call.kwargs).shape
    groups = _groups(tracer.spec(ref).shape, after)
    if groups is None:
        return None
    for axis, size in enumerate(groups):
        if size == 0:
            place = sum(max(size, 1) for size in groups[:axis])
            ref = _recorded(tracer, Call(aten.unsqueeze.default, (ref, place), {}))
    flat = _without_ones(tracer, FlatMap(ref, tuple(max(size, 1) for size in groups)))
    spatial = set(tracer.axes(flat.map) or ())
    return flat if any(spatial <= set(flat.axes(axis)) for axis in range(len(groups))) else None


def _without_ones(tracer: Tracer, flat: FlatMap) -> FlatMap:
    """The same without axes of extent 1 among those that are merged: whatever was merged, it is one map."""
    extents, spatial = tracer.spec(flat.map).shape, tracer.axes(flat.map) or ()
    ones = [
        [axis for axis in flat.axes(dim) if size > 1 and extents[axis] == 1 and axis not in spatial]
        for dim, size in enumerate(flat.groups)
    ]
    found = flat.map
    for axis in sorted((axis for each in ones for axis in each), reverse=True):
        found = _recorded(tracer, Call(aten.squeeze.dim, (found, axis), {}))
    return FlatMap(found, tuple(size - len(each) for size, each in zip(flat.groups, ones, strict=True)))


def _groups(before: Sequence[int], after: Sequence[int]) -> tuple[int, ...] | None:
    """How many axes each axis after a reshape has of those before; none is a new axis of extent 1."""
    groups: list[int] = []
    place = 0
    for extent in after:
        count, product = 0, 1
        while product != extent or (count == 0 and place < len(before) and before[place] == 1):
            if place == len(before) or extent % product:
                return None
            product, place, count = product * before[place], place + 1, count + 1
        groups.append(count)
    if not groups or math.prod(before[place:]) != 1:
        return None
    return (*groups[:-1], groups[-1] + len(before) - place)


def on_flat_maps(tracer: Tracer, call: Call) -> FlatMap | Ref | tuple[FlatMap, ...] | None:
    """A call with flat maps among its operands, done to the maps; ``None`` if it has no such form."""
    rule = rule_for(call.target)
    if call.target in _MERGING:
        return merged(tracer, call)
    if rule in (pointwise, loss_of_values):
        return _alike(tracer, call)
    if rule is loss_of_classes:
        return _classes(tracer, call)
    if rule is broadcast:
        flats = tuple(flat_maps_in(call))
        is_same = len(flats) == len(call.args[0]) and len({flat.shape(tracer) for flat in flats}) == 1
        return flats if is_same else None
    flat = call.args[0]
    if not isinstance(flat, FlatMap):
        return None
    if rule in (mean_or_sum, extremum):
        return _reduced(tracer, call, flat)
    if rule is permute:
        return _permuted(tracer, call, flat)
    if rule is one_hot:
        return _flat(tracer, Call(call.target, (flat.map, *call.args[1:]), call.kwargs), (*flat.groups, 1))
    if rule is along_channels and len(call.args) > 1:
        axes = flat.axes(call.args[1] % len(flat.groups))
        along = Call(call.target, (flat.map, axes[0], *call.args[2:]), call.kwargs)
        return _flat(tracer, along, flat.groups) if len(axes) == 1 else None
    if call.target is aten.unsqueeze.default:
        dim = call.args[1] % (len(flat.groups) + 1)
        place = Call(call.target, (flat.map, sum(flat.groups[:dim])), {})
        return _flat(tracer, place, (*flat.groups[:dim], 1, *flat.groups[dim:]))
    return None


def _recorded(tracer: Tracer, call: Call) -> Any:
    rule = rule_for(call.target)
    assert rule is not None
    return rule(tracer, call)


def _flat(tracer: Tracer, call: Call, groups: tuple[int, ...]) -> FlatMap | Ref | None:
    """The result of a call on maps: flat like its operands, or a global value."""
    result = _recorded(tracer, call)
    if not isinstance(result, Ref):
        return None
    return result if tracer.axes(result) is None else FlatMap(result, groups)


def _alike(tracer: Tracer, call: Call) -> FlatMap | Ref | None:
    """An operator on maps that are flat in the same way, and on global values that broadcast to them."""
    groups = {flat.groups for flat in flat_maps_in(call)}
    if len(groups) != 1:
        return None
    (common,) = groups
    renamed: dict[str, Ref] = {}
    for name in refs_in((call.args, dict(call.kwargs))):
        shape = _unmerged(tracer.spec(Ref(name)).shape, common)
        if shape is None or tracer.axes(Ref(name)) is not None:
            return None
        renamed[name] = tracer.global_value(aten.reshape.default, Ref(name), shape)
    on_maps = replaced(call, lambda flat: flat.map)
    return _flat(tracer, rename(on_maps, renamed), common)


def _unmerged(shape: tuple[int, ...], groups: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of a value for maps, if it has one value for each axis that is several of theirs."""
    if len(shape) > len(groups):
        return None
    pairs = list(zip(shape, groups[len(groups) - len(shape) :], strict=True))
    if any(extent != 1 and size != 1 for extent, size in pairs):
        return None
    return tuple(extent for extent, size in pairs for _ in range(size))


def _classes(tracer: Tracer, call: Call) -> FlatMap | Ref | None:
    """A loss of scores (N, C, P) or (P, C) and classes (N, P) or (P,)."""
    scores, target = call.bind("self", "target")
    if not (isinstance(scores, FlatMap) and isinstance(target, FlatMap)):
        return None
    on_maps = replaced(call, lambda flat: flat.map)
    if (scores.groups, target.groups) == ((1, 1, 2), (1, 2)):
        return _flat(tracer, on_maps, target.groups)
    if scores.groups != (*target.groups, 1):
        return None
    # Channels come last: (N, H, W, C), or (H, W, C) of one image.
    first, second = scores.map, target.map
    if target.groups == (2,):
        first, second = (_recorded(tracer, Call(aten.unsqueeze.default, (m, 0), {})) for m in (first, second))
    first = _recorded(tracer, Call(aten.permute.default, (first, (0, 3, 1, 2)), {}))
    result = _flat(tracer, Call(call.target, (first, second, *on_maps.args[2:]), on_maps.kwargs), (3,))
    return _without_ones(tracer, result) if isinstance(result, FlatMap) else result


def _reduced(tracer: Tracer, call: Call, flat: FlatMap) -> FlatMap | Ref | None:
    """A sum, mean or extremum over some axes."""
    if call.target in (aten.sum.default, aten.mean.default):
        return _flat(tracer, Call(call.target, (flat.map,), call.kwargs), ())
    dims, keepdim = call.bind("dim", "keepdim")
    every = range(len(flat.groups))
    chosen = {dim % len(flat.groups) for dim in dims} if dims else set(every)
    axes = [axis for dim in sorted(chosen) for axis in flat.axes(dim)]
    others = {key: value for key, value in call.kwargs.items() if key not in ("dim", "keepdim")}
    left = flat.groups if keepdim else tuple(flat.groups[dim] for dim in every if dim not in chosen)
    result = _flat(tracer, Call(call.target, (flat.map, axes, keepdim), others), left)
    if isinstance(result, Ref) and keepdim:
        shape = tuple(1 if dim in chosen else extent for dim, extent in enumerate(flat.shape(tracer)))
        kept: Ref = tracer.global_value(aten.reshape.default, result, shape)
        return kept
    return result


def _permuted(tracer: Tracer, call: Call, flat: FlatMap) -> FlatMap | Ref | None:
    """Axes in another order."""
    places = places_of_axes(call.target, len(flat.groups), call.args[1:], call.kwargs)
    order = sorted(range(len(places)), key=places.__getitem__)
    axes = [axis for dim in order for axis in flat.axes(dim)]
    groups = tuple(flat.groups[dim] for dim in order)
    return _flat(tracer, Call(aten.permute.default, (flat.map, axes), {}), groups)


def replaced(call: Call, value_of: Callable[[FlatMap], Ref]) -> Call:
    """The call on what ``value_of`` gives for each flat map."""

    def on_map(value: Any) -> Any:
        if isinstance(value, FlatMap):
            return value_of(value)
        return type(value)(map(on_map, value)) if isinstance(value, (list, tuple)) else value

    kwargs = {key: on_map(value) for key, value in call.kwargs.items()}
    return Call(call.target, tuple(map(on_map, call.args)), kwargs)
