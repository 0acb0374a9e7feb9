"""Large synthetic images for the demo: digits on a busy background, to be summed.

A light version of the UltraMNIST recipe (Gupta et al., arXiv 2206.12681): three to five digits
whose sides go from 14 pixels to half the image with both extremes likely, on a rotated and
sheared checkerboard joined by XOR with circles and triangles. It is *not* the benchmark itself.

Every image is a pure function of (seed, index, size).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from streamcnn.data.digits import draw, glyphs_by_digit
from streamcnn.data.sources import ZarrSource, write_zarr_image
from streamcnn.errors import CorruptImage, DatasetMismatch
from streamcnn.regions import Interval, Region

NUM_CLASSES = 28
MIN_SIZE = 64
MIN_DIGIT_SIDE = 14
LABELS_FILE = "labels.json"

_MAX_LABEL = NUM_CLASSES - 1
_ROWS_PER_STRIP = 256  # the checkerboard's temporaries stay in the processor's cache

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class PlacedDigit:
    """One digit of a scene: what it shows, which of the scans, and the square that it covers."""

    digit: int
    glyph: int
    region: Region


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """A generated image: ``image`` uint8 ``(1, size, size)`` of 0 and 255, and how it was made."""

    image: NDArray[np.uint8]
    digits: tuple[PlacedDigit, ...]

    @property
    def label(self) -> int:
        """The sum of the digits, 0 to 27."""
        return sum(placed.digit for placed in self.digits)


def make_scene(*, seed: int, index: int, size: int) -> Scene:
    """Image number ``index`` of the series ``seed``, ``size`` pixels high and wide.

    Raises
    ------
    ValueError
        If ``size`` leaves no room for the digits.
    MissingExtra
        If scikit-learn is not installed.
    """
    if size < MIN_SIZE:
        raise ValueError(f"image size {size} is too small for five digits: allowed are {MIN_SIZE} and more")
    rng = np.random.default_rng((seed, index, size))
    ink = _checkerboard(rng, size)
    for _ in range(rng.integers(1, 4)):
        _invert_circle(rng, ink)
        _invert_triangle(rng, ink)
    digits = _place_digits(rng, size)
    for placed in digits:
        _invert_digit(ink, placed)
    image = ink.view(np.uint8)
    image *= 255
    return Scene(image[None], digits)


def write_scenes(folder: str | Path, num_images: int, size: int, seed: int) -> None:
    """Write ``num_images`` scenes as zarr arrays ``0000.zarr``, ... and their labels.

    Each array is uint8 ``(1, size, size)``. The labels are written last, so a folder that has
    them is complete.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    (target / LABELS_FILE).unlink(missing_ok=True)
    labels: dict[str, int] = {}
    for index in range(num_images):
        scene = make_scene(seed=seed, index=index, size=size)
        name = f"{index:04d}.zarr"
        write_zarr_image(target / name, torch.from_numpy(scene.image))
        labels[name] = scene.label
    (target / LABELS_FILE).write_text(json.dumps(labels, indent=1) + "\n", encoding="utf-8")


def open_scenes(folder: str | Path) -> list[tuple[ZarrSource, int]]:
    """The images of a folder from `write_scenes`, opened but not read, each with its label.

    Raises
    ------
    DatasetMismatch
        If the folder has no labels, so that it is no scene folder or was not finished.
    CorruptImage
        If the labels cannot be parsed or an image cannot be opened.
    """
    path = Path(folder) / LABELS_FILE
    try:
        labels: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DatasetMismatch(
            f"no {LABELS_FILE} in {folder}: write the images again, it comes last"
        ) from error
    except ValueError as error:
        raise CorruptImage(f"cannot parse {path}: {error}; write the images again") from error
    return [(ZarrSource(path.parent / name), label) for name, label in labels.items()]


def _checkerboard(rng: np.random.Generator, size: int) -> Mask:
    """A checkerboard rotated by up to 45 degrees and sheared by up to 50 %, ``(size, size)``."""
    cell = size * rng.uniform(0.1, 0.25)
    angle = rng.uniform(-math.pi / 4, math.pi / 4)
    shear = rng.uniform(-0.5, 0.5)
    offset = rng.uniform(0, 2, size=2)
    at = (np.arange(size, dtype=np.float32) - size / 2) / cell
    # floor(u) + floor(v) is odd on the black cells, where (u, v) are the sheared, rotated axes.
    sin, cos = math.sin(angle), math.cos(angle)
    u_of_col, u_of_row = at * np.float32(cos + shear * sin), at * np.float32(shear * cos - sin) + offset[0]
    v_of_col, v_of_row = at * np.float32(sin), at * np.float32(cos) + offset[1]
    board = np.empty((size, size), dtype=np.bool_)
    for start in range(0, size, _ROWS_PER_STRIP):
        strip = slice(start, start + _ROWS_PER_STRIP)
        u = _floor(u_of_row[strip, None].astype(np.float32) + u_of_col)
        v = _floor(v_of_row[strip, None].astype(np.float32) + v_of_col)
        board[strip] = ((u ^ v) & 1).astype(np.bool_)
    return board


