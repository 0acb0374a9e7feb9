"""Charts against tile size as inline SVG: peak memory, and time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from streamcnn.profiling.scales import bytes_ticks, seconds_ticks, upper_edge
from streamcnn.profiling.tile_profile import TileProfile
from streamcnn.support.units import format_bytes, format_duration

_MEMORY_WIDTH, _TIME_WIDTH, _HEIGHT = 540, 370, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 14, 30, 48


@dataclass(frozen=True, slots=True)
class Scale:
    """From tile sizes (pixels) and values to SVG coordinates."""

    tiles: tuple[int, ...]
    """Ascending; the first and last are the ends of the axis, which is logarithmic."""
    top: float
    """The value at the upper edge: bytes or seconds."""
    width: int = _MEMORY_WIDTH
    """Width of the chart with its margins."""

    def x(self, tile: int) -> float:
        """The x-coordinate of a tile size; a single one is in the middle."""
        low, high = math.log2(self.tiles[0]), math.log2(self.tiles[-1])
        share = (math.log2(tile) - low) / (high - low) if high > low else 0.5
        margin = 34
        return _LEFT + margin + share * (self.width - _LEFT - _RIGHT - 2 * margin)

    def y(self, value: float) -> float:
        """The y-coordinate of a value; one beyond the top is at the top."""
        share = min(value / self.top, 1.0)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def draw_memory_chart(profiles: Sequence[TileProfile]) -> str:
    """Peak memory as an ``<svg>`` element; every tile size is a group with the attribute ``data-tile``."""
    ordered = sorted(profiles, key=lambda profile: profile.tile)
    scale = Scale(tuple(sorted({profile.tile for profile in profiles})), upper_edge(profiles))
    projected = [(p.tile, p.projected_bytes) for p in ordered]
    measured = [(p.tile, p.measured_bytes) for p in ordered if p.measured_bytes is not None]
    top = int(scale.top)
    ticks = [(float(nbytes), label) for nbytes, label in bytes_ticks(top)]
    parts = [
        *_axes(scale, ticks),
        _polyline("projected", projected, scale),
        _polyline("measured", measured, scale),
        *_limits(ordered, scale),
        *(_point(profile, scale, _memory_marks(profile, scale), _label(profile)) for profile in ordered),
    ]
    return _svg("Peak memory against tile size", scale, parts)


def draw_time_chart(profiles: Sequence[TileProfile]) -> str:
    """Seconds of one update as an ``<svg>`` element; every tile size is a group with ``data-tile``."""
    ordered = sorted(profiles, key=lambda profile: profile.tile)
    ran = [(p.tile, p.seconds) for p in ordered if p.seconds is not None]
    top = 1.18 * max((seconds for _, seconds in ran), default=1.0)
    scale = Scale(tuple(sorted({profile.tile for profile in profiles})), top, _TIME_WIDTH)
    ticks = [(value, f"{value:g} s" if value else "0") for value in seconds_ticks(top, 5)]
    parts = [*_axes(scale, ticks), _polyline("measured", ran, scale)]
    for profile in ordered:
        took = "not run" if profile.seconds is None else format_duration(profile.seconds)
        parts.append(
            _point(profile, scale, _time_marks(profile, scale, took), f"tile {profile.tile}: {took}")
        )
    return _svg("Time of one update against tile size", scale, parts)


def _svg(label: str, scale: Scale, parts: Sequence[str]) -> str:
    inside = "\n".join(parts)
    return f'<svg viewBox="0 0 {scale.width} {_HEIGHT}" role="group" aria-label="{label}">\n{inside}\n</svg>'


def _axes(scale: Scale, ticks: Sequence[tuple[float, str]]) -> list[str]:
    right, bottom = scale.width - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for value, label in ticks:
        y = scale.y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for tile in scale.tiles:
        x = scale.x(tile)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tile}</text>')
    parts.append(
        f'<text class="axis" x="{(_LEFT + right) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">'
        "largest edge of a tile, pixels</text>"
    )
    return parts


def _limits(profiles: Sequence[TileProfile], scale: Scale) -> list[str]:
    budget, plain = profiles[0].budget, max(profile.plain_bytes for profile in profiles)
    parts = []
    if budget is not None:
        parts.append(_limit("budget", budget, f"budget {format_bytes(budget)}", scale, at_left=False))
    clipped = plain > scale.top
    text = f"plain PyTorch, projected {format_bytes(plain)}{' ↑ off the scale' if clipped else ''}"
    parts.append(_limit("plain", plain, text, scale, at_left=True))
    return parts


def _limit(name: str, nbytes: int, text: str, scale: Scale, *, at_left: bool) -> str:
    right, y = scale.width - _RIGHT, scale.y(nbytes)
    x, anchor = (_LEFT + 4, "start") if at_left else (right - 4, "end")
    return (
        f'<line class="limit {name}" x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>'
        f'<text class="limit-label {name}" x="{x}" y="{y - 6:.1f}" text-anchor="{anchor}">{text}</text>'
    )


def _polyline(name: str, values: Sequence[tuple[int, float]], scale: Scale) -> str:
    points = " ".join(f"{scale.x(tile):.1f},{scale.y(value):.1f}" for tile, value in values)
    return f'<polyline class="line {name}" points="{points}"/>'


def _point(profile: TileProfile, scale: Scale, marks: str, label: str) -> str:
    """One tile size: its marks, and a wide invisible target for the pointer."""
    x, bottom = scale.x(profile.tile), _HEIGHT - _BOTTOM
    refused = "" if profile.refusal is None else " refused"
    return (
        f'<g class="point{refused}" data-tile="{profile.tile}" tabindex="0" role="button" '
        f'aria-label="{label}">'
        f'<line class="guide" x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{bottom}"/>'
        f'<rect class="target" x="{x - 26:.1f}" y="{_TOP}" width="52" height="{bottom - _TOP + 26}"/>'
        f"{marks}</g>"
    )


def _memory_marks(profile: TileProfile, scale: Scale) -> str:
    x = scale.x(profile.tile)
    marks = _mark("projected", x, profile.projected_bytes, scale)
    if profile.measured_bytes is not None:
        marks += _mark("measured", x, profile.measured_bytes, scale)
    return marks


def _time_marks(profile: TileProfile, scale: Scale, took: str) -> str:
    """A dot with its value; a note on the axis for a tile size that did not run."""
    x = scale.x(profile.tile)
    y = scale.y(profile.seconds or 0.0)
    text = f'<text class="value" x="{x:.1f}" y="{y - 12:.1f}" text-anchor="middle">{took}</text>'
    return (
        text
        if profile.seconds is None
        else f'<circle class="mark measured" cx="{x:.1f}" cy="{y:.1f}" r="6"/>{text}'
    )


def _label(profile: TileProfile) -> str:
    """The text of a tile size for a screen reader."""
    measured = "not measured"
    if profile.measured_bytes is not None:
        measured = f"measured {format_bytes(profile.measured_bytes)}"
    return f"tile {profile.tile}: {measured}, projected {format_bytes(profile.projected_bytes)}"


def _mark(name: str, x: float, nbytes: int, scale: Scale) -> str:
    """A dot; for a value beyond the top, an arrow head there with the number."""
    y = scale.y(nbytes)
    if nbytes > scale.top:
        return (
            f'<path class="mark {name}" d="M{x:.1f} {y - 8:.1f} l7 12 h-14 z"/>'
            f'<text class="beyond" x="{x - 12:.1f}" y="{y - 8:.1f}" text-anchor="end">'
            f"{format_bytes(nbytes)}</text>"
        )
    return f'<circle class="mark {name}" cx="{x:.1f}" cy="{y:.1f}" r="6"/>'
