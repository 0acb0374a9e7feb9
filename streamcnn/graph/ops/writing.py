"""Functional forms of assignments: a map with some or all of its values replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from streamcnn.geometry.axis_maps import Transposed
from streamcnn.geometry.regions import Region
from streamcnn.graph.costs import NOTHING, Cost, declare
from streamcnn.graph.ops.pointwise import pointwise
from streamcnn.graph.ops.rules import Call, NotStreamable, Sample, Tracer, rule
from streamcnn.graph.ops.samples import chain
from streamcnn.graph.program import Access, Axes, Ref
from streamcnn.graph.scattering import entry_replaced, slice_replaced

aten = torch.ops.aten


@rule(aten.copy.default, without_maps=True)
def copy(tracer: Tracer, call: Call) -> Any:
    """``copy``: all values replaced; only shape and dtype of the first operand matter.

    ATen's own operator has no gradient, so global values do not use it either.
    """
    target, value = call.bind("self", "src")
    if tracer.axes(target) is None and tracer.axes(value) is None:
        return tracer.global_value(copied, target, value)
    return pointwise(tracer, Call(copied, (target, value), {}))


def copied(target: Tensor, value: Tensor) -> Tensor:
    """``value`` in the shape and type of ``target``."""
    return value.to(target.dtype).expand(target.shape)


declare(aten.copy, cost=Cost(saves=NOTHING))


@rule(aten.fill.Scalar, aten.fill.Tensor, aten.zero.default)
def fill(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """``fill``: one value everywhere."""
    if any(tracer.axes(ref) is not None for ref in call.args[1:] if isinstance(ref, Ref)):
        return NotStreamable("it fills with a value that is a map")
    result: Ref | NotStreamable = pointwise(tracer, call)
    return result


@rule(aten.slice_scatter.default, slice_replaced)
def slice_scatter(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """A map with a range along one axis replaced, as by ``x[:, a:b] = y``."""
    is_own = call.target is slice_replaced
    into, part, dim, start, end, step = (
        call.args if is_own else call.bind("self", "src", "dim", "start", "end", "step")
    )
    shape = tracer.spec(into).shape
    dim = dim % len(shape)
    start, end, step = slice(start, end, step).indices(shape[dim])
    axes = tracer.axes(into) or tracer.axes(part)
    assert axes is not None
    return _replaced(tracer, into, part, axes, (dim, start, step, len(range(start, end, step))))


@rule(aten.select_scatter.default, entry_replaced)
def select_scatter(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """A map with one entry of an axis replaced, as by ``x[:, 1] = y``."""
    is_own = call.target is entry_replaced
    into, part, dim, index = call.args if is_own else call.bind("self", "src", "dim", "index")
    shape = tracer.spec(into).shape
    dim = dim % len(shape)
    start = index % shape[dim]
    axes, inner = tracer.axes(into), tracer.axes(part)
    if axes is None:
        assert inner is not None
        rows, cols = (axis + (axis >= dim) for axis in inner)
        axes = (rows, cols)
    if inner is None:
        part = tracer.global_value(torch.unsqueeze, part, dim)
    elif dim in axes or inner != tuple(axis - (dim < axis) for axis in axes):
        return NotStreamable("its operands have their spatial axes at different places")
    else:
        like = torch.empty(
            _with_one(tracer.spec(part).shape, dim), dtype=tracer.spec(part).dtype, device="meta"
        )
        accesses = {part.name: Access()}
        part = tracer.local(torch.unsqueeze, (part, dim), like=like, axes=axes, accesses=accesses)
    return _replaced(tracer, into, part, axes, (dim, start, 1, 1))


def _with_one(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return (*shape[:dim], 1, *shape[dim:])


def _replaced(
    tracer: Tracer, into: Ref, part: Ref, axes: Axes, place: tuple[int, int, int, int]
) -> Ref | NotStreamable:
    """``into`` with the entries at ``place`` (axis, first, step, count) replaced by ``part``."""
    into, part = (tracer.promote(r, axes) if tracer.axes(r) is None else r for r in (into, part))
    if not tracer.axes(into) == tracer.axes(part) == axes:
        return NotStreamable("its operands have their spatial axes at different places")
    spec = tracer.spec(into)
    dim, first, step, count = place
    if count == 0:
        return into
    like = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
    if dim not in axes:
        args = (into, part, dim, first, first + step * (count - 1) + 1, step)
        accesses = {into.name: Access(), part.name: Access()}
        target = slice_replaced if spec.dtype.is_complex else aten.slice_scatter.default
        return tracer.local(target, args, like=like, axes=axes, accesses=accesses)
    # Position i of the part is position first + i * step of the result: so does a transposed convolution.
    along = Transposed(1, step, -first, 1)
    access = Access(rows=along) if dim == axes[0] else Access(cols=along)
    return tracer.local(
        written,
        (part, into, dim, axes.index(dim), first, step),
        like=like,
        axes=axes,
        accesses={part.name: access, into.name: Access()},
        positional=True,
    )


def written(
    part: Tensor, into: Tensor, dim: int, side: int, first: int, step: int, *, out: Region, origin: Region
) -> Tensor:
    """``into``, which covers ``out``, with positions replaced by ``part``, which covers ``origin``."""
    wanted, at_hand = out[side], origin[side]
    start = max(at_hand.start, -((first - wanted.start) // step))
    stop = min(at_hand.stop, (wanted.stop - 1 - first) // step + 1)
    if stop <= start:
        return into
    inside = part.narrow(dim, start - at_hand.start, stop - start)
    begin = first + start * step - wanted.start
    return slice_replaced(into, inside, dim, begin, begin + (stop - start - 1) * step + 1, step)


# The values written, if they are not all of ``part``, and their gradient.
declare(written, cost=Cost(workspace=lambda nbytes: nbytes.operands, saves=NOTHING))


class _Written(nn.Module):
    """Rows, columns, channels and a border assigned to."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.slice_scatter(x, x[:, 1:3].sin(), 1, 0, 2)
        x = torch.select_scatter(x, x[:, 0] * x[:, 3], 1, 2)
        inner = torch.slice_scatter(x[:, :, 3:-5], x[:, :, 3:-5, 2:9].cos(), 3, 1, 8)
        x = torch.slice_scatter(x, inner, 2, 3, -5)
        return torch.slice_scatter(x, torch.fill(x[..., ::3], 0.3), 3, None, None, 3)


SAMPLES = (Sample("assignments to slices", lambda: chain(nn.Conv2d(3, 4, 3), _Written())),)
