"""Maps whose positions are weighted sums of given positions along each axis: resampling of any kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from streamcnn.geometry.regions import Interval, Region
from streamcnn.geometry.windows import layout
from streamcnn.graph.costs import NOTHING, CallBytes, Cost, declare, windows
from streamcnn.graph.ops.constants import numbers
from streamcnn.graph.ops.rules import Tracer
from streamcnn.graph.ops.taps import Taps
from streamcnn.graph.program import Access, Axes, Ref


def gathered(tracer: Tracer, ref: Ref, like: Tensor, axes: Axes, taps: Sequence[Taps]) -> Ref:
    """Record a map each of whose positions is a weighted sum of positions of ``ref``, along each axis."""
    rows, cols = taps
    return tracer.local(
        gather_positions,
        (ref, (rows, cols), axes),
        like=like,
        axes=axes,
        accesses={ref.name: Access(rows.access, cols.access)},
        positional=True,
        heavy=True,
    )


def gather_positions(
    x: Tensor, taps: tuple[Taps, Taps], axes: Axes, *, out: Region, origin: Region
) -> Tensor:
    """Positions ``out`` of a gathered map, from ``x`` which covers ``origin`` of its operand."""
    return gather_unrounded(x, taps, axes, out=out, origin=origin).to(x.dtype)


def gather_unrounded(
    x: Tensor, taps: tuple[Taps, Taps], axes: Axes, *, out: Region, origin: Region
) -> Tensor:
    """As :func:`gather_positions`, but not rounded: in float32 for half precision."""
    along = list(zip(axes, taps, out, origin, strict=True))
    # The axis that becomes shorter first: the intermediate is then no larger than operand or result.
    for axis, each, wanted, at_hand in sorted(along, key=lambda one: one[2].size / one[3].size):
        x = _gather_along(x, axis, each, wanted, at_hand)
    return x


def _gather_along(x: Tensor, axis: int, taps: Taps, wanted: Interval, at_hand: Interval) -> Tensor:
    """Positions ``wanted`` along one axis, from ``x`` which covers ``at_hand``."""
    places = _taken(taps.sources, wanted, at_hand)
    if taps.weights is None:
        return _take(x, axis, places[0])
    here = slice(wanted.start, wanted.stop)
    weights = [each[here] for each in taps.weights]
    missing = [taps.missing(tap, here) for tap in range(len(weights))]
    result: Tensor = _WeightedSum.apply(x, axis, places, weights, missing)  # type: ignore[no-untyped-call]
    return result


class _WeightedSum(torch.autograd.Function):
    """Weighted sums of positions along an axis, tap by tap; each tap's values are freed before the next.

    Half precision is summed in float32, and not rounded.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        axis: int,
        places: list[list[int]],
        weights: list[tuple[float, ...]],
        missing: list[list[bool] | None],
    ) -> Tensor:
        ctx.taps = (axis, places, weights, missing)
        ctx.extent, ctx.dtype = x.shape[axis], x.dtype
        shape = [-1 if dim == axis else 1 for dim in range(x.dim())]
        dtype = _sum_dtype(x.dtype)
        total = None
        for each, factors, lacks in zip(places, weights, missing, strict=True):
            factor = numbers(factors, dtype, beside=x).reshape(shape)
            # A name for the taken values would keep them alive until the next tap is taken.
            if total is None:
                # No result lacks the first tap.
                total = _take(x, axis, each) * factor
            elif lacks is None:
                total.addcmul_(_take(x, axis, each), factor)
            else:
                # Taken values are a copy if places repeat, and a view if they follow each other.
                taken = _take(x, axis, each)
                total.addcmul_(_without(taken.clone() if _is_run(each) else taken, lacks, shape), factor)
                del taken
        assert total is not None
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (axis, places, weights, missing) = grads, ctx.taps
        shape = [-1 if dim == axis else 1 for dim in range(gradient.dim())]
        dtype = _sum_dtype(gradient.dtype)
        extents = [ctx.extent if dim == axis else extent for dim, extent in enumerate(gradient.shape)]
        device, order = gradient.device, layout(gradient)
        total = torch.empty(extents, dtype=dtype, device=device, memory_format=order).zero_()
        for each, factors, lacks in zip(places, weights, missing, strict=True):
            factor = numbers(factors, dtype, beside=gradient).reshape(shape)
            given = gradient * factor
            _add_to(total, axis, each, given if lacks is None else _without(given, lacks, shape))
            del given
        return total.to(ctx.dtype), None, None, None, None


def _without(values: Tensor, lacks: list[bool], shape: list[int]) -> Tensor:
    """Set ``values`` to zero where a tap is missing."""
    return values.masked_fill_(numbers(lacks, torch.bool, beside=values).reshape(shape), 0)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _gather_workspace(nbytes: CallBytes) -> int:
    """Bytes of the intermediate between the axes and of one tap, or its gradient; halves in float32."""
    return (5 if nbytes.is_half else 2) * max(nbytes.operands, nbytes.result)


declare(
    gather_positions,
    cost=Cost(operations=windows, workspace=_gather_workspace, saves=NOTHING),
)


def _taken(sources: Sequence[Sequence[int]], wanted: Interval, at_hand: Interval) -> list[list[int]]:
    """The operand's positions that ``wanted`` positions read, by tap, counted from the first ``at_hand``."""
    return [[place - at_hand.start for place in source[wanted.start : wanted.stop]] for source in sources]


def _is_run(places: list[int]) -> bool:
    return places == list(range(places[0], places[0] + len(places)))


def _take(x: Tensor, axis: int, places: list[int]) -> Tensor:
    """The positions of ``x`` at ``places`` along an axis: a view of it if they follow each other."""
    if _is_run(places):
        return x.narrow(axis, places[0], len(places))
    return x.index_select(axis, numbers(places, torch.int64, beside=x))


def _add_to(x: Tensor, axis: int, places: list[int], values: Tensor) -> None:
    """Add ``values`` to ``x`` at the positions that :func:`_take` takes."""
    if _is_run(places):
        x.narrow(axis, places[0], len(places)).add_(values)
    else:
        x.index_add_(axis, numbers(places, torch.int64, beside=x), values)
