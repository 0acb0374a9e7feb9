"""What has been written of a map, compared with one height for every column."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from streamcnn.geometry.regions import Interval, Region
from streamcnn.stores.frontier import Frontier

SIZE = (9, 11)


@st.composite
def regions(draw: st.DrawFn) -> Region:
    """Any region of a map of ``SIZE``, empty ones among them."""
    return Region(*(Interval(*sorted(draw(st.integers(0, n)) for _ in range(2))) for n in SIZE))


def positions(parts: Iterable[Region]) -> list[tuple[int, int]]:
    """All positions of some parts, in order; those of several of them as often."""
    return sorted(
        place
        for rows, cols in parts
        for place in itertools.product(range(rows.start, rows.stop), range(cols.start, cols.stop))
    )


@settings(max_examples=300)
@given(st.lists(st.tuples(regions(), st.booleans()), max_size=12))
def test_parts_and_what_is_skipped_are_those_of_one_height_per_column(
    calls: list[tuple[Region, bool]],
) -> None:
    frontier, heights = Frontier(SIZE), [0] * SIZE[1]
    for region, claims in calls:
        inside = positions([region])
        written = [(row, col) for row, col in inside if row < heights[col]]
        above = [Region(Interval(0, region.rows.start), region.cols)]
        skipped = [(row, col) for row, col in positions(above) if row >= heights[col]]
        if claims:
            zeroed: list[Region] = []
            parts = frontier.claim(region, zeroed.append)
        else:
            zeroed, parts = list(frontier.skipped(region)), list(frontier.split(region))
            frontier.mark(region)
        for col in range(region.cols.start, region.cols.stop):
            heights[col] = max(heights[col], region.rows.stop)
        assert positions(part for part, holds in parts if holds) == written
        assert positions(part for part, _ in parts) == inside
        assert positions(zeroed) == skipped
        # As few parts as there are: two for each run of columns of equal height.
        num_runs = 1 + sum(a != b for a, b in itertools.pairwise(heights))
        assert len(list(frontier.split(Region.whole(SIZE)))) <= 2 * num_runs


def test_a_band_of_full_rows_is_one_part() -> None:
    frontier = Frontier((1000, 50_000))
    for top in range(0, 1000, 100):
        band = Region(Interval(top, top + 100), Interval(0, 50_000))
        assert frontier.claim(band) == [(band, False)]
    assert frontier.claim(band) == [(band, True)]
