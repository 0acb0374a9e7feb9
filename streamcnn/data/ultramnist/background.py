"""The noise behind the digits: a rotated grid of random cells, combined by XOR with circles and triangles.

A binary grid of 12 to 23 cells a side is spread over the canvas and transformed about its centre, in the
convention of torchvision's RandomAffine (rotation * shear * scale; 0 outside of the grid). The middle half is
cropped and enlarged to the canvas. We use nearest neighbour throughout; the authors' released code resamples
with bicubic interpolation and thresholds the result, which differs only along the cells' edges. Up to four
circles and up to four triangles are filled on one mask.

Angles and lengths are drawn as integers, and the insides of shapes are decided in integers, so that no
machine's rounding matters. Pictures are computed as *changes*: pixels that differ from the one above. This
takes work only where something changes, not at every pixel. Position ``(row, col)`` is a pixel's centre.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from math import isqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamcnn.data.ultramnist.draws import Draws
from streamcnn.data.ultramnist.layout import proportional

_CELLS = (12, 23)
_MAX_ROTATION = 45_000_000  # microdegrees
_MAX_SHEAR = 50_000_000
_SCALE = (800_000, 1_200_000)  # millionths
_MAX_CIRCLES = _MAX_TRIANGLES = 4
_RADIUS = (50, 999)  # pixels on the canvas of reference

_PI = 3141592653589793238462643383279502884197  # times 10^-39
_ONE = 2**80  # fixed point of sine and cosine
_CELL_BITS = 40  # positions on the grid are counted in 2^-40 cells: 2^-30 pixels, yet no overflow

Mask = NDArray[np.bool_]
Integers = NDArray[np.int64]


class Circle(NamedTuple):
    """All pixels at most ``radius`` pixels from ``(row, col)``."""

    row: int
    col: int
    radius: int


class Triangle(NamedTuple):
    """All pixels between three corners ``(row, col)``, edges and corners included."""

    a: tuple[int, int]
    b: tuple[int, int]
    c: tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Background:
    """The draws for one image: ``cells`` ``(n, n)``, microdegrees, millionths and pixels."""

    size: int
    cells: Mask
    rotation: int
    shear: int
    scale: int
    circles: tuple[Circle, ...]
    triangles: tuple[Triangle, ...]


def draw_background(draws: Draws, size: int) -> Background:
    """A random background for a canvas of ``size`` pixels a side."""
    num_cells = draws.between(*_CELLS)
    cells = [[draws.below(2) == 1 for _ in range(num_cells)] for _ in range(num_cells)]
    return Background(
        size,
        np.array(cells),
        rotation=draws.between(-_MAX_ROTATION, _MAX_ROTATION),
        shear=draws.between(-_MAX_SHEAR, _MAX_SHEAR),
        scale=draws.between(*_SCALE),
        circles=tuple(_draw_circle(draws, size) for _ in range(draws.below(_MAX_CIRCLES + 1))),
        triangles=tuple(_draw_triangle(draws, size) for _ in range(draws.below(_MAX_TRIANGLES + 1))),
    )


def changes(background: Background) -> Mask:
    """Where grid XOR shapes differs from the pixel above, ``(size, size)``; above the first row is 0.

    Each row of the picture itself is the XOR of all rows of this up to it.
    """
    size = background.size
    changed = np.zeros((size, size), dtype=np.bool_)
    _mark_grid(background, changed)
    spans = [_circle_spans(circle, size) for circle in background.circles]
    spans += [_triangle_spans(triangle, size) for triangle in background.triangles]
    if spans:
        _mark_union(np.stack(spans, axis=1), changed)
    return changed


def _draw_circle(draws: Draws, size: int) -> Circle:
    return Circle(draws.below(size), draws.below(size), proportional(draws.between(*_RADIUS), size))


def _draw_triangle(draws: Draws, size: int) -> Triangle:
    a, b, c = ((draws.below(size), draws.below(size)) for _ in range(3))
    return Triangle(a, b, c)


class Axis(NamedTuple):
    """One axis of the grid: steps of the position on it, in 2^-40 cells per half pixel of the canvas."""

    per_row: int
    per_col: int


def axes_of(background: Background) -> tuple[Axis, Axis]:
    """The rows and the columns of the grid, by the inverse of rotation * shear * scale."""
    sin, cos = sin_cos(background.rotation)
    _, cos_shear = sin_cos(background.shear)
    sin_both, cos_both = sin_cos(background.rotation + background.shear)
    # The canvas shows half of the grid, so half a pixel is 1 / (4 size) of it.
    cells = len(background.cells) * 10**6 << _CELL_BITS
    half_pixels = background.scale * 4 * background.size
    rows = Axis(cells * cos // (half_pixels * _ONE), -cells * sin // (half_pixels * _ONE))
    cols = Axis(cells * sin_both // (half_pixels * cos_shear), cells * cos_both // (half_pixels * cos_shear))
    return rows, cols


def sin_cos(microdegrees: int) -> tuple[int, int]:
    """Sine and cosine times 2^80 by their series, independent of rounding in a machine's library."""
    angle = microdegrees * _PI * _ONE // (180 * 10**6 * 10**39)
    sums, term = [0, 0, 0, 0], _ONE
    for power in range(32):
        sums[power % 4] += term
        term = term * angle // (_ONE * (power + 1))
    return sums[1] - sums[3], sums[0] - sums[2]


