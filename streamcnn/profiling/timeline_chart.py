"""Memory over the time of one update as inline SVG, coloured by the part that ran."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from streamcnn.profiling.scales import bytes_ticks, seconds_ticks, with_room
from streamcnn.profiling.tile_profile import TileProfile
from streamcnn.profiling.timeline import BETWEEN, GLOBAL_VALUES, TAIL, Span, Timeline
from streamcnn.support.units import format_bytes

_WIDTH, _HEIGHT = 1200, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 92, 14, 22, 58
_REACH = 3.0
"""A limit beyond this many times the highest peak is off the scale."""

_PALE_TO_DEEP = {
    "forward": ((190, 214, 250), (29, 78, 190)),
    "backward": ((253, 217, 170), (194, 85, 12)),
}
OTHERS = {GLOBAL_VALUES: "#7b3fb5", TAIL: "#58a782", BETWEEN: "#c9d0d9"}
"""Colours of parts other than phases."""

Areas = list[tuple[str, list[tuple[float, int]]]]
"""Areas of the chart: colour, and upper edge as points of seconds and bytes."""


def phase_color(direction: str, share: float) -> str:
    """The colour of a phase: blue forward, orange backward, deeper with its place in the network, 0 to 1."""
    pale, deep = _PALE_TO_DEEP[direction]
    mixed = (round(low + share * (high - low)) for low, high in zip(pale, deep, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def areas(timeline: Timeline) -> Areas:
    """For each span with samples, its colour and its upper edge, in seconds and bytes."""
    deepest = max(span.level for span in timeline.spans) or 1
    found: Areas = []
    for index, span in enumerate(timeline.spans):
        own = [k for k, running in enumerate(timeline.running) if running == index]
        if own:
            inner = [(timeline.seconds[k], max(0, timeline.nbytes[k])) for k in own]
            edge = [(span.start, inner[0][1]), *inner, (span.stop, inner[-1][1])]
            found.append((_color(span, deepest), edge))
    return found


def directions(timeline: Timeline) -> list[tuple[str, float, float]]:
    """The directions that ran, each with its start and stop in seconds."""
    found = []
    for name in ("forward", "backward"):
        spans = [span for span in timeline.spans if span.direction == name]
        if spans:
            found.append((name, spans[0].start, spans[-1].stop))
    return found


def limits(profile: TileProfile) -> list[tuple[str, str, int]]:
    """The limits as lines across the chart: kind, text and bytes."""
    found = [("projected", f"projected {format_bytes(profile.projected_bytes)}", profile.projected_bytes)]
    if profile.budget is not None:
        found.append(("budget", f"budget {format_bytes(profile.budget)}", profile.budget))
    return found


def highest(profiles: Sequence[TileProfile]) -> int:
    """Bytes at the upper edge of all tile sizes' charts, which is common so that they can be compared."""
    ran = [(p, p.timeline) for p in profiles if p.timeline is not None]
    most = max((timeline.nbytes[timeline.peak] for _, timeline in ran), default=1)
    return with_room(max(1, most), [nbytes for p, _ in ran for *_, nbytes in limits(p)], _REACH)


def peak_label(timeline: Timeline) -> str:
    """The peak as text."""
    peak = timeline.peak
    where = timeline.spans[timeline.running[peak]].label
    return f"peak {format_bytes(timeline.nbytes[peak])} in {where}"


def draw_timeline(profile: TileProfile, timeline: Timeline, top: int) -> str:
    """Memory over time, up to ``top`` bytes, as an ``<svg>`` element; ``data-scale`` gives its axes."""
    axes = _Axes(top, timeline.end or 1.0)
    place = {"left": _LEFT, "right": _WIDTH - _RIGHT, "top": _TOP, "bottom": _HEIGHT - _BOTTOM}
    scale = json.dumps({**place, "seconds": axes.end, "nbytes": axes.top}).replace('"', "&quot;")
    parts = [
        f'<svg class="timeline" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" data-scale="{scale}" '
        f'aria-label="Memory over time: {peak_label(timeline)}">',
        *_grid(axes),
        *(_area(color, edge, axes) for color, edge in areas(timeline)),
        *_limit_lines(profile, axes),
        *_direction_bars(timeline, axes),
        *_peak(timeline, axes),
        f'<line class="cursor" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/><circle class="cursor" r="4"/></svg>',
    ]
    return "\n".join(parts)


