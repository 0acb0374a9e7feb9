"""Taps: the positions that resampling reads along an axis, and their weights, by ATen's formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from streamcnn.geometry.axis_maps import Gathered

Places = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Taps:
    """The positions that each position of a result reads along one axis, equally many for all."""

    sources: tuple[Places, ...]
    """For each tap, the position that each result reads."""
    weights: tuple[tuple[float, ...], ...] | None = None
    """For each tap, its weight in each result; ``None`` if values are taken as they are."""
    counts: tuple[int, ...] | None = None
    """The number of taps that each result has, others being left out; ``None`` if each has all.

    A weight of zero is not enough: with an infinite value it makes NaN.
    """

    def missing(self, tap: int, results: slice) -> list[bool] | None:
        """For each of ``results``, whether it lacks a tap; ``None`` if none does."""
        lacks = [] if self.counts is None else [count <= tap for count in self.counts[results]]
        return lacks if any(lacks) else None

    @property
    def access(self) -> Gathered:
        """The access to all positions from the smallest to the largest of the taps."""
        return Gathered(tuple(map(min, *self._twice)), tuple(map(max, *self._twice)))

    @property
    def _twice(self) -> tuple[Places, ...]:
        """The sources, and the first again, since ``min`` and ``max`` need at least two."""
        return (*self.sources, self.sources[0])


def nearest_taps(
    num_out: int,
    size: int,
    scale: float | None,
    *,
    centred: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Taps | None:
    """The taps of the nearest neighbour; ``None`` where ATen's kernels disagree.

    ATen has two kernels, chosen by extents and memory format; gradients follow the first. The first computes
    positions in float32, and ignores a scale factor if an extent is kept or doubled. The second computes them
    in the map's dtype.

    Parameters
    ----------
    centred
        Whether positions are compared by their centres, as in "nearest-exact".
    dtype
        The map's dtype.
    """
    picked = _nearest(num_out, size, scale, centred, np.float32)
    if not centred and num_out in (size, 2 * size) and (picked != np.arange(num_out) * size // num_out).any():
        return None
    if dtype == torch.float64 and (picked != _nearest(num_out, size, scale, centred, np.float64)).any():
        return None
    return Taps((tuple(picked.tolist()),))


def _nearest(
    num_out: int, size: int, scale: float | None, centred: bool, dtype: npt.DTypeLike
) -> npt.NDArray[np.int64]:
    """The nearest positions, computed in ``dtype`` step by step as in ATen."""
    extents = np.array([size, num_out]).astype(dtype)
    step = np.array(1 / scale).astype(dtype) if scale is not None and scale > 0 else extents[0] / extents[1]
    places = (np.arange(num_out).astype(dtype) + np.array(0.5 if centred else 0.0).astype(dtype)) * step
    # ATen rounds to float32 before taking the floor.
    picked: npt.NDArray[np.int64] = np.floor(places.astype(np.float32)).astype(np.int64)
    return np.minimum(picked, size - 1)


def bilinear_taps(num_out: int, size: int, scale: float | None, align_corners: bool) -> Taps:
    """The taps of linear interpolation between two neighbours."""
    if num_out == size:
        # ATen then ignores scale factor and neighbours.
        kept = tuple(range(size))
        return Taps((kept, kept), ((1.0,) * size, (0.0,) * size))
    places = [max(place, 0.0) for place in _places(num_out, size, scale, align_corners)]
    first = tuple(min(int(place), size - 1) for place in places)
    second = tuple(min(place + 1, size - 1) for place in first)
    shares = tuple(min(max(p - f, 0.0), 1.0) for p, f in zip(places, first, strict=True))
    return Taps((first, second), (tuple(1 - share for share in shares), shares))


def bicubic_taps(num_out: int, size: int, scale: float | None, align_corners: bool) -> Taps:
    """The taps of cubic convolution (Keys 1981, a = -0.75) over four neighbours."""
    places = _places(num_out, size, scale, align_corners)
    middle = [min(math.floor(place), size - 1) for place in places]
    rests = [min(max(place - floor, 0.0), 1.0) for place, floor in zip(places, middle, strict=True)]
    return Taps(
        tuple(tuple(min(max(floor + tap, 0), size - 1) for floor in middle) for tap in range(-1, 3)),
        tuple(tuple(_cubic(rest - tap, -0.75) for rest in rests) for tap in range(-1, 3)),
    )


def _places(num_out: int, size: int, scale: float | None, align_corners: bool) -> list[float]:
    """The coordinate in the operand of each position of the result."""
    step = _step(num_out, size, scale, align_corners)
    return [index * step if align_corners else (index + 0.5) * step - 0.5 for index in range(num_out)]


def _step(num_out: int, size: int, scale: float | None, align_corners: bool) -> float:
    """The distance in the operand between neighbouring positions of the result."""
    if align_corners:
        return (size - 1) / (num_out - 1) if num_out > 1 else 0.0
    return 1 / scale if scale is not None and scale > 0 else size / num_out


def _cubic(distance: float, a: float) -> float:
    """The kernel of cubic convolution."""
    x = abs(distance)
    if x <= 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return ((x - 5) * x + 8) * x * a - 4 * a if x < 2 else 0.0


def _triangle(distance: float) -> float:
    return max(1 - abs(distance), 0.0)


Kernel = tuple[Callable[[float], float], float]
"""A filter, and its radius."""
TRIANGLE: Kernel = (_triangle, 1.0)
CUBIC: Kernel = (lambda distance: _cubic(distance, -0.5), 2.0)


def antialiased_taps(
    num_out: int, size: int, scale: float | None, align_corners: bool, kernel: Kernel
) -> Taps:
    """The taps of a filter that is widened for a coarser result, as in PIL."""
    if num_out == size:
        # ATen skips such an axis, and so does not read neighbours of weight zero, which may be infinite.
        return Taps((tuple(range(size)),))
    filtered, reach = kernel
    step = _step(num_out, size, scale, align_corners)
    widening = max(step, 1.0)
    windows, weights = [], []
    for index in range(num_out):
        # ATen's kernel takes the step from aligned corners, but not the coordinates.
        centre = step * (index + 0.5)
        first = max(int(centre - reach * widening + 0.5), 0)
        last = min(int(centre + reach * widening + 0.5), size)
        each = [filtered((place - centre + 0.5) / widening) for place in range(first, last)]
        total = sum(each)
        windows.append(range(first, last))
        weights.append([weight / total for weight in each])
    longest = max(map(len, windows))
    return Taps(
        tuple(tuple(window[min(tap, len(window) - 1)] for window in windows) for tap in range(longest)),
        tuple(tuple(each[tap] if tap < len(each) else 0.0 for each in weights) for tap in range(longest)),
        tuple(map(len, windows)),
    )