def _mark_grid(background: Background, changed: Mask) -> None:
    """Mark in ``changed``, which is empty, where the transformed grid differs from the pixel above."""
    size, axes = background.size, axes_of(background)
    cols = np.arange(size, dtype=np.int64)
    changed[0] = colours(background, axes, np.zeros_like(cols), cols)
    for axis in axes:
        rows = _crossings(axis, len(background.cells), size)
        inside = (rows > 0) & (rows < size)
        row, col = rows[inside], np.nonzero(inside)[1]
        # Set, not flipped, as a pixel that crosses lines of both axes occurs twice.
        above = colours(background, axes, row - 1, col)
        changed[row, col] = colours(background, axes, row, col) != above


def colours(background: Background, axes: tuple[Axis, Axis], rows: Integers, cols: Integers) -> Mask:
    """The values of the transformed grid at some pixels of the canvas."""
    bordered = np.pad(background.cells, 1)
    size, num_cells = background.size, len(background.cells)
    from_centre = 2 * rows + 1 - size, 2 * cols + 1 - size
    cell = [
        axis.per_row * from_centre[0] + axis.per_col * from_centre[1] + (num_cells << _CELL_BITS - 1)
        for axis in axes
    ]
    row, col = (np.clip(position >> _CELL_BITS, -1, num_cells) + 1 for position in cell)
    colours: Mask = bordered[row, col]
    return colours


def _crossings(axis: Axis, num_cells: int, size: int) -> Integers:
    """The first row, top to bottom, on the other side of each line between cells, ``(num_cells + 1, size)``.

    Rows outside of the canvas mean that a column does not cross the line.
    """
    if axis.per_row == 0:
        return np.zeros((num_cells + 1, size), dtype=np.int64)
    lines, cols = np.arange(num_cells + 1, dtype=np.int64)[:, None], np.arange(size, dtype=np.int64)
    # A line is crossed once per_row * (2 row + 1 - size) reaches this, or falls below it.
    level = (lines << _CELL_BITS) - (num_cells << _CELL_BITS - 1) - axis.per_col * (2 * cols + 1 - size)
    if axis.per_row < 0:
        level = 1 - level
    steps = -(-level // abs(axis.per_row))
    return np.asarray((steps + size) // 2)


def _circle_spans(circle: Circle, size: int) -> Integers:
    """First row inside and first row after, for each column, ``(2, size)``; both ``size`` if none is."""
    row, col, radius = circle
    cols = range(max(0, col - radius), min(size, col + radius + 1))
    reach = np.array([isqrt(radius**2 - (at - col) ** 2) for at in cols], dtype=np.int64)
    spans = np.full((2, size), size, dtype=np.int64)
    spans[:, cols.start : cols.stop] = np.maximum(row - reach, 0), np.minimum(row + reach + 1, size)
    return spans


def _triangle_spans(triangle: Triangle, size: int) -> Integers:
    """As `_circle_spans`."""
    low, high = np.full(size, size, dtype=np.int64), np.full(size, -1, dtype=np.int64)
    # A vertical edge occurs in both directions, each for one of its ends.
    for (row, col), (end_row, end_col) in permutations(triangle, 2):
        if col <= end_col:
            here = slice(col, end_col + 1)
            length = max(1, end_col - col)
            rise = (end_row - row) * np.arange(end_col - col + 1, dtype=np.int64)
            low[here] = np.minimum(low[here], row - (-rise // length))
            high[here] = np.maximum(high[here], row + rise // length)
    return np.where(low <= high, (low, high + 1), size)


def _mark_union(spans: Integers, changed: Mask) -> None:
    """Flip the marks where the union of ``spans`` ``(2, num_shapes, size)`` begins and ends in a column."""
    size = changed.shape[0]
    order = np.argsort(spans[0], axis=0)
    starts, stops = (np.take_along_axis(rows, order, axis=0) for rows in spans)
    stops = np.maximum.accumulate(stops, axis=0)
    apart = starts[1:] > stops[:-1]
    edge = np.ones((1, size), dtype=np.bool_)
    for rows, ends in ((starts, np.vstack([edge, apart])), (stops, np.vstack([apart, edge]))):
        inside = ends & (rows < size)
        changed[rows[inside], np.nonzero(inside)[1]] ^= True
