"""The layout of an UltraMNIST image: its digits, their sizes and their places, without pixels.

The set is that of Gupta et al., UltraMNIST Classification (arXiv 2206.12681): 28 classes, the sums 0 to 27
of three to five digits, with sides from 14 to 2100 pixels on a canvas of 4000, both extremes likely.
There are two recipes for the sizes, see `Recipe`, and a third for an easier task. On other canvas sizes all
lengths are proportional, except in the third recipe.

Everything is a pure function of its arguments, in integers.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement
from typing import NamedTuple

from streamcnn.data.ultramnist.draws import Draws
from streamcnn.geometry.regions import Interval, Region

NUM_CLASSES = 28
GLYPH_SIDE = 28  # pixels of a digit's image before it is enlarged
REFERENCE_SIZE = 4000  # the canvas that the recipes give lengths for
MIN_SIZE = 64
SPLITS = ("train", "test")

_DIGIT_COUNTS = (3, 4, 5)
# Entry i is the weight of factor i + 1: a V from 38 down to 1 and up to 37.
_FACTOR_WEIGHTS = (*range(38, 0, -1), *range(1, 38))
_HALF = 0  # in the place of a factor: a digit of 14 pixels
_HALF_SIDE = 14
_WHOLE = 10**9  # over which the weights of a single digit's sides are integers

# Numbers of tries after which all places are discarded: for an image, needed only if the first digits cover
# the whole canvas; for one place, needed whenever the sizes do not fit together.
FAITHFUL_TRIES = 10_000
_BALANCED_TRIES = 100


class Recipe(enum.Enum):
    """How digits get their sizes.

    ``FAITHFUL`` follows the authors' released code. Digits are placed in ascending order, and one that
    overlaps earlier ones gets a new size along with its new position. The fuller the canvas, the less often
    large sizes fit, so the size reveals the digit: a 0 is about twice as large as a 9.

    ``BALANCED`` makes sizes and places independent of the digits' values, number and sum. Places for five
    digits are drawn in every image, and its three to five digits, shuffled, take a random choice of them. A
    place keeps its size while positions are tried, the largest place first. If a place finds no free position
    in 100 tries, all five sizes are drawn again, whatever the digits. So sizes follow the V-shaped weights,
    given that five such squares fit: the largest are rarer than their weights, though less so than in
    ``FAITHFUL``.

    ``SINGLE`` is an easier task of ten classes for small canvases, not the paper's: one digit, whose value is
    the label, on an empty canvas. Its side is from 14 pixels to half of the canvas, of any size, with a
    uniform logarithm.
    """

    FAITHFUL = "faithful"
    BALANCED = "balanced"
    SINGLE = "single"

    @property
    def num_classes(self) -> int:
        """Number of classes; labels are from 0 on."""
        return 10 if self is Recipe.SINGLE else NUM_CLASSES


@dataclass(frozen=True, slots=True)
class Spec:
    """The settings of a generated set.

    Parameters
    ----------
    seed : int
        0 or more; sets with different seeds are unrelated.
    recipe : Recipe
        How digits get their sizes.
    size : int
        Height and width of the images in pixels, 64 or more.

    Raises
    ------
    ValueError
        If a value is not allowed.
    """

    seed: int
    recipe: Recipe
    size: int

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} is negative: allowed are 0 and more")
        if not isinstance(self.recipe, Recipe):
            names = ", ".join(str(recipe) for recipe in Recipe)
            raise ValueError(f"unknown recipe {self.recipe!r}: allowed are {names}")
        if self.size < MIN_SIZE:
            raise ValueError(
                f"image size {self.size} is too small for five digits: allowed are {MIN_SIZE} and more"
            )


@dataclass(frozen=True, slots=True)
class PlacedDigit:
    """One digit of an image: the square ``box`` of ``side`` pixels shows ``value``.

    ``factor`` is the enlargement on a canvas of 4000, 1 to 75, and 0 for the half that makes 14 pixels; in
    the recipe for a single digit that on the canvas itself, rounded down.
    """

    value: int
    side: int
    factor: int
    box: Region


@dataclass(frozen=True, slots=True)
class Layout:
    """The digits of one image, in the order in which the recipe takes them; their boxes do not overlap."""

    digits: tuple[PlacedDigit, ...]

    @property
    def label(self) -> int:
        """The sum of the digits, 0 to 27."""
        return sum(digit.value for digit in self.digits)


class Place(NamedTuple):
    """A square of pixels, and the factor with which it was drawn."""

    factor: int
    side: int
    row: int
    col: int


def proportional(length: int, size: int) -> int:
    """``length`` pixels of a canvas of 4000 on one of ``size``, at least 1; half a pixel is rounded up."""
    return max(1, (2 * length * size + REFERENCE_SIZE) // (2 * REFERENCE_SIZE))


def label_of(spec: Spec, split: str, index: int) -> int:
    """The class of image ``index``, which depends only on seed, split, index and the number of classes.

    Every 28 consecutive images from a multiple of 28 on have every class once; likewise with 10 classes.

    Raises
    ------
    ValueError
        If there is no such split or the index is negative.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: allowed are {' and '.join(map(repr, SPLITS))}")
    if index < 0:
        raise ValueError(f"image index {index} is negative: allowed are 0 and more")
    classes = range(spec.recipe.num_classes)
    block, position = divmod(index, len(classes))
    return Draws("labels", seed=spec.seed, split=split, block=block).shuffled(classes)[position]