def _floor(values: NDArray[np.float32]) -> NDArray[np.int32]:
    return np.floor(values, out=values).astype(np.int32)


def _invert_circle(rng: np.random.Generator, ink: Mask) -> None:
    size = ink.shape[0]
    radius = size * rng.uniform(0.05, 0.25)
    row, col = rng.uniform(0, size, size=2)
    rows, cols = _pixels(row - radius, row + radius, size), _pixels(col - radius, col + radius, size)
    inside = (rows[:, None] - row) ** 2 + (cols - col) ** 2 < radius**2
    _invert(ink, rows, cols, inside)


def _invert_triangle(rng: np.random.Generator, ink: Mask) -> None:
    size = ink.shape[0]
    corners = rng.uniform(0, size, size=2) + rng.uniform(-size / 4, size / 4, size=(3, 2))
    (low_row, low_col), (high_row, high_col) = corners.min(axis=0), corners.max(axis=0)
    rows, cols = _pixels(low_row, high_row, size), _pixels(low_col, high_col, size)
    sides = [
        (c1 - c0) * (rows[:, None] - r0) - (r1 - r0) * (cols - c0) > 0
        for (r0, c0), (r1, c1) in zip(corners, np.roll(corners, -1, axis=0), strict=True)
    ]
    # Inside is on the same side of all three edges; which one depends on the corners' order.
    _invert(ink, rows, cols, (sides[0] == sides[1]) & (sides[1] == sides[2]))


def _pixels(low: float, high: float, size: int) -> NDArray[np.float32]:
    """The pixel coordinates from ``low`` to ``high`` that lie in the image."""
    return np.arange(max(0, math.floor(low)), min(size, math.ceil(high) + 1), dtype=np.float32)


def _invert(ink: Mask, rows: NDArray[np.float32], cols: NDArray[np.float32], inside: Mask) -> None:
    """Flip the pixels ``inside`` the block that ``rows`` and ``cols`` span; empty blocks do nothing."""
    if rows.size and cols.size:
        ink[int(rows[0]) : int(rows[-1]) + 1, int(cols[0]) : int(cols[-1]) + 1] ^= inside


def _invert_digit(ink: Mask, placed: PlacedDigit) -> None:
    rows, cols = placed.region
    glyph = glyphs_by_digit()[placed.digit][placed.glyph]
    ink[rows.start : rows.stop, cols.start : cols.stop] ^= draw(glyph, rows.size)


def _place_digits(rng: np.random.Generator, size: int) -> tuple[PlacedDigit, ...]:
    """Three to five digits with a sum of at most 27 on squares that do not overlap."""
    digits = rng.integers(0, 10, size=rng.integers(3, 6))
    while digits.sum() > _MAX_LABEL:
        digits = rng.integers(0, 10, size=digits.size)
    regions = _place_squares(rng, size, digits.size)
    counts = [len(glyphs) for glyphs in glyphs_by_digit()]
    return tuple(
        PlacedDigit(int(digit), int(rng.integers(counts[digit])), region)
        for digit, region in zip(digits, regions, strict=True)
    )


def _place_squares(rng: np.random.Generator, size: int, num_squares: int) -> list[Region]:
    """Disjoint squares at random places, drawn anew as a whole when the last ones find no room."""
    while True:
        placed: list[Region] = []
        for _ in range(100):
            square = _random_square(rng, size)
            if not any(_overlap(square, other) for other in placed):
                placed.append(square)
            if len(placed) == num_squares:
                return placed


def _random_square(rng: np.random.Generator, size: int) -> Region:
    """A square in the image whose side prefers both extremes: its density is a V."""
    smallest, largest = MIN_DIGIT_SIDE, size // 2
    distance = math.sqrt(rng.uniform()) * rng.choice((-1.0, 1.0))  # from the middle, density |x|
    side = round(smallest + (distance + 1) / 2 * (largest - smallest))
    row, col = (int(value) for value in rng.integers(0, size - side + 1, size=2))
    return Region(Interval(row, row + side), Interval(col, col + side))


def _overlap(a: Region, b: Region) -> bool:
    return a.rows.intersect(b.rows).size > 0 and a.cols.intersect(b.cols).size > 0