def timeline_data(timeline: Timeline) -> dict[str, Sequence[object]]:
    """The page's data for the pointer: time, bytes and span of each sample, and the spans' names."""
    return {
        "seconds": [round(moment, 4) for moment in timeline.seconds],
        "words": [format_bytes(max(0, nbytes)) for nbytes in timeline.nbytes],
        "nbytes": timeline.nbytes,
        "running": timeline.running,
        "labels": [span.label for span in timeline.spans],
    }


@dataclass(frozen=True, slots=True)
class _Axes:
    """From seconds and bytes to SVG coordinates."""

    top: int
    end: float

    def x(self, seconds: float) -> float:
        return _LEFT + seconds / self.end * (_WIDTH - _LEFT - _RIGHT)

    def y(self, nbytes: int) -> float:
        return _HEIGHT - _BOTTOM - min(1.0, nbytes / self.top) * (_HEIGHT - _TOP - _BOTTOM)


def _color(span: Span, deepest: int) -> str:
    return OTHERS.get(span.part) or phase_color(span.direction, span.level / deepest)


def _grid(axes: _Axes) -> Iterator[str]:
    bottom = _HEIGHT - _BOTTOM
    for nbytes, label in bytes_ticks(axes.top):
        y = axes.y(nbytes)
        yield f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>'
        yield f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    for moment in seconds_ticks(axes.end, 10):
        x = axes.x(moment)
        yield f'<text x="{x:.1f}" y="{bottom + 26}" text-anchor="middle">{moment:.6g} s</text>'


def _area(color: str, edge: Sequence[tuple[float, int]], axes: _Axes) -> str:
    upper = "".join(f"L{axes.x(moment):.1f} {axes.y(nbytes):.1f}" for moment, nbytes in edge)
    start, stop, floor = axes.x(edge[0][0]), axes.x(edge[-1][0]), axes.y(0)
    return f'<path class="area" fill="{color}" d="M{start:.1f} {floor}{upper}L{stop:.1f} {floor}z"/>'


def _limit_lines(profile: TileProfile, axes: _Axes) -> Iterator[str]:
    for name, words, nbytes in limits(profile):
        y, right = axes.y(nbytes), _WIDTH - _RIGHT
        off = " ↑ off the scale" if nbytes > axes.top else ""
        x, anchor, shift = (right - 4, "end", -5) if name == "budget" else (_LEFT + 4, "start", 14)
        yield f'<line class="limit {name}" x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>'
        yield (
            f'<text class="limit-label {name}" x="{x}" y="{y + shift:.1f}" text-anchor="{anchor}">'
            f"{words}{off}</text>"
        )


def _direction_bars(timeline: Timeline, axes: _Axes) -> Iterator[str]:
    y = _HEIGHT - _BOTTOM + 5
    for name, start, stop in directions(timeline):
        left, right = axes.x(start), axes.x(stop)
        color = phase_color(name, 0.7)
        yield f'<rect x="{left:.1f}" y="{y}" width="{right - left:.1f}" height="4" fill="{color}"/>'
        yield (
            f'<text class="direction" x="{(left + right) / 2:.1f}" y="{y + 42}" text-anchor="middle" '
            f'fill="{color}">{name}</text>'
        )


def _peak(timeline: Timeline, axes: _Axes) -> Iterator[str]:
    x, y = axes.x(timeline.seconds[timeline.peak]), axes.y(timeline.nbytes[timeline.peak])
    anchor, shift = ("end", -9) if x > _WIDTH / 2 else ("start", 9)
    yield f'<circle class="peak" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    yield (
        f'<text class="peak-label" x="{x + shift:.1f}" y="{y - 6:.1f}" text-anchor="{anchor}">'
        f"{peak_label(timeline)}</text>"
    )
