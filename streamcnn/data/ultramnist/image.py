"""UltraMNIST images: digits XOR background, rendered at full size."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from streamcnn.data.ultramnist.background import changes, draw_background
from streamcnn.data.ultramnist.digits import Digits, DigitSet
from streamcnn.data.ultramnist.draws import Draws
from streamcnn.data.ultramnist.layout import GLYPH_SIDE, Layout, Recipe, Spec, make_layout
from streamcnn.geometry.regions import Region

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class UltraMnistImage:
    """A generated image and how it was made.

    ``pixels`` is uint8 ``(1, size, size)`` of 0 and 255. Entry ``i`` of ``glyphs`` is the position in the
    split's `DigitSet` of the image that digit ``i`` of the layout was drawn from.
    """

    pixels: NDArray[np.uint8]
    layout: Layout
    glyphs: tuple[int, ...]


def make_image(spec: Spec, split: str, index: int, digits: Digits) -> UltraMnistImage:
    """Make image ``index`` of a split; a pure function of its arguments, identical on any machine.

    Raises
    ------
    ValueError
        If there is no such split or the index is negative.
    """
    layout = make_layout(spec, split, index)
    source = digits.split(split)
    glyphs = _choose_glyphs(spec, split, index, layout, source)
    if spec.recipe is Recipe.SINGLE:
        changed = np.zeros((spec.size, spec.size), np.bool_)
    else:
        draws = Draws("background", seed=spec.seed, split=split, index=index, size=spec.size)
        changed = changes(draw_background(draws, spec.size))
    for digit, glyph in zip(layout.digits, glyphs, strict=True):
        _mark_glyph(changed, source.images[glyph], digit.box)
    return UltraMnistImage(_integrate(changed)[None], layout, glyphs)


def _choose_glyphs(spec: Spec, split: str, index: int, layout: Layout, source: DigitSet) -> tuple[int, ...]:
    draws = Draws("glyphs", seed=spec.seed, split=split, index=index)
    return tuple(draws.choice(source.of(digit.value).tolist()) for digit in layout.digits)


def _mark_glyph(changed: Mask, glyph: Mask, box: Region) -> None:
    """Flip the marks where ``glyph`` ``(28, 28)``, enlarged to ``box`` by nearest neighbour, changes."""
    side = box.rows.size
    nearest = np.arange(side, dtype=np.int64) * GLYPH_SIDE // side
    lines = np.flatnonzero(np.diff(nearest, prepend=-1))  # rows that may differ from the one above
    drawn = np.zeros((lines.size + 2, side), dtype=np.bool_)
    drawn[1:-1] = glyph[nearest[lines]][:, nearest]
    cols = slice(box.cols.start, box.cols.stop)
    for row, (above, line) in zip([*lines, side], pairwise(drawn), strict=True):
        # Changes below the last row of the canvas have no effect.
        changed[box.rows.start + row : box.rows.start + row + 1, cols] ^= above ^ line


def _integrate(changed: Mask) -> NDArray[np.uint8]:
    """The picture of 0 and 255 with these changes from row to row, computed in their memory."""
    pixels = changed.view(np.uint8)
    for above, row in pairwise(pixels):
        row ^= above
    pixels *= 255
    return pixels
