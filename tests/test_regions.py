"""Intervals and regions against sets of integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamcnn.geometry.regions import Interval, Intervals, Region


@st.composite
def intervals(draw: st.DrawFn) -> Interval:
    start = draw(st.integers(-9, 9))
    return Interval(start, start + draw(st.integers(0, 9)))


def positions(interval: Interval) -> set[int]:
    """The integers in an interval."""
    return set(range(interval.start, interval.stop))


def test_an_interval_does_not_end_before_it_starts() -> None:
    with pytest.raises(ValueError, match=r"interval \[3, 2\) ends before it starts"):
        Interval(3, 2)


@given(intervals(), intervals())
def test_intervals_are_sets(a: Interval, b: Interval) -> None:
    assert a.size == len(positions(a))
    assert positions(a.intersect(b)) == positions(a) & positions(b)
    assert a.contains(b) == (a.start <= b.start and b.stop <= a.stop)
    if b.size > 0:
        assert a.contains(b) == (positions(b) <= positions(a))


@given(intervals(), st.integers(-5, 5))
def test_shift_moves_every_position(a: Interval, offset: int) -> None:
    assert positions(a.shift(offset)) == {i + offset for i in positions(a)}


@given(intervals(), st.integers(0, 4), st.integers(0, 4))
def test_slice_cuts_an_interval_out_of_an_array(inner: Interval, before: int, after: int) -> None:
    outer = Interval(inner.start - before, inner.stop + after)
    array = list(range(outer.start, outer.stop))
    assert array[inner.slice_in(outer)] == list(range(inner.start, inner.stop))


@pytest.mark.parametrize("outer", [Interval(3, 6), Interval(2, 4)])
def test_no_slice_cuts_out_what_an_array_does_not_cover(outer: Interval) -> None:
    with pytest.raises(AssertionError, match="is not inside"):
        Interval(2, 5).slice_in(outer)


@given(intervals(), intervals(), intervals(), intervals())
def test_regions_are_products(a: Interval, b: Interval, c: Interval, d: Interval) -> None:
    first, second = Region(a, b), Region(c, d)
    assert first.size == (a.size, b.size)
    assert first.contains(second) == (a.contains(c) and b.contains(d))


def test_a_whole_region_starts_at_zero() -> None:
    assert Region.whole((5, 7)) == Region(Interval(0, 5), Interval(0, 7))


@given(st.integers(1, 60), st.data())
def test_even_parts_cover_every_position_once(size: int, data: st.DataObject) -> None:
    num_parts = data.draw(st.integers(1, size))
    parts = list(Intervals.evenly(size, num_parts))
    assert len(parts) == num_parts
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(size))
    assert max(p.size for p in parts) - min(p.size for p in parts) <= 1


@pytest.mark.parametrize("num_parts", [0, -1, 6])
def test_every_part_holds_a_position(num_parts: int) -> None:
    with pytest.raises(
        ValueError, match=f"cannot cut 5 positions into {num_parts} parts: allowed are 1 to 5"
    ):
        Intervals.evenly(5, num_parts)


@given(st.lists(st.tuples(intervals(), intervals()), min_size=1))
def test_many_intervals_are_each_as_one(pairs: list[tuple[Interval, Interval]]) -> None:
    first, second = (
        Intervals(np.array([i.start for i in side]), np.array([i.stop for i in side]))
        for side in zip(*pairs, strict=True)
    )
    assert list(first) == [a for a, _ in pairs]
    assert first.sizes.tolist() == [a.size for a, _ in pairs]
    for hull, (a, b) in zip(first.hull(second), pairs, strict=True):
        assert hull.contains(a)
        assert hull.contains(b)
        assert {hull.start, hull.stop} <= {a.start, a.stop, b.start, b.stop}
    assert first.equals(second) == all(a == b for a, b in pairs)
