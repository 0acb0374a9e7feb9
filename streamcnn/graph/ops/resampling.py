"""Operators that change the grid of positions: upsampling, pixel shuffle, padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from streamcnn.geometry.axis_maps import AxisMap, Gathered, Repeated, Sliding, reflected
from streamcnn.geometry.regions import Interval, Region
from streamcnn.graph.costs import NOTHING, Cost, declare, windows
from streamcnn.graph.ops.convolution import chain
from streamcnn.graph.ops.rules import Call, NotStreamable, Sample, Tracer, rule
from streamcnn.graph.program import Access, Axes, Ref

aten = torch.ops.aten


@rule(aten.pixel_shuffle.default)
def pixel_shuffle(tracer: Tracer, call: Call) -> Ref:
    """Channels spread over a finer grid."""
    ref, factor = call.bind("self", "upscale_factor")
    return _regridded(tracer, call, ref, Repeated(factor))


@rule(aten.pixel_unshuffle.default)
def pixel_unshuffle(tracer: Tracer, call: Call) -> Ref:
    """A coarser grid with the positions of each block as channels."""
    ref, factor = call.bind("self", "downscale_factor")
    return _regridded(tracer, call, ref, Sliding(factor, factor))


def _regridded(tracer: Tracer, call: Call, ref: Ref, axis_map: AxisMap) -> Ref:
    axes = tracer.axes(ref)
    assert axes is not None
    accesses = {ref.name: Access(axis_map, axis_map)}
    return tracer.local(call.target, call.args, like=tracer.fake(call), axes=axes, accesses=accesses)


@rule(aten.pad.default, aten.constant_pad_nd.default)
def pad(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """Padding or cropping of the spatial axes: constant, reflecting, replicating or circular."""
    ref, pads = call.bind("self", "pad")
    constant = call.target is aten.constant_pad_nd.default
    mode = "constant" if constant else call.bind("mode")[0]
    value = call.bind("value")[0] or 0.0
    like, axes = tracer.fake(call), tracer.axes(ref)
    before = _before(pads, like.dim())
    if (
        axes is None
        or any(b for axis, b in enumerate(before) if axis not in axes)
        or _pads_channels(pads, like, axes)
    ):
        return NotStreamable("it pads other axes than the spatial ones")
    if mode == "constant":
        rows, cols = (Sliding(padding=before[axis]) for axis in axes)
        accesses = {ref.name: Access(rows, cols)}
        return tracer.local(same, (ref,), like=like, axes=axes, accesses=accesses, fill=float(value))
    sources = []
    for axis in axes:
        size = tracer.spec(ref).shape[axis]
        places = range(-before[axis], like.shape[axis] - before[axis])
        sources.append(tuple(_PADDINGS[mode](place, size) for place in places))
    return _gathered(tracer, ref, like, axes, [(source, source) for source in sources], None)


declare(aten.constant_pad_nd, cost=Cost(saves=NOTHING))


def same(x: Tensor) -> Tensor:
    """``x``: the interpreter has padded it already."""
    return x


def _before(pads: Sequence[int], ndim: int) -> list[int]:
    """Padding before the first position of every axis."""
    before = [0] * ndim
    for index in range(len(pads) // 2):
        before[ndim - 1 - index] = pads[2 * index]
    return before


def _pads_channels(pads: Sequence[int], like: Tensor, axes: Axes) -> bool:
    return any(pads[2 * i + 1] for i in range(len(pads) // 2) if like.dim() - 1 - i not in axes)


_PADDINGS: dict[str, Callable[[int, int], int]] = {
    "reflect": reflected,
    "replicate": lambda place, size: min(max(place, 0), size - 1),
    "circular": lambda place, size: place % size,
}


def _gathered(
    tracer: Tracer,
    ref: Ref,
    like: Tensor,
    axes: Axes,
    sources: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    weights: Sequence[tuple[float, ...]] | None,
) -> Ref:
    """Record a separable gather: per axis two source positions and the weight of the second."""
    rows, cols = (Gathered(tuple(map(min, f, s)), tuple(map(max, f, s))) for f, s in sources)
    return tracer.local(
        gather_positions,
        (ref, tuple(sources), None if weights is None else tuple(weights), axes),
        like=like,
        axes=axes,
        accesses={ref.name: Access(rows, cols)},
        positional=True,
        heavy=True,
    )


def gather_positions(
    x: Tensor,
    sources: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    weights: Sequence[tuple[float, ...]] | None,
    axes: Axes,
    *,
    out: Region,
    origin: Region,
) -> Tensor:
    """Positions ``out`` of a gathered map, from ``x`` which covers ``origin`` of its operand."""
    for place, axis in enumerate(axes):
        first, second = (_local(source, out[place], origin[place]) for source in sources[place])
        if weights is None:
            x = _take(x, axis, first)
            continue
        share = torch.tensor(
            weights[place][out[place].start : out[place].stop], dtype=x.dtype, device=x.device
        )
        share = share.reshape([-1 if dim == axis else 1 for dim in range(x.dim())])
        x = _take(x, axis, first) * (1 - share) + _take(x, axis, second) * share
    return x


declare(gather_positions, cost=Cost(operations=windows))


def _local(source: tuple[int, ...], out: Interval, origin: Interval) -> list[int]:
    return [place - origin.start for place in source[out.start : out.stop]]


def _take(x: Tensor, axis: int, places: list[int]) -> Tensor:
    first, last = places[0], places[-1]
    if places == list(range(first, last + 1)):
        return x.narrow(axis, first, last + 1 - first)
    return x.index_select(axis, torch.tensor(places, device=x.device))


@rule(aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default, begins=True)
def upsample_nearest(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """Nearest-neighbour resampling to any size, larger or smaller."""
    ref = call.args[0]
    if tracer.axes(ref) != (2, 3):
        return NotStreamable("it is not applied to a map of shape (N, C, H, W)")
    like, sizes = tracer.fake(call), tracer.spec(ref).shape[2:]
    factors = _whole_factors(like.shape[2:], sizes)
    steps = _steps(call)
    if factors is not None and _are_exact(steps, factors):
        return _upsampled(tracer, ref, like, factors, repeat_nearest, 0)
    sources = [
        nearest_sources(n, size, step) for n, size, step in zip(like.shape[2:], sizes, steps, strict=True)
    ]
    return _gathered(tracer, ref, like, (2, 3), [(source, source) for source in sources], None)


def _whole_factors(after: Sequence[int], before: Sequence[int]) -> tuple[int, int] | None:
    if any(n % size for n, size in zip(after, before, strict=True)):
        return None
    return (after[0] // before[0], after[1] // before[1])


def _upsampled(
    tracer: Tracer, ref: Ref, like: Tensor, factors: tuple[int, int], target: Any, reach: int
) -> Ref:
    rows, cols = (Repeated(factor, reach if factor > 1 else 0) for factor in factors)
    accesses = {ref.name: Access(rows, cols)}
    return tracer.local(target, (ref, factors), like=like, axes=(2, 3), accesses=accesses)


def repeat_nearest(x: Tensor, factors: tuple[int, int]) -> Tensor:
    """``x`` with each position repeated ``factors`` times."""
    size = (x.shape[2] * factors[0], x.shape[3] * factors[1])
    return torch.nn.functional.interpolate(x, size, mode="nearest")


def _are_exact(steps: Sequence[float | None], factors: Sequence[int]) -> bool:
    """Whether the scale factors handed to ATen, if any, are those of the sizes: 2.03 may double a size."""
    return all(step is None or step == factor for step, factor in zip(steps, factors, strict=True))


def _steps(call: Call) -> list[float | None]:
    """The scale factors handed to ATen, which decide the step where they are given."""
    names = [a.name for a in call.target._schema.arguments]  # type: ignore[attr-defined]
    if "scale_factors" in names:
        given = call.bind("scale_factors")[0]
        return [None, None] if given is None else list(given)
    return list(call.bind("scales_h", "scales_w"))


def nearest_sources(num_out: int, size: int, scale: float | None) -> tuple[int, ...]:
    """Source positions, read off ATen's own kernel so that its rounding is ours."""
    with unset_fake_temporarily():
        places = torch.arange(size, dtype=torch.float64).reshape(1, 1, size, 1)
        picked = aten.upsample_nearest2d.default(places, [num_out, 1], scale, None)
        return tuple(int(place) for place in picked.flatten())


