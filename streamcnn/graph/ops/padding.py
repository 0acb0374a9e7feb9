"""Padding, cropping and rolling of the spatial axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from streamcnn.geometry.axis_maps import Sliding, reflected
from streamcnn.graph.costs import NOTHING, Cost, Operation, Saves, declare
from streamcnn.graph.ops.gathering import gathered
from streamcnn.graph.ops.pointwise import per_position
from streamcnn.graph.ops.rules import Call, NotStreamable, Sample, Tracer, rule
from streamcnn.graph.ops.samples import chain
from streamcnn.graph.ops.taps import Taps
from streamcnn.graph.program import Access, Axes, Ref

aten = torch.ops.aten


@rule(aten.pad.default, aten.constant_pad_nd.default)
def pad(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """Padding or cropping of the spatial axes: constant, reflecting, replicating or circular."""
    ref, pads = call.bind("self", "pad")
    constant = call.target is aten.constant_pad_nd.default
    mode = "constant" if constant else call.bind("mode")[0]
    value = float(call.bind("value")[0] or 0.0)
    like, axes = tracer.fake(call), tracer.axes(ref)
    assert axes is not None
    before = _before(pads, like.dim())
    channels = _of_channels(pads, like.dim(), axes)
    if any(channels):
        if mode != "constant":
            return NotStreamable("it pads other axes than the spatial ones by their own values")
        ref = per_position(tracer, Call(aten.constant_pad_nd.default, (ref, channels, value), {}), ref)
    if mode == "constant":
        rows, cols = (Sliding(padding=before[axis]) for axis in axes)
        accesses = {ref.name: Access(rows, cols)}
        return tracer.local(same, (ref,), like=like, axes=axes, accesses=accesses, fill=value)
    taps = []
    for axis in axes:
        size = tracer.spec(ref).shape[axis]
        places = range(-before[axis], like.shape[axis] - before[axis])
        taps.append(Taps((tuple(_PADDINGS[mode](place, size) for place in places),)))
    return gathered(tracer, ref, like, axes, taps)


@rule(aten.roll.default)
def roll(tracer: Tracer, call: Call) -> Any:
    """Positions shifted along axes, cyclically. A tile at the seam reads the whole axis."""
    ref, shifts, dims = call.bind("self", "shifts", "dims")
    shifts, dims = ([each] if isinstance(each, int) else list(each) for each in (shifts, dims))
    axes, shape = tracer.axes(ref), tracer.spec(ref).shape
    assert axes is not None
    if not dims:
        return NotStreamable("it moves positions into other rows")
    moves = [(shift, dim % len(shape)) for shift, dim in zip(shifts, dims, strict=True)]
    beside = [move for move in moves if move[1] not in axes]
    if beside:
        channels = Call(call.target, (ref, *map(list, zip(*beside, strict=True))), {})
        ref = per_position(tracer, channels, ref)
    if len(beside) == len(moves):
        return ref
    taps = []
    for axis in axes:
        shift = sum(shift for shift, dim in moves if dim == axis)
        taps.append(Taps((tuple((place - shift) % shape[axis] for place in range(shape[axis])),)))
    return gathered(tracer, ref, tracer.fake(call), axes, taps)


def _padded_bytes(operation: Operation) -> int:
    """Bytes of the operand, which autograd saves unless the padding is constant."""
    operand, mode = operation.bind("self", "mode")
    return 0 if mode == "constant" else int(operand.tensor.nbytes)


# Weighted sums with constant weights, which save nothing.
declare(aten.constant_pad_nd, aten.roll, cost=Cost(saves=NOTHING))
declare(aten.pad, cost=Cost(saves=Saves(beside=_padded_bytes)))


def same(x: Tensor) -> Tensor:
    """``x``: the interpreter has padded it already."""
    return x


def _before(pads: Sequence[int], ndim: int) -> list[int]:
    """Padding before the first position of every axis."""
    before = [0] * ndim
    for index in range(len(pads) // 2):
        before[ndim - 1 - index] = pads[2 * index]
    return before


def _of_channels(pads: Sequence[int], ndim: int, axes: Axes) -> list[int]:
    """``pads`` without the padding of the spatial axes."""
    return [0 if ndim - 1 - index // 2 in axes else pad for index, pad in enumerate(pads)]


_PADDINGS: dict[str, Callable[[int, int], int]] = {
    "reflect": reflected,
    "replicate": lambda place, size: min(max(place, 0), size - 1),
    "circular": lambda place, size: place % size,
}


SAMPLES = (
    Sample(
        "padding on one side, cropping, far padding",
        lambda: chain(
            nn.ZeroPad2d((0, 3, 2, 0)),
            nn.Conv2d(3, 4, 3),
            nn.ConstantPad2d((-2, 31, 27, -1), 0.7),
            nn.Conv2d(4, 4, 3, padding=9),
            nn.ReflectionPad2d((5, 0, 1, 7)),
            nn.ReplicationPad2d((0, 4, 6, 1)),
        ),
    ),
)