def make_layout(spec: Spec, split: str, index: int) -> Layout:
    """The digits of image ``index`` of a split, their sizes and places.

    The digits are a choice among all sorted groups of three to five with the label as their sum. They depend
    only on seed, split and index; sizes and places depend on the recipe and the canvas size as well.

    Raises
    ------
    ValueError
        If there is no such split or the index is negative.
    """
    key: dict[str, int | str] = {"seed": spec.seed, "split": split, "index": index}
    label = label_of(spec, split, index)
    draws = Draws("layout", **key, recipe=spec.recipe.value, size=spec.size)
    if spec.recipe is Recipe.SINGLE:
        return Layout((_place_digit(label, _draw_single(draws, spec.size)),))
    values = Draws("values", **key).choice(digit_groups(label))
    place = _place_faithfully if spec.recipe is Recipe.FAITHFUL else _place_balanced
    return Layout(place(values, draws, spec.size))


@cache
def digit_groups(label: int) -> tuple[tuple[int, ...], ...]:
    """Every ascending group of three to five digits with the sum ``label``."""
    return tuple(
        group
        for count in _DIGIT_COUNTS
        for group in combinations_with_replacement(range(10), count)
        if sum(group) == label
    )


def _place_faithfully(values: tuple[int, ...], draws: Draws, size: int) -> tuple[PlacedDigit, ...]:
    while True:
        places: list[Place] = []
        for _ in range(FAITHFUL_TRIES):
            place = draw_place(draw_factor(draws), draws, size)
            if not overlaps(place, places):
                places.append(place)
            if len(places) == len(values):
                return _show(values, places)


def _place_balanced(values: tuple[int, ...], draws: Draws, size: int) -> tuple[PlacedDigit, ...]:
    num_places = max(_DIGIT_COUNTS)
    places: list[Place] = []
    while len(places) < num_places:
        # Largest first, so that fewer sizes are discarded and their distribution stays closer to the weights.
        factors = sorted((draw_factor(draws) for _ in range(num_places)), reverse=True)
        places = _find_places(factors, draws, size)
    # Places are sorted by size, so without this the first digits would get the largest.
    return _show(draws.shuffled(values), draws.shuffled(places))


def _find_places(factors: list[int], draws: Draws, size: int) -> list[Place]:
    """A free place for each of ``factors``, in this order, up to the first without one."""
    places: list[Place] = []
    for factor in factors:
        tries = (draw_place(factor, draws, size) for _ in range(_BALANCED_TRIES))
        found = next((place for place in tries if not overlaps(place, places)), None)
        if found is None:
            break
        places.append(found)
    return places


def _show(values: Sequence[int], places: Sequence[Place]) -> tuple[PlacedDigit, ...]:
    """Put the digits at the first places."""
    return tuple(_place_digit(value, place) for value, place in zip(values, places, strict=False))


def _place_digit(value: int, place: Place) -> PlacedDigit:
    factor, side, row, col = place
    return PlacedDigit(value, side, factor, Region(Interval(row, row + side), Interval(col, col + side)))


def draw_factor(draws: Draws) -> int:
    """The enlargement of a digit, 1 to 75, or 0 for the half."""
    factor = 1 + draws.weighted(_FACTOR_WEIGHTS)
    return _HALF if factor == 1 and draws.below(2) == 0 else factor


def draw_place(factor: int, draws: Draws, size: int) -> Place:
    """A place for a digit enlarged by ``factor`` on a canvas of ``size`` pixels, uniformly distributed."""
    side = proportional(_HALF_SIDE if factor == _HALF else GLYPH_SIDE * factor, size)
    return Place(factor, side, draws.below(size - side + 1), draws.below(size - side + 1))


def _draw_single(draws: Draws, size: int) -> Place:
    """A place for the only digit."""
    sides = range(_HALF_SIDE, size // 2 + 1)
    side = sides[draws.weighted(_inverse(sides))]
    return Place(side // GLYPH_SIDE, side, draws.below(size - side + 1), draws.below(size - side + 1))


@cache
def _inverse(sides: range) -> tuple[int, ...]:
    """Weights that give sides a uniform logarithm."""
    return tuple(_WHOLE // side for side in sides)


def overlaps(place: Place, others: Sequence[Place]) -> bool:
    """Whether the box of ``place`` shares a pixel with another; boxes that only touch do not.

    The released code also accepts two boxes that share a single row or column of pixels.
    """
    _, side, row, col = place
    return any(
        row < other.row + other.side
        and other.row < row + side
        and col < other.col + other.side
        and other.col < col + side
        for other in others
    )
