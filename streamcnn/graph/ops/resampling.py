"""Operators that change the grid of positions: upsampling, pixel shuffle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate  # by itself, since the user may replace it there

from streamcnn.geometry.axis_maps import AxisMap, Repeated, Sliding
from streamcnn.graph.costs import NOTHING, Cost, declare
from streamcnn.graph.ops.gathering import gathered
from streamcnn.graph.ops.rules import Call, NotStreamable, Sample, Tracer, rule
from streamcnn.graph.ops.samples import chain
from streamcnn.graph.ops.taps import (
    CUBIC,
    TRIANGLE,
    Taps,
    antialiased_taps,
    bicubic_taps,
    bilinear_taps,
    nearest_taps,
)
from streamcnn.graph.program import Access, Ref

aten = torch.ops.aten


@rule(aten.pixel_shuffle.default)
def pixel_shuffle(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """Pixel shuffle: channels spread over a finer grid."""
    ref, factor = call.bind("self", "upscale_factor")
    return _regridded(tracer, call, ref, Repeated(factor))


@rule(aten.pixel_unshuffle.default)
def pixel_unshuffle(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """Pixel unshuffle: a coarser grid, with the positions of each block as channels."""
    ref, factor = call.bind("self", "downscale_factor")
    return _regridded(tracer, call, ref, Sliding(factor, factor))


def _regridded(tracer: Tracer, call: Call, ref: Ref, axis_map: AxisMap) -> Ref | NotStreamable:
    axes, ndim = tracer.axes(ref), len(tracer.spec(ref).shape)
    if axes is None or min(axes) < ndim - 2:
        return NotStreamable("its rows and columns are not those of the map")
    accesses = {ref.name: Access(axis_map, axis_map)}
    return tracer.local(call.target, call.args, like=tracer.fake(call), axes=axes, accesses=accesses)


@rule(aten.grid_sampler.default)
def grid_sample(tracer: Tracer, call: Call) -> NotStreamable:
    """``grid_sample`` is refused: it reads at computed positions, so any tile may read any other."""
    return NotStreamable("where it reads depends on values")


# Weighted sums with constant weights, which save nothing.
declare(
    *(aten.pixel_shuffle, aten.pixel_unshuffle),
    *(aten.upsample_nearest2d, aten._upsample_nearest_exact2d, aten.upsample_bilinear2d),
    aten.upsample_bicubic2d,
    cost=Cost(saves=NOTHING),
)
declare(
    *(aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa),
    # The intermediate between the axes, also in another memory format.
    cost=Cost(
        workspace=lambda nbytes: 2 * min(nbytes.operands, nbytes.result),
        backward_workspace=lambda nbytes: 0,
        saves=NOTHING,
    ),
)


@rule(
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest2d.default,
    aten._upsample_nearest_exact2d.vec,
    aten._upsample_nearest_exact2d.default,
    without_maps=True,
)
def upsample_nearest(tracer: Tracer, call: Call) -> Any:
    """Nearest-neighbour resampling to any size, larger or smaller."""
    centred, dtype = "exact" in str(call.target), tracer.spec(call.args[0]).dtype
    known: dict[tuple[int, int, float | None], Taps] = {}
    for axis in () if _stays_global(tracer, call) else _extents(tracer, call):
        taps = nearest_taps(*axis, centred=centred, dtype=dtype)
        if taps is None:
            return _as_aten_has_it(
                tracer, call, NotStreamable("ATen's kernels differ in which position is nearest")
            )
        known[axis] = taps
    repeats = all(_repeats(taps, *axis[:2]) for axis, taps in known.items())
    by_whole_factors = (repeat_nearest, 0) if repeats else None
    return _resampled(tracer, call, lambda n, size, step: known[n, size, step], by_whole_factors)


def _repeats(taps: Taps, num_out: int, size: int) -> bool:
    """Whether every position is read equally often; rounding of positions may prevent that."""
    factor, rest = divmod(num_out, size)
    return rest == 0 and taps.sources == (tuple(place // factor for place in range(num_out)),)


@rule(aten.upsample_bilinear2d.vec, aten.upsample_bilinear2d.default, without_maps=True)
def upsample_bilinear(tracer: Tracer, call: Call) -> Any:
    """Bilinear resampling, corners aligned or not, to any size."""
    (corners,) = call.bind("align_corners")
    return _resampled(
        tracer,
        call,
        lambda n, size, step: bilinear_taps(n, size, step, corners),
        None if corners else (repeat_bilinear, 1),
    )


@rule(aten.upsample_bicubic2d.vec, aten.upsample_bicubic2d.default, without_maps=True)
def upsample_bicubic(tracer: Tracer, call: Call) -> Any:
    """Bicubic resampling, corners aligned or not, to any size."""
    (corners,) = call.bind("align_corners")
    if _is_inconsistent(tracer, call):
        return _as_aten_has_it(tracer, call, _INCONSISTENT)
    return _resampled(tracer, call, lambda n, size, step: bicubic_taps(n, size, step, corners))


@rule(
    aten._upsample_bilinear2d_aa.vec,
    aten._upsample_bilinear2d_aa.default,
    aten._upsample_bicubic2d_aa.vec,
    aten._upsample_bicubic2d_aa.default,
    without_maps=True,
)
def upsample_antialiased(tracer: Tracer, call: Call) -> Any:
    """Antialiased bilinear or bicubic resampling, with a filter widened for a coarser result."""
    (corners,) = call.bind("align_corners")
    if _is_inconsistent(tracer, call):
        return _as_aten_has_it(tracer, call, _INCONSISTENT)
    kernel = CUBIC if "bicubic" in str(call.target) else TRIANGLE
    return _resampled(tracer, call, lambda n, size, step: antialiased_taps(n, size, step, corners, kernel))


def _is_inconsistent(tracer: Tracer, call: Call) -> bool:
    """Whether a factor other than 1 keeps an extent, which only one of ATen's two passes ignores."""
    return any(after == before and step not in (None, 1.0) for after, before, step in _extents(tracer, call))


