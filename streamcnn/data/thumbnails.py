"""Thumbnails of large images, read part by part, with optional boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamcnn.data.sources import ImageSource
from streamcnn.geometry.regions import Interval, Region
from streamcnn.support.extras import require

PART_PIXELS = 2**22
"""Pixels that are read at a time; at least a block."""
_BOX_COLOUR, _ON_BOX = (255, 96, 0), (255, 255, 255)
_FONT, _TAG = 13, 15
"""Height in pixels of the text beside a box, and of the patch under it."""


def thumbnail(source: ImageSource, edge: int, boxes: Sequence[dict[str, Any]] = ()) -> Any:
    """A Pillow picture of ``edge`` pixels on the longer side, downsampled by averaging.

    The first three channels are red, green and blue; with one or two channels, the first is grey.

    Parameters
    ----------
    source
        Integers from 0 to the image's largest possible value, or floats from 0 to 1. Values beyond are
        clipped, and NaN is black.
    edge
        Length in pixels. A smaller image keeps its size.
    boxes
        Boxes to mark: ``box`` as (top, left, bottom, right) in pixels of the image, and ``value``, which
        is written beside it.

    Raises
    ------
    MissingExtra
        If Pillow is not installed.
    """
    pillow = require("PIL.Image", extra="plots")
    _, height, width = source.shape
    scale = min(1.0, edge / max(height, width))
    # Averaged by an integer factor first, so that Pillow does not need the whole image.
    small = pillow.fromarray(shrunk(source, max(1, max(height, width) // edge)))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    picture = small.resize(size, pillow.Resampling.BOX)
    draw = require("PIL.ImageDraw", extra="plots").Draw(picture)
    for known in boxes:
        top, left, bottom, right = (round(at * scale) for at in known["box"])
        draw.rectangle((left - 1, top - 1, right, bottom), outline=_BOX_COLOUR, width=2)
        _write_tag(draw, str(known["value"]), (left - 1, top - _TAG if top >= _TAG else bottom + 1))
    return picture


def _write_tag(draw: Any, text: str, corner: tuple[float, float]) -> None:
    """Write on a patch of the box's colour, as the picture below may have any colour."""
    left, top = corner
    width = draw.textlength(text, font_size=_FONT)
    draw.rectangle((left, top, left + width + 3, top + _TAG - 1), fill=_BOX_COLOUR)
    draw.text((left + 2, top + _TAG / 2), text, fill=_ON_BOX, font_size=_FONT, anchor="lm")


def shrunk(source: ImageSource, factor: int) -> NDArray[np.uint8]:
    """Means of ``factor`` x ``factor`` blocks of pixels, (h, w, 3); those at the far edges may be smaller."""
    means = _in_parts(source, factor, lambda region: block_means(colours(source, region), factor))
    return np.ascontiguousarray(means.round().astype(np.uint8).transpose(1, 2, 0))


def sampled(source: ImageSource, factor: int) -> NDArray[Any]:
    """Every ``factor``-th row and column, from the first on, as stored: (C, h, w)."""
    return _in_parts(source, factor, lambda region: source.read(region).numpy()[:, ::factor, ::factor])


def _in_parts(source: ImageSource, factor: int, small: Callable[[Region], NDArray[Any]]) -> NDArray[Any]:
    """Apply ``small`` to parts of the image with whole blocks of ``factor`` pixels, and join the results."""
    _, height, width = source.shape
    columns = factor * max(1, min(-(-width // factor), PART_PIXELS // factor**2))
    rows = factor * max(1, PART_PIXELS // (factor * columns))
    bands = []
    for top in range(0, height, rows):
        parts = []
        for left in range(0, width, columns):
            region = Region(
                Interval(top, min(top + rows, height)), Interval(left, min(left + columns, width))
            )
            parts.append(small(region))
        bands.append(np.concatenate(parts, 2))
    return np.concatenate(bands, 1)


def colours(source: ImageSource, region: Region) -> NDArray[np.float32]:
    """Red, green and blue of a region, (3, h, w) from 0 to 255, and 0 for NaN; see `thumbnail`."""
    wanted = [0, 1, 2] if source.shape[0] >= 3 else [0, 0, 0]
    pixels = source.read(region).numpy()[wanted]
    scaled: NDArray[np.float32] = pixels.astype(np.float32) * np.float32(255 / (source.largest or 1))
    # A NaN would make the mean of its whole block NaN.
    return np.nan_to_num(scaled, copy=False, nan=0).clip(0, 255)


def block_means(pixels: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    """Means of ``factor`` x ``factor`` blocks of (C, h, w); those at the far edges may be smaller."""
    return _means_along(_means_along(pixels, factor, 1), factor, 2)


def _means_along(pixels: NDArray[np.float32], factor: int, axis: int) -> NDArray[np.float32]:
    starts = np.arange(0, pixels.shape[axis], factor)
    counts = np.diff(np.append(starts, pixels.shape[axis])).astype(np.float32)
    along = [-1 if a == axis else 1 for a in range(3)]
    means: NDArray[np.float32] = (np.add.reduceat(pixels, starts, axis) / counts.reshape(along)).astype("f4")
    return means
