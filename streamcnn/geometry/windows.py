"""Cropping a tensor that covers one region to another, and padding it at the map's edges."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streamcnn.geometry.regions import Interval, Region

Axes = tuple[int, int]
"""Positions of the spatial axes (H, W) in a tensor's shape."""


def with_extents(shape: tuple[int, ...], axes: Axes, extents: tuple[int, int]) -> tuple[int, ...]:
    """``shape`` with other spatial extents."""
    result = list(shape)
    result[axes[0]], result[axes[1]] = extents
    return tuple(result)


def layout(x: Tensor) -> torch.memory_format:
    """The memory format of ``x`` by its strides; a crop of a map has the map's."""
    channels_last = x.dim() == 4 and x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def dense(x: Tensor) -> Tensor:
    """``x`` itself if its memory has no gaps, else a copy in the same order of axes.

    ATen's fused kernels fall back to slow element-wise loops on a crop of a map.
    """
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous(memory_format=layout(x))


def crop(x: Tensor, axes: Axes, covered: Region, part: Region) -> Tensor:
    """Crop ``x``, which covers the region ``covered``, to ``part``, as a view."""
    if covered == part:
        return x
    # A negative start would count from the end.
    assert covered.contains(part), f"{part} is not inside {covered}"
    for axis, outer, inner in zip(axes, covered, part, strict=True):
        if outer != inner:
            x = x.narrow(axis, inner.start - outer.start, inner.size)
    return x


def padded(x: Tensor, axes: Axes, covered: Region, window: Region, fill: float) -> Tensor:
    """Pad ``x``, which covers the region ``covered``, with ``fill`` to a window that leaves the map."""
    if covered == window:
        return x
    if any(outer.intersect(inner).size == 0 for outer, inner in zip(window, covered, strict=True)):
        # The whole window is padding.
        return x.new_full(with_extents(tuple(x.shape), axes, window.size), fill)
    result: Tensor = _Pad.apply(x, axes, covered, window, fill)  # type: ignore[no-untyped-call]
    return result


class _Pad(torch.autograd.Function):
    """Padding that writes each position once; ATen's fills the whole result first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axes: Axes, covered: Region, window: Region, fill: float) -> Tensor:
        ctx.crop = (axes, window, covered)
        extents = with_extents(tuple(x.shape), axes, window.size)
        result = torch.empty(extents, dtype=x.dtype, device=x.device, memory_format=layout(x))
        crop(result, axes, window, covered).copy_(x)
        for strip in _frame(window, covered):
            crop(result, axes, window, strip).fill_(fill)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return crop(grads[0], *ctx.crop), None, None, None, None


def _frame(outer: Region, inner: Region) -> list[Region]:
    """``outer`` without ``inner``, in up to four disjoint strips."""
    rows, cols = inner
    strips = [
        Region(Interval(outer.rows.start, rows.start), outer.cols),
        Region(Interval(rows.stop, outer.rows.stop), outer.cols),
        Region(rows, Interval(outer.cols.start, cols.start)),
        Region(rows, Interval(cols.stop, outer.cols.stop)),
    ]
    return [strip for strip in strips if 0 not in strip.size]


def placed(x: Tensor, axes: Axes, covered: Region, out: Region) -> Tensor:
    """Crop ``x``, which covers the region ``covered``, or extend it with zeros, to the region ``out``."""
    kept = Region(*(a.intersect(b) for a, b in zip(covered, out, strict=True)))
    if 0 in kept.size:
        return x.new_zeros(with_extents(tuple(x.shape), axes, out.size))
    return padded(crop(x, axes, covered, kept), axes, kept, out, 0.0)
