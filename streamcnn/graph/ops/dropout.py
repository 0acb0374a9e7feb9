"""Dropout on maps, with the same mask for every tiling and on recomputation.

The mask is a hash of a seed drawn once per forward pass, the node and the element's absolute position
(a counter-based generator, Salmon et al. 2011, with the mixing function of SplitMix64).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from streamcnn.geometry.regions import Region
from streamcnn.graph.costs import NOTHING, CallBytes, Cost, Saves, declare, elements
from streamcnn.graph.ops.constants import brought
from streamcnn.graph.ops.pointwise import pointwise
from streamcnn.graph.ops.rules import Call, NotStreamable, Sample, Tracer, rule
from streamcnn.graph.program import Access, Axes, Ref

aten = torch.ops.aten

_BITS = 24
"""Resolution of the drawn uniform numbers."""


@rule(aten.dropout.default, without_maps=True)
def dropout(tracer: Tracer, call: Call) -> Any:
    """Dropout of single elements, of maps, streamed or resident, and of global values."""
    ref, probability, train = call.bind("input", "p", "train")
    axes = tracer.axes(ref)
    if not train or probability in (0, 1):
        return _without_drawing(tracer, ref, probability if train else 0)
    if all(extent == 1 for extent in tracer.spec(ref).shape[2:]) or not tracer.is_of_maps(ref):
        # A global value, as in the head, or a weight: drawn as plain PyTorch draws it.
        if axes is not None:
            return NotStreamable("it has one position")
        return tracer.global_value(call.target, *call.args, **call.kwargs)
    seed = seed_of(tracer, tracer.fake(call).device)
    return dropped(tracer, ref, seed, probability, strides_of(tracer.spec(ref).shape))


def seed_of(tracer: Tracer, device: torch.device) -> Ref:
    """One seed for a call, in program order, so that masks do not depend on which layers are resident."""
    seed: Ref = tracer.global_value(draw_seed, device=torch.device(device))
    return seed


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """How far apart neighbours along each axis are if all elements of ``shape`` lie in row order."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def dropped(
    tracer: Tracer, ref: Ref, seed: Ref, probability: float, strides: tuple[int, ...], first: int = 0
) -> Ref:
    """Record dropout of a value whose elements have the numbers ``first`` and on, and these ``strides``."""
    axes, spec = tracer.axes(ref), tracer.spec(ref)
    arguments = (ref, seed, probability, strides, first)
    if axes is None:
        result: Ref = tracer.global_value(drop_elements, *arguments)
        return result
    return tracer.local(
        drop_elements,
        (*arguments, axes),
        like=torch.empty(spec.shape, dtype=spec.dtype, device="meta"),
        axes=axes,
        accesses={ref.name: Access()},
        positional=True,
    )


@rule(aten.feature_dropout.default, without_maps=True)
def feature_dropout(tracer: Tracer, call: Call) -> Any:
    """Dropout of whole channels: a small mask, drawn once."""
    ref, probability, train = call.bind("input", "p", "train")
    spec = tracer.spec(ref)
    if not train or probability in (0, 1):
        return _without_drawing(tracer, ref, probability if train else 0)
    shape = (*spec.shape[:2], *(1,) * (len(spec.shape) - 2))
    device = torch.device(tracer.fake(call).device)
    mask = tracer.global_value(draw_channel_mask, shape, probability, dtype=spec.dtype, device=device)
    if tracer.axes(ref) is None:
        return tracer.global_value(torch.mul, ref, mask)
    return pointwise(tracer, Call(aten.mul.Tensor, (ref, mask), {}))


def _without_drawing(tracer: Tracer, ref: Ref, probability: float) -> Any:
    """Keep everything or drop everything, without a draw, as ATen does."""
    call = Call(aten.mul.Scalar, (ref, 0.0), {}) if probability else Call(aten.alias.default, (ref,), {})
    if tracer.axes(ref) is None:
        return tracer.global_value(call.target, *call.args) if probability else ref
    return pointwise(tracer, call)


def draw_seed(*, device: torch.device) -> Tensor:
    """A seed from PyTorch's CPU generator, shape () int64, on ``device``, where every tile reads it."""
    return brought(torch.randint(2**62, ()), device)


def draw_channel_mask(
    shape: tuple[int, ...], probability: float, *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A mask: ``1 / (1 - probability)`` for kept channels, 0 for dropped ones; drawn on ``device``."""
    kept = torch.empty(shape, dtype=dtype, device=device).bernoulli_(1 - probability)
    return kept / (1 - probability)


declare(draw_seed, draw_channel_mask, cost=Cost(saves=NOTHING, draws=True))


def drop_elements(
    x: Tensor,
    seed: Tensor,
    probability: float,
    strides: tuple[int, ...],
    first: int = 0,
    axes: Axes | None = None,
    *,
    out: Region | None = None,
    origin: Region | None = None,
) -> Tensor:
    """Drop elements of ``x``, a tile that covers ``out`` of a map, or the whole of a value.

    The first of all elements has the number ``first``, and neighbours along each axis are ``strides`` apart.
    """
    position = seed + first
    for dim, stride in enumerate(strides):
        start = 0 if axes is None or out is None or dim not in axes else out[axes.index(dim)].start
        index = torch.arange(start, start + x.shape[dim], device=x.device) * stride
        position = position + index.reshape([-1 if d == dim else 1 for d in range(len(strides))])
    kept = mix_(position).bitwise_and_(2**_BITS - 1) >= round(probability * 2**_BITS)
    del position
    dropped: Tensor = (x * kept).mul_(1 / (1 - probability))
    return dropped


def _draw_workspace(nbytes: CallBytes) -> int:
    """Bytes of counters and of the values mixed into them, 64 bits each."""
    return 16 * nbytes.result // nbytes.itemsize


declare(
    drop_elements,
    cost=Cost(
        operations=lambda operation: 20 * operation.numel,
        workspace=_draw_workspace,
        backward_workspace=lambda nbytes: nbytes.result,
        # The mask of kept elements, a byte each.
        saves=Saves(beside=elements),
        makes_new=True,
    ),
)


def mix_(counter: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place: hashes consecutive 64-bit integers."""
    for bits, factor in ((0, -7046029254386353131), (30, -4658895280553007687), (27, -7723592293110705685)):
        if bits:
            counter ^= _shifted(counter, bits)
        counter *= factor
    counter ^= _shifted(counter, 31)
    return counter


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Shift right without copying the sign."""
    return (value >> bits).bitwise_and_((1 << (64 - bits)) - 1)


SAMPLES: tuple[Sample, ...] = (
    Sample(
        "dropout in eval mode",
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Dropout2d(0.3), nn.AdaptiveAvgPool2d(1)
        ),
        train=False,
    ),
)
