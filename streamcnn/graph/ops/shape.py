"""Operators that move values without computing: permute, reshape, concat, slices of channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from streamcnn.geometry.axis_maps import AxisMap, Repeated, Reversed, Same, Sliding
from streamcnn.geometry.regions import Region
from streamcnn.geometry.windows import with_extents
from streamcnn.graph.costs import NOTHING, Cost, declare
from streamcnn.graph.ops import chosen_lines, joining
from streamcnn.graph.ops.pointwise import per_position, pointwise
from streamcnn.graph.ops.rules import Call, NotStreamable, Sample, Tracer, rule
from streamcnn.graph.program import Access, Axes, Ref
from streamcnn.graph.schemas import places_of_axes

aten = torch.ops.aten


def _axes(tracer: Tracer, ref: Ref) -> Axes:
    axes = tracer.axes(ref)
    assert axes is not None
    return axes


@rule(
    aten.permute.default,
    aten.transpose.int,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.moveaxis.int,
    aten.moveaxis.intlist,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.mT.default,
    aten.adjoint.default,
    aten.t.default,
)
def permute(tracer: Tracer, call: Call) -> Ref:
    """Axes in another order."""
    ref = call.args[0]
    ndim = len(tracer.spec(ref).shape)
    places = places_of_axes(call.target, ndim, call.args[1:], call.kwargs)
    rows, cols = (places[axis] for axis in _axes(tracer, ref))
    accesses = {ref.name: Access()}
    like = tracer.fake(call)
    return tracer.local(call.target, call.args, call.kwargs, like=like, axes=(rows, cols), accesses=accesses)


@rule(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.expand.default,
    aten.broadcast_to.default,
    aten.view_as.default,
    aten.reshape_as.default,
)
def reshape(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """A reshape in which each spatial axis stays outermost in its group of axes.

    A spatial axis that is split becomes its outer part, the inner part being a channel (space to depth). One
    that is merged with the axes right after it becomes the merged axis (depth to space).
    """
    ref = call.args[0]
    like = tracer.fake(call)
    if tracer.axes(ref) is None:
        return NotStreamable("it gives a global value the shape of a map")
    before, axes = tracer.spec(ref).shape, _axes(tracer, ref)
    if call.target in (aten.expand.default, aten.broadcast_to.default):
        return _expand(tracer, ref, like, axes)
    moves = moved_axes(before, like.shape, axes)
    if moves is None:
        return NotStreamable("it merges a spatial axis with another or splits it unevenly")
    rows, cols = moves
    return tracer.local(
        regrouped,
        (ref, tuple(like.shape), moves),
        like=like,
        axes=(rows.place, cols.place),
        accesses={ref.name: Access(rows.access, cols.access)},
    )


@dataclass(frozen=True, slots=True)
class Move:
    """The effect of a reshape on a spatial axis."""

    axis: int
    """The axis before."""
    place: int
    """The axis after."""
    size: int
    """Its extent before."""
    result: int
    """Its extent after: smaller by an integer factor if the axis is split, larger if it is merged."""

    @property
    def access(self) -> AxisMap:
        """How positions after the reshape depend on those before."""
        if self.result == self.size:
            return Same()
        if self.result < self.size:
            factor = self.size // self.result
            return Sliding(factor, factor)
        return Repeated(self.result // self.size)


def moved_axes(before: Sequence[int], after: Sequence[int], axes: Axes) -> tuple[Move, Move] | None:
    """The effect of a reshape on both spatial axes; ``None`` if one is not outermost in a group of its own.

    A group is the shortest run of axes with the same elements before and after. A tile is reshaped like the
    whole map if the spatial axis is the outermost one of its group on both sides.
    """
    found: dict[int, Move] = {}
    free, taken = 0, 0
    for axis in sorted(axes):
        if axis < taken:
            return None
        candidates = [
            (Move(axis, place, before[axis], after[place]), stop, end)
            for place in range(free, len(after))
            if math.prod(after[:place]) == math.prod(before[:axis])
            for stop, end in _group(before, after, axis, place)
            if max(before[axis], after[place]) % min(before[axis], after[place]) == 0
        ]
        if not candidates:
            return None
        # Prefer one that keeps its extent; else, among several due to axes of extent 1, the longest.
        found[axis], taken, free = max(candidates, key=lambda c: (c[0].result == c[0].size, c[0].result))
    return found[axes[0]], found[axes[1]]


def _group(before: Sequence[int], after: Sequence[int], axis: int, place: int) -> list[tuple[int, int]]:
    """The ends, before and after, of the group that begins at ``axis`` and ``place``: one pair, or none."""
    stop, end = axis + 1, place + 1
    held, holds = before[axis], after[place]
    while held != holds:
        if held < holds and stop < len(before):
            held, stop = held * before[stop], stop + 1
        elif holds < held and end < len(after):
            holds, end = holds * after[end], end + 1
        else:
            return []
    return [(stop, end)]


def regrouped(x: Tensor, shape: tuple[int, ...], moves: tuple[Move, Move]) -> Tensor:
    """The tile's part of ``x.reshape(shape)``, for a tile of whole groups."""
    extents = list(shape)
    for move in moves:
        extents[move.place] = x.shape[move.axis] * move.result // move.size
    return x.reshape(extents)


