"""Memory that reading regions takes for images in chunks, tiles and strips."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from streamcnn.data.sources.layout import Layout
from streamcnn.plan.reading import ReadingCost

REGION_COPIES = 2
"""The crop of the chunks, and the tensor, which is another copy if its axes are in another order."""


def chunked_cost(
    layout: Layout,
    shape: Sequence[int],
    chunks: Sequence[int],
    dtype: np.dtype[np.generic],
    *,
    copies: int,
    at_once: int | None,
) -> ReadingCost:
    """The cost of an array of which whole chunks are decoded, one after another or several at a time.

    Parameters
    ----------
    shape, chunks
        Extents of the array and of its chunks, in the order of ``layout``.
    copies
        Number of copies of a chunk in memory while it is decoded, including its encoded bytes.
    at_once
        Largest number of chunks that are decoded at a time; None for all that a region touches.
    """
    places = {axis: position for position, axis in enumerate(layout.axes) if axis in "YX"}
    rows, cols = places["Y"], places["X"]
    channels, height, width = layout.image_shape(tuple(shape))
    # Axes without a letter have extent 1, so several chunks in depth are those of channels alone.
    depth = next(
        (chunk for chunk, axis in zip(chunks, layout.axes, strict=True) if axis == "C"), max(channels, 1)
    )
    return ReadingCost(
        (height, width),
        pixel=REGION_COPIES * channels * dtype.itemsize,
        piece=(chunks[rows], chunks[cols]),
        piece_bytes=copies * math.prod(chunks) * dtype.itemsize,
        layers=-(-channels // depth),
        at_once=at_once,
    )


def described(what: str, extents: Sequence[int]) -> str:
    """A kind of piece with its extents, for messages: ``chunks of 3 x 512 x 512``."""
    return f"{what} of {' x '.join(map(str, extents))}"
