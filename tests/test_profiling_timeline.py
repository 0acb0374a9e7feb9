"""Memory over time: what is told of a pass, what is recorded, and what is kept of it."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import MIB, PROFILES, TIMELINE
from torch import nn

from streamcnn import StreamingModel
from streamcnn.execution.executor import PassEvent
from streamcnn.profiling import recorder as recording
from streamcnn.profiling.recorder import Recorder
from streamcnn.profiling.timeline import BETWEEN, GLOBAL_VALUES, TAIL, Sample, Span, Timeline, thin
from streamcnn.profiling.timeline_chart import areas, directions, draw_timeline, highest, limits, phase_color


def begin(level: int, direction: str = "forward", part: str = "phase") -> PassEvent:
    return PassEvent(part, level, direction, begins=True)


def end(level: int, direction: str = "forward", part: str = "phase") -> PassEvent:
    return PassEvent(part, level, direction, begins=False)


def readings(*values: tuple[int, int]) -> Callable[[], tuple[int, int]]:
    """Resident bytes and high-water marks, one pair per reading."""
    left: Iterator[tuple[int, int]] = iter(values)
    return lambda: next(left)


def peaks(timeline: Timeline | None) -> list[int]:
    """The most bytes of every span that has a sample."""
    assert timeline is not None
    return [
        max(nbytes for nbytes, of in zip(timeline.nbytes, timeline.running, strict=True) if of == index)
        for index in sorted(set(timeline.running))
    ]


def small_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.AdaptiveAvgPool2d(1),
    )


# --- what a pass tells -------------------------------------------------------------------------------


def test_every_phase_and_segment_is_told_of_in_order() -> None:
    told: list[PassEvent] = []
    model = StreamingModel(small_net().train(), tile=16)
    model.observer = told.append
    model(torch.rand(1, 2, 40, 33)).sum().backward()
    assert all(
        (a.begins, b.begins) == (True, False)
        and (a.part, a.level, a.direction) == (b.part, b.level, b.direction)
        for a, b in zip(told[::2], told[1::2], strict=True)
    )
    plan = model.plan((1, 2, 40, 33))
    begun = [(event.direction, event.level) for event in told if event.begins and event.part == "phase"]
    levels = [phase.level for phase in plan.phases]
    assert len(levels) > 1
    assert begun == [*(("forward", n) for n in levels), *(("backward", n) for n in reversed(levels))]
    segments = {event.level for event in told if event.part == "segment" and event.direction == "forward"}
    assert segments == {segment.level for segment in plan.segments}


def test_the_end_of_a_phase_that_fails_is_told_too() -> None:
    calls = []

    def fail(tile: torch.Tensor) -> torch.Tensor:
        calls.append(tile)
        if len(calls) > 3:
            raise RuntimeError("a fault of the preprocessing")
        return tile

    told: list[PassEvent] = []
    model = StreamingModel(small_net().train(), tile=16, preprocess=fail)
    model.observer = told.append
    with pytest.raises(RuntimeError, match="a fault of the preprocessing"):
        model(torch.rand(1, 2, 40, 33))
    assert told[-2:] == [begin(1), end(1)]


def test_a_copy_of_a_model_has_no_observer() -> None:
    model = StreamingModel(small_net())
    model.observer = print
    assert copy.deepcopy(model).observer is None
    assert model.observer is print


# --- what is recorded --------------------------------------------------------------------------------


def test_a_peak_between_readings_belongs_to_what_ran() -> None:
    recorder = Recorder(None, readings((100, 100), (110, 500), (110, 500), (130, 500), (130, 500), (90, 500)))
    for event in (begin(1), end(1), begin(2), end(2), begin(3), end(3)):
        recorder.observe(event)
    assert peaks(recorder.timeline(100)) == [400, 30, 30]


def test_a_mark_that_was_reset_is_no_peak_and_one_that_rose_again_is() -> None:
    recorder = Recorder(None, readings((100, 500), (100, 500), (120, 120), (110, 300)))
    for event in (begin(1), end(1), begin(1, "backward"), end(1, "backward")):
        recorder.observe(event)
    assert peaks(recorder.timeline(0)) == [100, 300]


def test_parts_have_their_names_and_do_not_overlap() -> None:
    recorder = Recorder(2, lambda: (7, 7))
    for event in (begin(1), end(1), begin(1, part="segment"), end(1, part="segment")):
        recorder.observe(event)
    for event in (begin(2, part="segment"), end(2, part="segment"), begin(2, "backward", "segment")):
        recorder.observe(event)
    recorder.observe(end(2, "backward", "segment"))
    timeline = recorder.timeline(0)
    assert timeline is not None
    parts = [(span.part, span.direction) for span in timeline.spans]
    assert parts[:2] == [("phase", "forward"), (GLOBAL_VALUES, "forward")]
    assert parts[2:] == [(TAIL, "forward"), (TAIL, "backward")]
    assert all(one.start <= one.stop <= other.start for one, other in pairwise(timeline.spans))


def test_the_thread_samples_within_a_part_and_between_the_directions() -> None:
    def wait_for(count: int) -> None:
        until = time.monotonic() + 20
        while recorder.timeline(0) is None or len(recorder._samples) < count:
            assert time.monotonic() < until
            time.sleep(0.002)

    with Recorder(None, lambda: (7, 7)) as recorder:
        recorder.observe(begin(1))
        wait_for(3)
        recorder.observe(end(1))
        wait_for(len(recorder._samples) + 2)
        recorder.observe(begin(1, "backward"))
        recorder.observe(end(1, "backward"))
    timeline = recorder.timeline(0)
    assert timeline is not None
    assert [span.part for span in timeline.spans] == ["phase", BETWEEN, "phase"]
    first, between, last = timeline.spans
    assert first.stop == between.start < between.stop <= last.start
    assert not [thread for thread in threading.enumerate() if thread.name == "memory-sampler"]


def test_few_samples_are_held_and_every_peak_is_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MOST_HELD", 40)
    values = [(level, 1000 + level) for level in range(1, 21) for _ in range(2)]
    recorder = Recorder(None, readings(*values))
    for level in range(1, 21):
        recorder.observe(begin(level))
        recorder.observe(end(level))
    assert len(recorder._samples) <= 40
    assert peaks(recorder.timeline(0)) == [1, *(1000 + level for level in range(2, 21))]


def test_without_readings_there_is_no_timeline() -> None:
    recorder = Recorder(None, lambda: None)
    recorder.observe(begin(1))
    recorder.observe(end(1))
    assert recorder.timeline(0) is None


@given(
    st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1), st.integers(0, 99)), min_size=1, max_size=60),
    st.floats(0.1, 10),
)
def test_thinning_keeps_the_peak_of_every_span(steps: list[tuple[int, float, int]], width: float) -> None:
    samples, span, moment = [], 0, 0.0
    for next_span, later, nbytes in steps:
        span, moment = span + next_span, moment + later
        samples.append(Sample(span, moment, nbytes))
    kept = thin(samples, width)
    for index in {sample.span for sample in samples}:
        peak = max(sample.nbytes for sample in samples if sample.span == index)
        assert max(sample.nbytes for sample in kept if sample.span == index) == peak
    left = iter(samples)
    assert all(sample in left for sample in kept)  # in the same order
    assert len(kept) <= 1 + moment / width + span
    assert thin(kept, width) == kept


# --- what is drawn -----------------------------------------------------------------------------------


def test_a_timeline_survives_its_columns() -> None:
    assert Timeline.from_columns(TIMELINE.to_columns()) == TIMELINE


def test_spans_in_words() -> None:
    labels = [span.label for span in TIMELINE.spans]
    assert labels[0] == "phase 1, forward"
    assert labels[2:5] == ["resident tail, forward", "in between", "resident tail, backward"]
    assert Span(GLOBAL_VALUES, 3, "forward", 0, 1).label == "global values after phase 3, forward"
    assert Span(GLOBAL_VALUES, 0, "backward", 0, 1).label == "global values at the start, backward"


def test_areas_cover_the_spans_and_touch_every_sample() -> None:
    drawn = areas(TIMELINE)
    assert [(edge[0][0], edge[-1][0]) for _, edge in drawn] == [(s.start, s.stop) for s in TIMELINE.spans]
    inner = [point for _, edge in drawn for point in edge[1:-1]]
    assert inner == list(zip(TIMELINE.seconds, TIMELINE.nbytes, strict=True))


def test_directions_differ_in_colour_and_phases_in_depth() -> None:
    colors = [color for color, _ in areas(TIMELINE)]
    assert colors[2] == colors[4] != colors[3]  # the tail in both directions, and what is in between
    assert len({*colors[:3], *colors[3:]}) == 6
    assert phase_color("forward", 1.0) == "#1d4ebe"
    assert directions(TIMELINE) == [("forward", 0.0, 2.0), ("backward", 2.25, 5.0)]


def test_charts_of_all_tile_sizes_have_one_height_and_show_the_limits() -> None:
    top = highest(PROFILES)
    assert top == int(1.12 * 100 * MIB)
    assert limits(PROFILES[0]) == [
        ("projected", "projected 50.0 MiB", 50 * MIB),
        ("budget", "budget 100 MiB", 100 * MIB),
    ]
    drawn = draw_timeline(PROFILES[1], TIMELINE, top)
    assert "peak 80.0 MiB in phase 2, backward" in drawn
    assert "budget 100 MiB</text>" in drawn
    assert "budget 100 MiB ↑ off the scale</text>" in draw_timeline(PROFILES[1], TIMELINE, 95 * MIB)