@rule(aten.upsample_bilinear2d.vec, aten.upsample_bilinear2d.default, begins=True)
def upsample_bilinear(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """Bilinear resampling, corners aligned or not, to any size."""
    ref, align_corners = call.args[0], call.bind("align_corners")[0]
    if tracer.axes(ref) != (2, 3):
        return NotStreamable("it is not applied to a map of shape (N, C, H, W)")
    like, sizes = tracer.fake(call), tracer.spec(ref).shape[2:]
    factors = _whole_factors(like.shape[2:], sizes)
    steps = _steps(call)
    if factors is not None and not align_corners and _are_exact(steps, factors):
        return _upsampled(tracer, ref, like, factors, repeat_bilinear, 1)
    axes = [
        bilinear_sources(n, size, step, align_corners)
        for n, size, step in zip(like.shape[2:], sizes, steps, strict=True)
    ]
    return _gathered(tracer, ref, like, (2, 3), [axis[:2] for axis in axes], [axis[2] for axis in axes])


def repeat_bilinear(x: Tensor, factors: tuple[int, int]) -> Tensor:
    """``x`` interpolated to ``factors`` times its size; exact but for one position at inner edges."""
    size = (x.shape[2] * factors[0], x.shape[3] * factors[1])
    return torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)


def bilinear_sources(
    num_out: int, size: int, scale: float | None, align_corners: bool
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]:
    """Both source positions of each output and the weight of the second, by ATen's formula."""
    if num_out == size:
        places = [float(index) for index in range(size)]
    elif align_corners:
        step = (size - 1) / (num_out - 1) if num_out > 1 else 0.0
        places = [index * step for index in range(num_out)]
    else:
        step = 1 / scale if scale is not None and scale > 0 else size / num_out
        places = [max(step * (index + 0.5) - 0.5, 0.0) for index in range(num_out)]
    first = tuple(min(int(place), size - 1) for place in places)
    second = tuple(min(place + 1, size - 1) for place in first)
    return first, second, tuple(min(max(p - f, 0.0), 1.0) for p, f in zip(places, first, strict=True))