def _expand(tracer: Tracer, ref: Ref, like: Tensor, axes: Axes) -> Ref | NotStreamable:
    before, after = tracer.spec(ref).shape, tuple(like.shape)
    shift = len(after) - len(before)
    if any(before[axis] != after[axis + shift] for axis in axes):
        return NotStreamable("it repeats a spatial axis")
    moved = (axes[0] + shift, axes[1] + shift)
    return tracer.local(
        expanded,
        (ref, after, moved),
        like=like,
        axes=moved,
        accesses={ref.name: Access()},
        positional=True,
    )


def expanded(x: Tensor, shape: tuple[int, ...], axes: Axes, *, out: Region, origin: Region) -> Tensor:
    """The tile's part of ``x.expand(shape)``."""
    return x.expand(with_extents(shape, axes, out.size))


@rule(aten.cat.default, aten.concat.default, aten.concatenate.default, aten.stack.default)
def concatenate(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """Maps side by side along any axis; of one size, unless that is a spatial one."""
    refs, dim = call.bind("tensors", "dim")
    kept = [ref for ref in refs if tracer.spec(ref).shape != (0,)]
    if len(kept) < len(refs):
        result: Ref | NotStreamable = _joined_to_nothing(tracer, call, kept)
        return result
    if any(tracer.axes(ref) is None for ref in refs):
        refs = [_as_map(tracer, ref, refs) for ref in refs]
    like = tracer.fake(call)
    all_axes = {tracer.axes(ref) for ref in refs}
    if None in all_axes or len(all_axes) != 1:
        return NotStreamable("its operands have their spatial axes at different places")
    rows, cols = _axes(tracer, refs[0])
    dim = dim % like.dim()
    if call.target is aten.stack.default:
        rows, cols = rows + (dim <= rows), cols + (dim <= cols)
    if dim in (rows, cols):
        return joining.join(tracer, refs, dim, like, (rows, cols))
    accesses = {ref.name: Access() for ref in refs}
    return tracer.local(call.target, (list(refs), dim), like=like, axes=(rows, cols), accesses=accesses)


def _joined_to_nothing(tracer: Tracer, call: Call, refs: list[Ref]) -> Any:
    """A concat without operands of shape (0,), with which lists begin; these count for the dtype alone."""
    dtype = tracer.fake(call).dtype
    joined = concatenate(tracer, call.replaced("tensors", refs))
    if isinstance(joined, NotStreamable) or tracer.spec(joined).dtype == dtype:
        return joined
    return pointwise(tracer, Call(aten.to.dtype, (joined, dtype), {}))


declare(
    *(aten.cat, aten.channel_shuffle, aten.flip, aten.repeat, aten.repeat_interleave, aten.stack),
    cost=Cost(saves=NOTHING),
)


def _as_map(tracer: Tracer, ref: Ref, refs: Sequence[Ref]) -> Ref:
    """A global value that is joined with maps, as a map."""
    if tracer.axes(ref) is not None:
        return ref
    axes = next(axes for other in refs if (axes := tracer.axes(other)) is not None)
    return tracer.promote(ref, axes)


@rule(
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
)
def split(tracer: Tracer, call: Call) -> tuple[Ref, ...] | NotStreamable:
    """Consecutive ranges of an axis."""
    ref, dim = call.bind("self", "dim")
    parts = tracer.fake(call)
    dim = dim % parts[0].dim()
    if dim in _axes(tracer, ref) and len(parts) > joining.MOST_PARTS:
        return NotStreamable(f"it splits a spatial axis into more than {joining.MOST_PARTS} parts")
    starts = [0, *accumulate(part.shape[dim] for part in parts)]
    return tuple(
        slice_axis(tracer, Call(aten.slice.Tensor, (ref, dim, start, stop, 1), {}))
        for start, stop in pairwise(starts)
    )


@rule(aten.unbind.int)
def unbind(tracer: Tracer, call: Call) -> tuple[Ref, ...] | NotStreamable:
    """Each entry of an axis that is not spatial."""
    ref, dim = call.bind("self", "dim")
    shape = tracer.spec(ref).shape
    dim = dim % len(shape)
    if dim in _axes(tracer, ref):
        return NotStreamable("it splits a spatial axis")
    return tuple(_entry(tracer, ref, dim, index) for index in range(shape[dim]))


@rule(aten.select.int)
def select(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """One entry of an axis that is not spatial."""
    ref, dim, index = call.bind("self", "dim", "index")
    dim = dim % len(tracer.spec(ref).shape)
    if dim in _axes(tracer, ref):
        return NotStreamable("it takes one row or column of a map")
    return _entry(tracer, ref, dim, index)


def _entry(tracer: Tracer, ref: Ref, dim: int, index: int) -> Ref:
    call = Call(aten.select.int, (ref, dim, index), {})
    return per_position(tracer, call, ref, dropped=(dim,))


@rule(aten.slice.Tensor, aten.narrow.default)
def slice_axis(tracer: Tracer, call: Call) -> Ref:
    """A range along any axis; along a spatial one it shifts and strides the window."""
    like = tracer.fake(call)
    ref, dim = call.args[0], call.bind("dim")[0] % like.dim()
    axes = _axes(tracer, ref)
    if dim not in axes:
        return per_position(tracer, call, ref)
    if call.target is aten.narrow.default:
        (start,), step = call.bind("start"), 1
    else:
        start, step = call.bind("start", "step")
    size = tracer.spec(ref).shape[dim]
    first = max(start + size, 0) if (start or 0) < 0 else start or 0
    along = Sliding(1, step, -first)
    access = Access(rows=along) if dim == axes[0] else Access(cols=along)
    return tracer.local(strided, (ref, dim, step), like=like, axes=axes, accesses={ref.name: access})


def strided(x: Tensor, dim: int, step: int) -> Tensor:
    """Every ``step``-th entry of ``x`` along ``dim``."""
    return x if step == 1 else aten.slice.Tensor(x, dim, 0, None, step)


@rule(aten.flip.default)
def flip(tracer: Tracer, call: Call) -> Ref:
    """Entries of any axes in reverse order."""
    ref, dims = call.bind("self", "dims")
    shape, axes = tracer.spec(ref).shape, _axes(tracer, ref)
    turned = {dim % len(shape) for dim in dims}
    rows, cols = (Reversed(shape[axis]) if axis in turned else Same() for axis in axes)
    accesses = {ref.name: Access(rows, cols)}
    return tracer.local(call.target, call.args, like=tracer.fake(call), axes=axes, accesses=accesses)


@rule(aten.unfold.default)
def unfold(tracer: Tracer, call: Call) -> Ref:
    """``Tensor.unfold``: windows along an axis, each along a new last axis."""
    ref, dim, size, step = call.bind("self", "dimension", "size", "step")
    axes = _axes(tracer, ref)
    dim = dim % len(tracer.spec(ref).shape)
    rows, cols = (Sliding(size, step) if axis == dim else Same() for axis in axes)
    accesses = {ref.name: Access(rows, cols)}
    return tracer.local(call.target, call.args, like=tracer.fake(call), axes=axes, accesses=accesses)


@rule(aten.channel_shuffle.default, aten.repeat.default, aten.repeat_interleave.self_int)
def rearrange_channels(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """Channels in another order, or repeated."""
    ref = call.args[0]
    axes, ndim = _axes(tracer, ref), len(tracer.spec(ref).shape)
    if call.target is aten.channel_shuffle.default and 1 in axes:
        return NotStreamable("it shuffles rows or columns")
    if call.target is aten.repeat_interleave.self_int:
        dim = call.bind("dim")[0]
        if dim is None or dim % ndim in axes:
            return NotStreamable("it repeats rows or columns")
    if call.target is aten.repeat.default:
        repeats = call.args[1]
        if len(repeats) != ndim or any(repeats[axis] != 1 for axis in axes):
            return NotStreamable("it repeats a map along space")
    return per_position(tracer, call, ref)


@rule(aten.index.Tensor)
def index_channels(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """Entries of one axis that is not spatial, by a tensor of indices: ``x[:, order]``."""
    ref, indices = call.bind("self", "indices")
    places = [place for place, index in enumerate(indices) if index is not None]
    if tracer.axes(ref) is None or any(tracer.axes(indices[place]) is not None for place in places):
        return NotStreamable("which entries it takes depends on the position")
    like = tracer.fake(call)
    if len(places) == 1 and places[0] in _axes(tracer, ref):
        index = tracer.spec(indices[places[0]])
        if len(index.shape) == 1 and index.dtype == torch.int64:
            return chosen_lines.lines_at(tracer, ref, places[0], indices[places[0]], like)
    if len(places) != 1 or places[0] in _axes(tracer, ref):
        return NotStreamable(
            "it takes rows or columns by several axes of indices, or entries of several axes"
        )
    more = like.dim() - len(tracer.spec(ref).shape)
    rows, cols = (axis + more * (places[0] < axis) for axis in _axes(tracer, ref))
    accesses = {ref.name: Access()}
    return tracer.local(call.target, call.args, like=like, axes=(rows, cols), accesses=accesses)


# Backward, entries are added into zeros, in order.
declare(aten.index, cost=Cost(workspace=lambda nbytes: nbytes.operands, saves=NOTHING))


class _Rearranged(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        first, second, third = x.chunk(3, 1)
        stacked = torch.stack((first, second * 2, third.sin()), 1).sum(1)
        n, c, h, w = x.shape
        shuffled = x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)
        cropped = x[:, 1:4, 3:-2:2, 1::3]
        turned = x.permute(3, 0, 2, 1).cos().permute(1, 3, 2, 0).flip(1, 2) * x.flip(3)
        windows = x[:, torch.tensor([5, 2])].unfold(3, 3, 1).unfold(2, 2, 3).amax((4, 5))
        joined = torch.cat((stacked, shuffled, turned, x[:, :, :, :]), 1)
        return torch.cat((joined.mean((2, 3)), (cropped * cropped).sum((2, 3)), windows.mean((2, 3))), 1)


def _sample() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=2), nn.ChannelShuffle(2), _Rearranged())


SAMPLES: tuple[Any, ...] = (
    Sample("chunk, stack, shuffle, permute, flip, spatial slices, windows", _sample),
    Sample(
        "flatten over space",
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(5740, 3)),
        resident=True,
    ),
)
