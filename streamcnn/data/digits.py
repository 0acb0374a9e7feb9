"""Binary pictures of the digits 0 to 9 at any size, for images that are generated.

The glyphs are scikit-learn's bundled 8 by 8 scans, so nothing is downloaded.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from streamcnn.extras import require

_INK_THRESHOLD = 7.0  # of 16 grey levels; below it the strokes of 8 and 9 close up


@lru_cache(maxsize=1)
def glyphs_by_digit() -> tuple[NDArray[np.float32], ...]:
    """All scans, sorted by what they show.

    Returns
    -------
    tuple of ten float32 arrays ``(num_glyphs, 8, 8)``, read-only
        Entry ``d`` holds the scans of digit ``d``; grey levels 0 (paper) to 16 (ink).

    Raises
    ------
    MissingExtra
        If scikit-learn is not installed.
    """
    scans = require("sklearn.datasets", extra="demo").load_digits()
    by_digit = tuple(scans.images[scans.target == digit].astype(np.float32) for digit in range(10))
    for glyphs in by_digit:
        glyphs.setflags(write=False)
    return by_digit


def draw(glyph: NDArray[np.float32], side: int) -> NDArray[np.bool_]:
    """A square ``glyph`` of grey levels drawn at ``(side, side)`` pixels; True is ink.

    Grey levels are interpolated linearly before they are cut, which rounds the outlines.
    """
    weights = _linear_weights(glyph.shape[0], side)
    return (weights @ glyph @ weights.T) > _INK_THRESHOLD


def _linear_weights(size: int, side: int) -> NDArray[np.float32]:
    """The matrix ``(side, size)`` that interpolates ``size`` samples linearly at ``side`` points."""
    centres = (np.arange(side, dtype=np.float32) + 0.5) * (size / side) - 0.5
    distance = np.abs(centres.clip(0, size - 1)[:, None] - np.arange(size, dtype=np.float32))
    return (1 - distance).clip(0, 1).astype(np.float32)
