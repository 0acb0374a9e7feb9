"""The range of an axis, and its ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from streamcnn.profiling.tile_profile import TileProfile
from streamcnn.support.units import format_bytes

_REACH = 2.5
"""Values beyond this many times the relevant ones are clipped to the top of the chart."""
_ROOM = 1.12


def upper_edge(profiles: Sequence[TileProfile]) -> int:
    """Bytes at the upper edge of a chart, with room for the budget, the updates that ran, and others near."""
    matters = [p.measured_bytes or 0 for p in profiles] + [profiles[0].budget or 0]
    matters += [p.projected_bytes for p in profiles if p.refusal is None]
    most = max(matters) or max(p.projected_bytes for p in profiles)
    return with_room(most, [value for p in profiles for value in (p.projected_bytes, p.plain_bytes)])


def with_room(matters: int, others: Sequence[int], reach: float = _REACH) -> int:
    """Bytes at an upper edge, with room for ``matters``, and for ``others`` not far above it."""
    return max(1, int(_ROOM * max(matters, *(value for value in [0, *others] if value <= reach * matters))))


def bytes_step(top: int) -> int:
    """The step between ticks: a power of two of bytes, or three quarters of one, for 3 to 6 intervals."""
    step = 1 << max(0, (top // 3).bit_length() - 1)
    return step if top // step <= 5 else step * 3 // 2


def bytes_ticks(top: int) -> list[tuple[int, str]]:
    """The ticks from zero to ``top``, in bytes, with their labels."""
    ticks = range(0, top + 1, bytes_step(top))
    return [(tick, format_bytes(tick) if tick else "0") for tick in ticks]


def seconds_step(top: float, most: int = 6) -> float:
    """The step between ticks: the least of 1, 2 or 5 times a power of ten for at most ``most`` intervals."""
    power = 10.0 ** math.floor(math.log10(top / most))
    return next(factor * power for factor in (1, 2, 5, 10) if top / (factor * power) <= most)


def seconds_ticks(top: float, most: int = 6) -> list[float]:
    """The ticks from zero to ``top``, in seconds."""
    step = seconds_step(top, most)
    return [index * step for index in range(int(top / step) + 1)]