def _resized(
    size: tuple[int, int] | None, factor: float | None, mode: str, corners: bool | None
) -> nn.Module:
    return chain(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.Upsample(size=size, scale_factor=factor, mode=mode, align_corners=corners),
        nn.Conv2d(4, 3, 3, padding=1),
    )


_RESIZES: tuple[tuple[tuple[int, int] | None, float | None, str, bool | None], ...] = (
    (None, 2, "nearest", None),
    (None, 1.7, "nearest", None),
    ((50, 13), None, "nearest", None),
    (None, 3, "bilinear", False),
    (None, 1.7, "bilinear", False),
    ((50, 13), None, "bilinear", False),
    ((50, 71), None, "bilinear", True),
)

SAMPLES = (
    *(
        Sample(
            f"resize to {size or factor}, {mode}, corners {corners}",
            partial(_resized, size, factor, mode, corners),
        )
        for size, factor, mode, corners in _RESIZES
    ),
    Sample(
        "pixel shuffle and unshuffle",
        lambda: chain(
            nn.PixelUnshuffle(3),
            nn.Conv2d(27, 8, 3),
            nn.PixelShuffle(2),
            nn.Conv2d(2, 8, 3),
            nn.PixelUnshuffle(2),
        ),
        shape=(2, 3, 45, 39),
    ),
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
