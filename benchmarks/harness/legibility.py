"""The share of images that can be read at all at a resolution: all of their digits keep enough pixels."""

from __future__ import annotations

from functools import cache

from benchmarks.harness.images import DATA_SEED
from benchmarks.harness.scales import Scale
from streamcnn.data.ultramnist import Spec, make_layout

LEGIBLE_PIXELS = 7
"""Height and width of the smallest digit that can be read: a quarter of MNIST's."""
_NUM_LAYOUTS = 2000
"""Of test images that are looked at, at most: one standard error is 1.1 points, or less."""


def legibility_ceiling(scale: Scale, resolution: int) -> float:
    """The share of test images whose digits all have ``LEGIBLE_PIXELS`` at a resolution in pixels."""
    sides = _smallest_sides(scale)
    return sum(side * resolution >= LEGIBLE_PIXELS * scale.canvas for side in sides) / len(sides)


@cache
def _smallest_sides(scale: Scale) -> tuple[int, ...]:
    spec = Spec(seed=DATA_SEED, recipe=scale.recipe, size=scale.canvas)
    layouts = (make_layout(spec, "test", index) for index in range(min(scale.num_test, _NUM_LAYOUTS)))
    return tuple(min(digit.side for digit in layout.digits) for layout in layouts)
