"""Layouts: what is drawn is exact and repeatable, and both recipes have the sizes they promise."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamcnn.data.ultramnist import Layout, Recipe, Spec, label_of, layout, make_layout
from streamcnn.data.ultramnist.draws import Draws
from streamcnn.data.ultramnist.layout import proportional
from streamcnn.geometry.regions import Region

NUM_LAYOUTS = 4_200
NUM_SIMULATED = 3_000
FACTOR_WEIGHTS = [*range(38, 0, -1), *range(1, 38)]
WORD = 2**64

recipes = pytest.mark.parametrize("recipe", Recipe)
recipes_of_several = pytest.mark.parametrize("recipe", [Recipe.FAITHFUL, Recipe.BALANCED])


# Draws


def philox(counter: int, key: int) -> list[int]:
    """A block of Philox4x64-10, after the paper's text."""
    x = [counter % WORD, counter // WORD % WORD, 0, 0]
    low, high = key % WORD, key // WORD
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [second // WORD ^ x[1] ^ low, second % WORD, first // WORD ^ x[3] ^ high, first % WORD]
        low, high = (low + 0x9E3779B97F4A7C15) % WORD, (high + 0xBB67AE8584CAA73B) % WORD
    return x


def test_words_are_philox_keyed_by_name_and_key() -> None:
    digest = hashlib.sha256(b"streamcnn ultramnist 1\nlayout\nseed=3\nsplit=train").digest()
    key = int.from_bytes(digest[:16], "little")
    expected = [word for counter in range(1, 51) for word in philox(counter, key)]
    draws = Draws("layout", seed=3, split="train")
    assert [draws.below(WORD) for _ in expected] == expected


def of_words(*words: int) -> Draws:
    draws = Draws("given")
    draws._words = iter(words)
    return draws


def test_words_that_would_favour_small_integers_are_drawn_anew() -> None:
    assert WORD % 10 == 6
    assert of_words(WORD - 1, WORD - 6, 25).below(10) == 5
    assert of_words(WORD - 7).below(10) == 9
    assert of_words(WORD - 1).below(WORD) == WORD - 1
    assert of_words(17).below(1) == 0


def test_integers_from_words() -> None:
    assert of_words(23).between(-5, 5) == -4
    assert [of_words(word).weighted([2, 0, 3]) for word in range(6)] == [0, 0, 2, 2, 2, 0]
    assert of_words(4).choice("abc") == "b"
    # The last of four takes place 1, of the remaining three place 2, of the remaining two place 0.
    assert of_words(5, 5, 2).shuffled("abcd") == ["d", "a", "c", "b"]


def chi_square(counts: Sequence[float], expected: Sequence[float]) -> float:
    return sum((count - mean) ** 2 / mean for count, mean in zip(counts, expected, strict=True))


def limit(freedom: int) -> float:
    """What chi-square exceeds in about one of 30,000 cases (4 sigma), by Wilson and Hilferty."""
    spread = 2 / (9 * freedom)
    return float(freedom * (1 - spread + 4 * math.sqrt(spread)) ** 3)


def test_every_order_is_equally_likely() -> None:
    draws = Draws("orders")
    orders = Counter("".join(draws.shuffled("abcd")) for _ in range(2400))
    assert len(orders) == 24
    assert chi_square(list(orders.values()), [100] * 24) < limit(23)


# Labels and digits


@pytest.mark.parametrize("split", ["train", "test"])
def test_class_counts_of_any_number_of_images_differ_by_one_at_most(split: str) -> None:
    spec = Spec(3, Recipe.FAITHFUL, 4000)
    labels = [label_of(spec, split, index) for index in range(100)]
    for num_images in range(1, 101):
        counts = Counter(labels[:num_images])
        assert max(counts.values()) - min(counts[label] for label in range(28)) <= 1
    assert len({tuple(labels[start : start + 28]) for start in (0, 28, 56)}) == 3


def test_labels_depend_on_seed_split_and_index_alone() -> None:
    def labels(seed: int, recipe: Recipe, size: int, split: str) -> tuple[int, ...]:
        spec = Spec(seed, recipe, size)
        return tuple(make_layout(spec, split, index).label for index in range(28))

    first = labels(0, Recipe.FAITHFUL, 4000, "train")
    assert first == labels(0, Recipe.BALANCED, 500, "train")
    assert first == tuple(label_of(Spec(0, Recipe.BALANCED, 64), "train", index) for index in range(28))
    others = {labels(1, Recipe.FAITHFUL, 64, "train"), labels(0, Recipe.FAITHFUL, 64, "test")}
    assert len({first} | others) == 3


def test_every_group_with_the_sum_is_equally_likely() -> None:
    groups: dict[int, set[tuple[int, ...]]] = {label: set() for label in range(28)}
    for count in (3, 4, 5):
        for values in itertools.product(range(10), repeat=count):
            if sum(values) < 28:
                groups[sum(values)].add(tuple(sorted(values)))
    for label, expected in groups.items():
        assert sorted(layout.digit_groups(label)) == sorted(expected)
    drawn = Counter(
        tuple(sorted(digit.value for digit in found.digits))
        for found in layouts(Recipe.FAITHFUL)
        if found.label == 2
    )
    assert drawn.keys() == groups[2]
    expected_count = NUM_LAYOUTS / 28 / len(groups[2])
    assert chi_square(list(drawn.values()), [expected_count] * len(drawn)) < limit(len(drawn) - 1)


# Sizes and places


@given(
    seed=st.integers(0, 2**63),
    recipe=st.sampled_from([Recipe.FAITHFUL, Recipe.BALANCED]),
    size=st.integers(64, 9000),
    split=st.sampled_from(["train", "test"]),
    index=st.integers(0, 10**9),
)
def test_boxes_lie_inside_and_apart(seed: int, recipe: Recipe, size: int, split: str, index: int) -> None:
    found = make_layout(Spec(seed, recipe, size), split, index)
    assert 3 <= len(found.digits) <= 5
    assert found.label == sum(digit.value for digit in found.digits)
    for digit in found.digits:
        assert Region.whole((size, size)).contains(digit.box)
        assert 0 <= digit.factor <= 75
        reference = 28 * digit.factor or 14
        rounded = math.floor(Fraction(reference * size, 4000) + Fraction(1, 2))
        assert digit.side == max(1, rounded)
        assert digit.box.size == (digit.side, digit.side)
    for one, other in itertools.combinations(found.digits, 2):
        common = [a.intersect(b).size for a, b in zip(one.box, other.box, strict=True)]
        assert 0 in common


def test_boxes_may_touch_but_share_no_pixel() -> None:
    left = layout.Place(1, 28, 10, 10)
    assert not layout.overlaps(layout.Place(1, 28, 10, 38), [left])
    assert not layout.overlaps(layout.Place(1, 28, 38, 10), [left])
    assert layout.overlaps(layout.Place(1, 28, 37, 37), [left])
    assert layout.overlaps(layout.Place(0, 14, 20, 20), [left])


def test_lengths_are_proportional_with_half_a_pixel_rounded_up() -> None:
    assert [proportional(length, 4000) for length in (14, 28, 2100)] == [14, 28, 2100]
    assert [proportional(28 * factor, 500) for factor in (1, 3)] == [4, 11]  # 3.5 and 10.5
    assert proportional(14, 64) == 1
    assert proportional(14, 50_000) == 175


@recipes
def test_layouts_are_the_same_everywhere(recipe: Recipe) -> None:
    expected = {
        Recipe.FAITHFUL: "2235f54015b7b5313f5fef13d1ae90788f75a45def287f706c88461bf1cfecac",
        Recipe.BALANCED: "36161ef09b2743e90859852f9b181f45a5902e3aee5fa8980d6043f0c9227f5c",
        Recipe.SINGLE: "175ff95b710f21778c03085531aa499010c6e1190d61675de4e11e306efc743c",
    }
    found = [make_layout(Spec(7, recipe, size), "test", index) for size in (4000, 777) for index in range(50)]
    text = repr(
        [
            (digit.value, digit.side, digit.factor, digit.box.rows.start, digit.box.cols.start)
            for each in found
            for digit in each.digits
        ]
    )
    assert hashlib.sha256(text.encode()).hexdigest() == expected[recipe]


def test_every_position_in_the_canvas_is_equally_likely() -> None:
    draws = Draws("positions")
    places = [layout.draw_place(75, draws, 64) for _ in range(6200)]
    assert {place.side for place in places} == {34}
    for starts in ([place.row for place in places], [place.col for place in places]):
        counts = Counter(starts)
        assert chi_square([counts[start] for start in range(31)], [200] * 31) < limit(30)
        assert counts.total() == sum(counts[start] for start in range(31))


def test_balanced_places_are_five_and_all_drawn_anew_if_they_do_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = Spec(0, Recipe.BALANCED, 4000)
    index = next(index for index in range(100) if len(make_layout(spec, "train", index).digits) == 3)
    factors = iter([1, 72, 1, 72, 1, 2, 3, 4, 5, 6])  # two of 2016 pixels are too many
    monkeypatch.setattr(layout, "draw_factor", lambda draws: next(factors))
    found = make_layout(spec, "train", index)
    assert {digit.factor for digit in found.digits} < {2, 3, 4, 5, 6}
    assert next(factors, None) is None


def test_faithful_digits_that_leave_no_room_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def place(factor: int, draws: Draws, size: int) -> layout.Place:
        number = next(numbers)
        if number < layout.FAITHFUL_TRIES:
            return layout.Place(factor, size, 0, 0)
        return layout.Place(factor, 1, number - layout.FAITHFUL_TRIES, 0)

    numbers = itertools.count()
    monkeypatch.setattr(layout, "draw_place", place)
    found = make_layout(Spec(0, Recipe.FAITHFUL, 64), "train", 0)
    assert [digit.box.rows.start for digit in found.digits] == list(range(len(found.digits)))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Spec(-1, Recipe.FAITHFUL, 64), "seed -1 is negative: allowed are 0 and more"),
        (
            lambda: Spec(0, "faithful", 64),
            r"unknown recipe 'faithful': allowed are Recipe\.FAITHFUL, Recipe\.BAL",
        ),
        (
            lambda: Spec(0, Recipe.FAITHFUL, 63),
            "image size 63 is too small for five digits: allowed are 64 and",
        ),
        (
            lambda: make_layout(Spec(0, Recipe.FAITHFUL, 64), "val", 0),
            "unknown split 'val': allowed are 'train' and 'test'",
        ),
        (
            lambda: label_of(Spec(0, Recipe.FAITHFUL, 64), "train", -1),
            "image index -1 is negative: allowed are 0 and more",
        ),
    ],
)
def test_what_is_not_allowed_is_named(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


# Distributions


@functools.cache
def layouts(recipe: Recipe) -> list[Layout]:
    spec = Spec(0, recipe, 4000)
    return [make_layout(spec, "train", index) for index in range(NUM_LAYOUTS)]


Simulated = list[list[tuple[int, int]]]
"""Value and side of the digits of some images."""


@functools.cache
def simulate(recipe: Recipe, num_images: int) -> Simulated:
    """Layouts by a plain reading of the recipes, with another generator and other code."""
    rng = random.Random(0)
    groups: dict[int, list[tuple[int, ...]]] = {label: [] for label in range(46)}
    for count in (3, 4, 5):
        for group in itertools.combinations_with_replacement(range(10), count):
            groups[sum(group)].append(group)

    def draw_side() -> int:
        factor = rng.choices(range(1, 76), FACTOR_WEIGHTS)[0]
        return 14 if factor == 1 and rng.random() < 0.5 else 28 * factor

    def place(side: int, placed: list[tuple[int, int, int]]) -> bool:
        x, y = (int(rng.random() * (4001 - side)) for _ in range(2))
        free = all(
            x + side <= left or left + width <= x or y + side <= top or top + width <= y
            for left, top, width in placed
        )
        if free:
            placed.append((x, y, side))
        return free

    def faithful(count: int) -> list[int]:
        placed: list[tuple[int, int, int]] = []
        while len(placed) < count:
            place(draw_side(), placed)
        return [side for _, _, side in placed]

    def balanced(count: int) -> list[int]:
        while True:
            placed: list[tuple[int, int, int]] = []
            sides = sorted((draw_side() for _ in range(5)), reverse=True)
            if all(any(place(side, placed) for _ in range(100)) for side in sides):
                return rng.sample(sides, count)

    draw_sides = faithful if recipe is Recipe.FAITHFUL else balanced
    chosen = [rng.choice(groups[index % 28]) for index in range(num_images)]
    return [list(zip(group, draw_sides(len(group)), strict=True)) for group in chosen]


def as_simulated(found: list[Layout]) -> Simulated:
    return [[(digit.value, digit.side) for digit in each.digits] for each in found]


def share(images: Simulated, holds: Callable[[list[tuple[int, int]]], bool]) -> float:
    return sum(map(holds, images)) / len(images)


def smallest(image: list[tuple[int, int]]) -> int:
    return min(side for _, side in image)


def sigma(probability: float, num_images: int) -> float:
    return math.sqrt(probability * (1 - probability) / num_images)


@pytest.mark.parametrize(
    ("holds", "percent", "rounding"),
    [
        (lambda image: len(image) == 3, 15.8, 0.05),
        (lambda image: len(image) == 4, 30.1, 0.05),
        (lambda image: len(image) == 5, 54.1, 0.05),
        (lambda image: smallest(image) <= 14, 9.9, 0.05),
        (lambda image: smallest(image) <= 28, 19, 0.5),
        (lambda image: smallest(image) <= 56, 33, 0.5),
    ],
)
def test_faithful_shares_are_those_of_the_released_code(
    holds: Callable[[list[tuple[int, int]]], bool], percent: float, rounding: float
) -> None:
    """Against figures from a run of the released recipe elsewhere, which were rounded."""
    found = share(as_simulated(layouts(Recipe.FAITHFUL)), holds)
    assert abs(found - percent / 100) < 4 * sigma(percent / 100, NUM_LAYOUTS) + rounding / 100


@recipes_of_several
@pytest.mark.parametrize("largest", [14, 28, 56, 200, 600])
def test_smallest_digits_are_those_of_a_plain_simulation(recipe: Recipe, largest: int) -> None:
    simulated = simulate(recipe, NUM_SIMULATED)
    expected = share(simulated, lambda image: smallest(image) <= largest)
    found = share(as_simulated(layouts(recipe)), lambda image: smallest(image) <= largest)
    assert abs(found - expected) < 4 * math.hypot(
        sigma(expected, NUM_LAYOUTS), sigma(expected, NUM_SIMULATED)
    )


@recipes_of_several
def test_mean_sides_by_value_are_those_of_a_plain_simulation(recipe: Recipe) -> None:
    found, simulated = as_simulated(layouts(recipe)), simulate(recipe, NUM_SIMULATED)
    for value in range(10):
        ours, theirs = (np.array(sides_of(images, value)) for images in (found, simulated))
        error = math.hypot(ours.std() / math.sqrt(ours.size), theirs.std() / math.sqrt(theirs.size))
        assert abs(ours.mean() - theirs.mean()) < 4 * error


def sides_of(images: Simulated, value: int) -> list[int]:
    return [side for image in images for shown, side in image if shown == value]


def test_a_faithful_zero_is_twice_as_large_as_a_nine() -> None:
    found = as_simulated(layouts(Recipe.FAITHFUL))
    ratio = np.mean(sides_of(found, 0)) / np.mean(sides_of(found, 9))
    assert 1.7 < ratio < 2.3


def test_the_first_faithful_digit_is_the_smallest_and_its_size_is_as_weighted() -> None:
    first = [found.digits[0].factor for found in layouts(Recipe.FAITHFUL)]
    counts = Counter(first)
    scale = NUM_LAYOUTS / sum(FACTOR_WEIGHTS)
    expected = [weight * scale for weight in (19, 19, *FACTOR_WEIGHTS[1:])]
    # The middle of the V is too rare to be counted one by one.
    observed = [counts[factor] for factor in (0, *range(1, 76))]
    bins = [slice(i, i + 4) for i in range(0, 76, 4)]
    assert chi_square([sum(observed[each]) for each in bins], [sum(expected[each]) for each in bins]) < limit(
        len(bins) - 1
    )
    for found in layouts(Recipe.FAITHFUL):
        values = [digit.value for digit in found.digits]
        assert values == sorted(values)


def dependence(recipe: Recipe, key: Callable[[Layout, int], int]) -> tuple[float, int]:
    """Chi-square of a table of ``key`` against the side of one random digit per image, and its freedom.

    One digit per image, since those of an image depend on each other.
    """
    rng = random.Random(0)
    table: Counter[tuple[int, int]] = Counter()
    for found in layouts(recipe):
        position = rng.randrange(len(found.digits))
        side = found.digits[position].side
        table[key(found, position), sum(side > bound for bound in (56, 200, 500, 1000, 1600))] += 1
    rows, cols = sorted({row for row, _ in table}), range(6)
    counts = np.array([[table[row, col] for col in cols] for row in rows], dtype=float)
    expected = counts.sum(1, keepdims=True) * counts.sum(0) / counts.sum()
    assert expected.min() > 4
    return chi_square(counts.ravel(), expected.ravel()), (len(rows) - 1) * 5


KEYS: dict[str, Callable[[Layout, int], int]] = {
    "value": lambda found, position: found.digits[position].value,
    "number of digits": lambda found, position: len(found.digits),
    "position": lambda found, position: position,
}


@pytest.mark.parametrize("name", KEYS)
def test_balanced_sizes_tell_nothing(name: str) -> None:
    statistic, freedom = dependence(Recipe.BALANCED, KEYS[name])
    assert statistic < limit(freedom)


def test_balanced_sizes_do_not_tell_the_label() -> None:
    statistic, freedom = dependence(Recipe.BALANCED, lambda found, position: found.label)
    assert statistic < limit(freedom)


@pytest.mark.parametrize("name", KEYS)
def test_the_same_test_finds_that_faithful_sizes_tell(name: str) -> None:
    statistic, freedom = dependence(Recipe.FAITHFUL, KEYS[name])
    assert statistic > limit(freedom)


def test_balanced_values_come_in_any_order() -> None:
    ascending = share(
        as_simulated(layouts(Recipe.BALANCED)),
        lambda image: [v for v, _ in image] == sorted(v for v, _ in image),
    )
    # 3! to 5! orders, fewer where digits are equal.
    assert 1 / 120 < ascending < 1 / 4


# A single digit


def test_a_single_digit_is_its_label_at_any_canvas() -> None:
    for size in (64, 512):
        found = [make_layout(Spec(0, Recipe.SINGLE, size), "train", index) for index in range(200)]
        assert all(len(each.digits) == 1 for each in found)
        labels = [each.label for each in found]
        assert labels == [label_of(Spec(0, Recipe.SINGLE, 64), "train", index) for index in range(200)]
        assert all(sorted(labels[start : start + 10]) == list(range(10)) for start in range(0, 200, 10))
        sides = [each.digits[0].side for each in found]
        assert min(sides) >= 14
        assert max(sides) <= size // 2
        assert all(each.digits[0].factor == each.digits[0].side // 28 for each in found)
        assert all(Region.whole((size, size)).contains(each.digits[0].box) for each in found)


def test_a_single_digits_side_has_a_uniform_logarithm() -> None:
    spec = Spec(0, Recipe.SINGLE, 512)
    sides = [make_layout(spec, "test", index).digits[0].side for index in range(NUM_LAYOUTS)]
    octaves = [sum(14 * 2**k <= side < 28 * 2**k for side in sides) for k in range(4)]
    total = sum(1 / side for side in range(14, 257))
    expected = [NUM_LAYOUTS * sum(1 / side for side in range(14 * 2**k, 28 * 2**k)) / total for k in range(4)]
    rest = NUM_LAYOUTS - sum(octaves)
    assert chi_square([*octaves, rest], [*expected, NUM_LAYOUTS - sum(expected)]) < limit(4)
