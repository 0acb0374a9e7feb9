"""The chart of a profile's page: peak memory against tile size as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from streamcnn.profiling.tile_profile import TileProfile
from streamcnn.units import format_bytes

_WIDTH, _HEIGHT = 720, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 24, 30, 48
_REACH = 1.6
"""A value beyond so many times what matters is clipped to the top of the chart."""


@dataclass(frozen=True, slots=True)
class Scale:
    """From tile sizes (pixels) and bytes to SVG coordinates."""

    tiles: tuple[int, ...]
    """Ascending; the first and last are the ends of the axis, which is logarithmic."""
    top: int
    """Bytes at the upper edge."""

    def x(self, tile: int) -> float:
        """Where a tile size is; a single one is in the middle."""
        low, high = math.log2(self.tiles[0]), math.log2(self.tiles[-1])
        share = (math.log2(tile) - low) / (high - low) if high > low else 0.5
        margin = 50
        return _LEFT + margin + share * (_WIDTH - _LEFT - _RIGHT - 2 * margin)

    def y(self, nbytes: int) -> float:
        """Where a number of bytes is; what is beyond the top is on it."""
        share = min(nbytes / self.top, 1.0)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def draw_chart(profiles: Sequence[TileProfile]) -> str:
    """The chart as an ``<svg>`` element; every tile size is a group with the attribute ``data-tile``."""
    scale = Scale(tuple(sorted({profile.tile for profile in profiles})), upper_edge(profiles))
    ordered = sorted(profiles, key=lambda profile: profile.tile)
    projected = [(p.tile, p.projected_bytes) for p in ordered]
    measured = [(p.tile, p.measured_bytes) for p in ordered if p.measured_bytes is not None]
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="group" aria-label="Peak memory against tile size">',
        *_axes(scale),
        *_limits(ordered, scale),
        _polyline("projected", projected, scale),
        _polyline("measured", measured, scale),
        *(_point(profile, scale) for profile in ordered),
        "</svg>",
    ]
    return "\n".join(parts)


def upper_edge(profiles: Sequence[TileProfile]) -> int:
    """Bytes at the upper edge of a chart: room for the budget, what ran and what is little above."""
    matters = [p.measured_bytes or 0 for p in profiles] + [profiles[0].budget or 0]
    matters += [p.projected_bytes for p in profiles if p.refusal is None]
    reach = _REACH * (max(matters) or max(p.projected_bytes for p in profiles))
    others = [value for p in profiles for value in (p.projected_bytes, p.plain_bytes)]
    shown = [value for value in [*matters, *others] if value <= reach]
    return max(1, int(1.12 * max(shown)))


def _axes(scale: Scale) -> list[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    step = round_step(scale.top)
    for nbytes in range(0, scale.top + 1, step):
        y = scale.y(nbytes)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        label = "0" if nbytes == 0 else format_bytes(nbytes)
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for tile in scale.tiles:
        x = scale.x(tile)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tile}</text>')
    middle = (_LEFT + right) / 2
    parts.append(
        f'<text class="axis" x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">'
        "largest edge of a tile, pixels</text>"
    )
    return parts


def round_step(top: int) -> int:
    """A power of two of bytes, or three quarters of one, that cuts the axis into 3 to 6."""
    step = 1 << max(0, (top // 3).bit_length() - 1)
    return step if top // step <= 5 else step * 3 // 2


def _limits(profiles: Sequence[TileProfile], scale: Scale) -> list[str]:
    budget, plain = profiles[0].budget, max(profile.plain_bytes for profile in profiles)
    parts = []
    if budget is not None:
        parts.append(_limit("budget", budget, f"budget {format_bytes(budget)}", scale, at_left=False))
    clipped = plain > scale.top
    text = (
        f"plain PyTorch {'↑ ' if clipped else ''}{format_bytes(plain)}{', off the scale' if clipped else ''}"
    )
    parts.append(_limit("plain", plain, text, scale, at_left=True))
    return parts


def _limit(name: str, nbytes: int, text: str, scale: Scale, *, at_left: bool) -> str:
    right, y = _WIDTH - _RIGHT, scale.y(nbytes)
    x, anchor = (_LEFT + 4, "start") if at_left else (right - 4, "end")
    return (
        f'<line class="limit {name}" x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>'
        f'<text class="limit-label {name}" x="{x}" y="{y - 6:.1f}" text-anchor="{anchor}">{text}</text>'
    )


def _polyline(name: str, values: Sequence[tuple[int, int]], scale: Scale) -> str:
    points = " ".join(f"{scale.x(tile):.1f},{scale.y(nbytes):.1f}" for tile, nbytes in values)
    return f'<polyline class="line {name}" points="{points}"/>'


def _point(profile: TileProfile, scale: Scale) -> str:
    """One tile size: its marks, and a wide invisible target for the pointer."""
    x, bottom = scale.x(profile.tile), _HEIGHT - _BOTTOM
    marks = [_mark("projected", x, profile.projected_bytes, scale)]
    if profile.measured_bytes is not None:
        marks.append(_mark("measured", x, profile.measured_bytes, scale))
    refused = "" if profile.refusal is None else " refused"
    return (
        f'<g class="point{refused}" data-tile="{profile.tile}" tabindex="0" role="button" '
        f'aria-label="{_label(profile)}">'
        f'<line class="guide" x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{bottom}"/>'
        f'<rect class="target" x="{x - 30:.1f}" y="{_TOP}" width="60" height="{bottom - _TOP + 26}"/>'
        f"{''.join(marks)}</g>"
    )


def _label(profile: TileProfile) -> str:
    """What a screen reader says of a tile size."""
    measured = "not measured"
    if profile.measured_bytes is not None:
        measured = f"measured {format_bytes(profile.measured_bytes)}"
    return f"tile {profile.tile}: {measured}, projected {format_bytes(profile.projected_bytes)}"


def _mark(name: str, x: float, nbytes: int, scale: Scale) -> str:
    """A dot; an arrow head with the number at the top for what is beyond it."""
    y = scale.y(nbytes)
    if nbytes > scale.top:
        return (
            f'<path class="mark {name}" d="M{x:.1f} {y - 8:.1f} l7 12 h-14 z"/>'
            f'<text class="beyond" x="{x - 12:.1f}" y="{y - 8:.1f}" text-anchor="end">'
            f"{format_bytes(nbytes)}</text>"
        )
    return f'<circle class="mark {name}" cx="{x:.1f}" cy="{y:.1f}" r="6"/>'
