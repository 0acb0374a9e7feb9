"""Maps that are concatenated along a spatial axis, or cut into parts along one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from streamcnn.geometry.axis_maps import Same, Sliding
from streamcnn.geometry.regions import Interval, Region
from streamcnn.graph.costs import NOTHING, Cost, declare
from streamcnn.graph.ops.pointwise import pointwise
from streamcnn.graph.ops.rules import Call, NotStreamable, Sample, Tracer
from streamcnn.graph.ops.samples import chain
from streamcnn.graph.program import Access, Axes, Ref

aten = torch.ops.aten

MOST_PARTS = 16
"""Largest number of parts that is streamed: each tile reads at least one position of every part."""


def join(tracer: Tracer, refs: Sequence[Ref], dim: int, like: Tensor, axes: Axes) -> Ref | NotStreamable:
    """Record the concatenation of maps along the spatial axis ``dim``."""
    if len(refs) > MOST_PARTS:
        return NotStreamable(f"it joins more than {MOST_PARTS} maps along a spatial axis")
    sizes = tuple(tracer.spec(ref).shape[dim] for ref in refs)
    accesses: dict[str, Access] = {}
    parts = []
    for ref, start in zip(refs, (0, *accumulate(sizes)), strict=False):
        part = ref
        if tracer.spec(ref).dtype != like.dtype:
            # A tile with positions of one map alone would have that map's dtype.
            part = pointwise(tracer, Call(aten.to.dtype, (ref, like.dtype), {}))
        if part.name in accesses:
            # The accesses of an operator are kept by operand name.
            part = _again(tracer, part, axes)
        along = Sliding(padding=start)
        accesses[part.name] = Access(along, Same()) if dim == axes[0] else Access(Same(), along)
        parts.append(part)
    return tracer.local(
        joined, (parts, dim, sizes, axes), like=like, axes=axes, accesses=accesses, positional=True
    )


def _again(tracer: Tracer, ref: Ref, axes: Axes) -> Ref:
    """Record an alias of a map, to have it under another name."""
    call = Call(aten.alias.default, (ref,), {})
    return tracer.local(
        call.target, call.args, like=tracer.fake(call), axes=axes, accesses={ref.name: Access()}
    )


def joined(
    parts: Sequence[Tensor], dim: int, sizes: tuple[int, ...], axes: Axes, *, out: Region, origin: Region
) -> Tensor:
    """Positions ``out`` of the concatenation of maps with ``sizes`` along ``dim``.

    For a map without any of these positions, ``parts`` holds one position that is not used.
    """
    wanted = out[axes.index(dim)]
    starts = (0, *accumulate(sizes))
    met = [
        part
        for part, start, stop in zip(parts, starts, starts[1:], strict=False)
        if wanted.intersect(Interval(start, stop)).size
    ]
    return met[0] if len(met) == 1 else torch.cat(met, dim)


declare(joined, cost=Cost(saves=NOTHING))


class _Quarters(nn.Module):
    """As in multi-patch networks: quarters go through layers by themselves, then halves, then the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        whole, halves, quarters = self.layers
        middle = x.shape[3] // 2
        parts = []
        for half in x.chunk(2, 2):
            left, right = quarters(half[..., :middle]), quarters(half[..., middle:])
            parts.append(halves(torch.cat((left, right), 3).relu()))
        y = torch.cat(parts, 2)
        first, last = y[:, :, :5], y.tensor_split((8,), 2)[1]
        zeros = x.new_zeros((*x.shape[:2], 3, x.shape[3]))
        result: Tensor = whole(y.sin()) + torch.cat((last, zeros, first, first), 2)[:, :, : y.shape[2]]
        return result


SAMPLES = (Sample("quarters and halves of a map", lambda: chain(nn.Conv2d(3, 4, 3), _Quarters())),)