def _extents(tracer: Tracer, call: Call) -> list[tuple[int, int, float | None]]:
    """For rows and for columns: extents of result and operand, and the scale factor given to ATen."""
    after, before = tracer.fake(call).shape[2:], tracer.spec(call.args[0]).shape[2:]
    return list(zip(after, before, _steps(call), strict=True))


_INCONSISTENT = NotStreamable(
    "ATen's gradient is not that of its result: a factor that is not 1 keeps a size"
)


def _as_aten_has_it(tracer: Tracer, call: Call, refusal: NotStreamable) -> Any:
    if tracer.axes(call.args[0]) is None:
        return tracer.global_value(call.target, *call.args, **call.kwargs)
    return refusal


def _resampled(
    tracer: Tracer,
    call: Call,
    taps: Callable[[int, int, float | None], Taps],
    by_whole_factors: tuple[Callable[..., Tensor], int] | None = None,
) -> Any:
    """Record resampling.

    Parameters
    ----------
    taps
        Makes an axis's taps from the extents of result and operand and the scale factor given to ATen.
    by_whole_factors
        A function that upsamples a tile by integer factors, and the number of neighbours it reads.
    """
    if _stays_global(tracer, call):
        return tracer.global_value(call.target, *call.args, **call.kwargs)
    ref, was_map = _as_map(tracer, call)
    if tracer.axes(ref) != (2, 3):
        return NotStreamable("it is not applied to a map of shape (N, C, H, W)")
    like, sizes, steps = tracer.fake(call), tracer.spec(ref).shape[2:], _steps(call)
    factors = _whole_factors(like.shape[2:], sizes)
    if by_whole_factors and was_map and factors is not None and _are_exact(steps, factors):
        return _upsampled(tracer, ref, like, factors, *by_whole_factors)
    along = [taps(*axis) for axis in _extents(tracer, call)]
    return gathered(tracer, ref, like, (2, 3), along)


def _stays_global(tracer: Tracer, call: Call) -> bool:
    """Whether the result of resizing a global value is a global value.

    A global value that grows, such as a pooled map that is upsampled again, becomes a map instead.
    """
    ref = call.args[0]
    if tracer.axes(ref) is not None:
        return False
    return tracer.resident or tracer.fake(call).numel() <= tracer.spec(ref).numel


def _as_map(tracer: Tracer, call: Call) -> tuple[Ref, bool]:
    """The operand as a map, and whether it was one; of a small value a tile may read less than a position."""
    ref = call.args[0]
    was_map = tracer.axes(ref) is not None
    return (ref if was_map else tracer.promote(ref, (2, 3))), was_map


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
    return interpolate(x, size, mode="nearest")


def _are_exact(steps: Sequence[float | None], factors: Sequence[int]) -> bool:
    """Whether scale factors given to ATen equal the ratios of sizes; a factor of 2.03 may double a size."""
    return all(step is None or step == factor for step, factor in zip(steps, factors, strict=True))


def _steps(call: Call) -> list[float | None]:
    """The scale factors given to ATen, which determine the step; None where there are none."""
    names = [a.name for a in call.target._schema.arguments]  # type: ignore[attr-defined]
    if "scale_factors" in names:
        given = call.bind("scale_factors")[0]
        return [None, None] if given is None else list(given)
    return list(call.bind("scales_h", "scales_w"))


def repeat_bilinear(x: Tensor, factors: tuple[int, int]) -> Tensor:
    """``x`` interpolated to ``factors`` times its size; exact but for one position at inner edges."""
    size = (x.shape[2] * factors[0], x.shape[3] * factors[1])
    return interpolate(x, size, mode="bilinear", align_corners=False)


def _resized(
    size: tuple[int, int] | None, factor: float | None, mode: str, corners: bool | None
) -> nn.Module:
    return chain(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.Upsample(size=size, scale_factor=factor, mode=mode, align_corners=corners),
        nn.Conv2d(4, 3, 3, padding=1),
    )


class _Antialiased(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.interpolate(x, (15, 40), mode="bicubic", antialias=True)
        x = nn.functional.interpolate(x, scale_factor=1.3, mode="nearest-exact")
        return nn.functional.interpolate(x, (27, 11), mode="bilinear", antialias=True)


_RESIZES: tuple[tuple[tuple[int, int] | None, float | None, str, bool | None], ...] = (
    (None, 2, "nearest", None),
    (None, 1.7, "nearest", None),
    ((50, 13), None, "nearest", None),
    (None, 3, "bilinear", False),
    (None, 1.7, "bilinear", False),
    ((50, 13), None, "bilinear", False),
    ((50, 71), None, "bilinear", True),
    ((50, 13), None, "bicubic", False),
    (None, 3, "bicubic", True),
)

SAMPLES = (
    *(
        Sample(
            f"resize to {size or factor}, {mode}, corners {corners}",
            partial(_resized, size, factor, mode, corners),
        )
        for size, factor, mode, corners in _RESIZES
    ),
    Sample("resize with antialiasing", lambda: chain(nn.Conv2d(3, 4, 3), _Antialiased())),
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
)
