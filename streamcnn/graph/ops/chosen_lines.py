"""Rows or columns of a map by a tensor of indices, of which each tile reads whole lines."""

from __future__ import annotations

import torch
from torch import Tensor

from streamcnn.geometry.axis_maps import All, Same
from streamcnn.geometry.regions import Region
from streamcnn.graph.costs import NOTHING, Cost, declare
from streamcnn.graph.ops.rules import Tracer
from streamcnn.graph.program import Access, Ref


def lines_at(tracer: Tracer, ref: Ref, dim: int, index: Ref, like: Tensor) -> Ref:
    """Record the rows or columns, along the spatial axis ``dim``, at the integers ``index`` (K,)."""
    axes, shape = tracer.axes(ref), tracer.spec(ref).shape
    assert axes is not None
    rows, cols = (All(shape[axis]) if axis == dim else Same() for axis in axes)
    return tracer.local(
        chosen_lines,
        (ref, index, dim, axes.index(dim)),
        like=like,
        axes=axes,
        accesses={ref.name: Access(rows, cols)},
        positional=True,
    )


def chosen_lines(x: Tensor, index: Tensor, dim: int, side: int, *, out: Region, origin: Region) -> Tensor:
    """Lines ``out`` of those at ``index``, counted from the end if negative, of ``x`` with all lines.

    Raises
    ------
    IndexError
        For an index out of bounds, on a CPU.
    """
    wanted = index[out[side].start : out[side].stop].to(x.device)
    return x.index_select(dim, torch.where(wanted < 0, wanted + x.shape[dim], wanted))


# Backward, lines are added into zeros, in order.
declare(chosen_lines, cost=Cost(workspace=lambda nbytes: nbytes.operands, saves=NOTHING))
