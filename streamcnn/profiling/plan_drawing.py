"""Drawing of a plan: the network from left to right, with a column for each phase, as shapes.

It is a pure function of the sketch. Every column has, from the top: the operators by kind, the tile grid with
the tile in the middle and its halo to scale, the reductions of the barrier after the phase, and the stored
maps. Below them arrows go from a stored map to the phases that read it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from streamcnn.profiling.shapes import Arc, Box, Drawing, Group, Label, Lines, Shape
from streamcnn.profiling.sketch import Kinds, PhaseSketch, PlanSketch, Shares, StoredMap
from streamcnn.support.units import format_bytes, plural

COLUMN, ROW = 82.0, 352.0
"""Width of a column and height of a row of them."""
_GUTTER, _MARGIN, _TAIL = 62.0, 8.0, 150.0
_TOP = 34.0
"""Height of the legend."""
_OPERATORS, _GLYPH, _BARRIER, _GROUND = 26.0, 94.0, 182.0, 288.0
"""The y-coordinates of the parts of a row; the last is the ground line of the stored maps."""
_MAP, _TALLEST, _DEEPEST = 48.0, 60.0, 40.0
_MOST_LINES, _MOST_CUTS = 4, 16
_THINNEST = 1.5
"""Smallest drawn thickness of a halo in pixels, so that it can be seen."""

INK, SOFT, RULE, LIT = "#1c2430", "#5b6675", "#dde2e8", "#ffffff"
TILE, HALO, RESIDENT = "#6ea3ee", "#ffb14a", "#e4f2e7"
BARRIER, WALL = "#a3402a", "#dfaea2"
TIERS = {"memory": "#1f6feb", "host": "#0f8f7e", "disk": "#c77700"}
_PLACES = {"memory": "in memory", "host": "in host RAM", "disk": "on disk"}


def draw_plan(plan: PlanSketch, columns_per_row: int | None = None) -> Drawing:
    """The plan as shapes, in one row or folded into rows of that many columns."""
    places = _places(len(plan.phases) + 1, columns_per_row)
    most = max((store.nbytes for phase in plan.phases for store in phase.stored), default=1)
    num_rows = 1 + max(row for row, _ in places)
    legend = tuple(_legend(plan))
    groups = [Group(legend)]
    groups += [Group(tuple(_row_names(_TOP + row * ROW))) for row in range(num_rows)]
    groups.append(_image_column(plan, *_corner(places[0])))
    for phase, place in zip(plan.phases, places[1:], strict=True):
        groups.append(_phase_column(phase, *_corner(place), most))
    if plan.tail:
        x, y = _corner(places[-1])
        groups.append(_tail_column(plan.tail, x + COLUMN, y))
    groups.append(Group(tuple(_arrows(plan, places))))
    right = max(_legend_end(legend), *(_right_end(places, row) for row in range(num_rows)))
    if plan.tail:
        right = max(right, _right_end(places, num_rows - 1) + _TAIL)
    return Drawing(right + _MARGIN, _TOP + num_rows * ROW, tuple(groups))


def describe_phase(phase: PhaseSketch) -> str:
    """A phase in words."""
    rows, cols = phase.grid
    parts = [
        f"Phase {phase.level}: {_listed(phase.operators)}",
        f"reads {', '.join(phase.inputs)}",
        f"{plural(rows * cols, 'tile')} ({rows}x{cols}) of {phase.extent[0]}x{phase.extent[1]} positions, "
        f"halo {phase.halo[0]}x{phase.halo[1]}",
        "stores " + (", ".join(map(_stored, phase.stored)) or "nothing"),
    ]
    if phase.reductions:
        parts.append(f"then a barrier: {_listed(phase.reductions)} over the whole map")
    return "; ".join(parts) + "."


def _places(count: int, per_row: int | None) -> list[tuple[int, int]]:
    """Row and column of the image and of every phase."""
    return [divmod(index, per_row or count) for index in range(count)]


def _corner(place: tuple[int, int]) -> tuple[float, float]:
    row, column = place
    return _GUTTER + column * COLUMN, _TOP + row * ROW


def _legend(plan: PlanSketch) -> Iterator[Shape]:
    tiers = {store.tier for phase in plan.phases for store in phase.stored}
    entries = [(TILE, "one tile of the grid"), (HALO, "its halo, at scale or a thin frame")]
    entries += [(color, f"map stored {_PLACES[tier]}") for tier, color in TIERS.items() if tier in tiers]
    x = _GUTTER + 4
    for color, text in entries:
        yield Box(x, 8, 11, 11, fill=color)
        yield Label(x + 16, 17.5, text, SOFT, 11.5, centred=False)
        x += 16 + 7 * len(text) + 16


def _legend_end(legend: Sequence[Shape]) -> float:
    return max(shape.x + 7 * len(shape.text) for shape in legend if isinstance(shape, Label))


def _row_names(top: float) -> Iterator[Shape]:
    names = (("phase", 14.0), ("runs", _OPERATORS + 12), ("tile, halo", _GLYPH + _MAP / 2 + 4))
    for name, y in (*names, ("barrier", _BARRIER + 12), ("stores", _GROUND - 2), ("read by", _GROUND + 22)):
        yield Label(0, top + y, name, SOFT, 11, centred=False)


def _image_column(plan: PlanSketch, x: float, y: float) -> Group:
    batch, channels, height, width = plan.image_shape
    size = f"{height}x{width}"
    info = f"The image: {size} pixels, {plural(channels, 'channel')}, batch of {batch}."
    shapes: list[Shape] = [
        _back(x, y),
        Label(x + COLUMN / 2, y + 14, "image", bold=True),
        *_map(x, y + _GLYPH, (height, width)),
        _line(x, y + _GLYPH + _MAP + 15, size),
        _line(x, y + _GLYPH + _MAP + 29, f"x{channels}" if batch == 1 else f"x{channels}, batch {batch}"),
    ]
    return Group(tuple(shapes), info)


def _phase_column(phase: PhaseSketch, x: float, y: float, most: int) -> Group:
    rows, cols = phase.grid
    shapes: list[Shape] = [_back(x, y), Label(x + COLUMN / 2, y + 14, str(phase.level), bold=True)]
    shapes += _kinds(phase.operators, x, y + _OPERATORS + 12, INK, _MOST_LINES)
    shapes += _map(x, y + _GLYPH, phase.extent)
    shapes += _tiles(phase, x, y + _GLYPH)
    shapes.append(_line(x, y + _GLYPH + _MAP + 15, f"{rows}x{cols}"))
    halo = max(phase.halo)
    shapes.append(_line(x, y + _GLYPH + _MAP + 29, f"halo {halo}" if halo else "no halo"))
    if phase.reductions:
        edge = x + COLUMN
        shapes.append(Lines((((edge, y + 4), (edge, y + _GROUND + 4)),), WALL, 1.2))
        shapes += _kinds(phase.reductions, x, y + _BARRIER + 12, BARRIER, 2)
    shapes += _bars(phase.stored, x, y + _GROUND, most)
    return Group(tuple(shapes), describe_phase(phase))


def _tail_column(tail: Kinds, x: float, y: float) -> Group:
    info = f"The resident tail: {_listed(tail)}, on whole maps with ordinary autograd."
    shapes: list[Shape] = [
        Box(x + 10, y, _TAIL - 14, _GROUND + 4, fill=RESIDENT),
        Label(x + 10 + (_TAIL - 14) / 2, y + 16, "resident tail", bold=True),
        Label(x + 10 + (_TAIL - 14) / 2, y + 31, "on whole maps", SOFT, 10.5),
        *_kinds(tail, x + 10, y + 56, INK, 15, _TAIL - 14),
    ]
    return Group(tuple(shapes), info)


def _map(x: float, y: float, extent: tuple[int, int]) -> list[Shape]:
    left, top, width, height = _frame(x, y, extent)
    return [Box(left, top, width, height, fill="#f5f7fa", stroke="#9aa5b5")]


def _frame(x: float, y: float, extent: tuple[int, int]) -> tuple[float, float, float, float]:
    """The box of a map; its longer edge has the same length in every column."""
    scale = _MAP / max(extent)
    height, width = max(4.0, extent[0] * scale), max(4.0, extent[1] * scale)
    return x + (COLUMN - width) / 2, y + (_MAP - height) / 2, width, height


def _tiles(phase: PhaseSketch, x: float, y: float) -> list[Shape]:
    """The grid of tiles, and the tile in the middle on the region that it reads."""
    left, top, width, height = _frame(x, y, phase.extent)

    def box(shares: Shares, fill: str, rim: float = 0.0) -> Box:
        (y0, y1), (x0, x1) = shares
        x, y, high, wide = left + x0 * width, top + y0 * height, (y1 - y0) * height, (x1 - x0) * width
        return Box(x - rim, y - rim, wide + 2 * rim, high + 2 * rim, fill)

    rows, cols = (_cuts(count) for count in phase.grid)
    across = tuple(((left, top + s * height), (left + width, top + s * height)) for s in rows)
    down = tuple(((left + s * width, top), (left + s * width, top + height)) for s in cols)
    shapes: list[Shape] = [box(phase.needed, HALO)]
    if max(phase.halo):
        shapes.append(box(phase.own, HALO, _THINNEST))
    shapes.append(box(phase.own, TILE))
    if across or down:
        shapes.append(Lines(across + down, "#9aa5b5", 0.6))
    return shapes


def _cuts(count: int) -> list[float]:
    """The positions of the grid's lines, as shares; empty for a grid too fine to be seen."""
    return [index / count for index in range(1, count)] if count <= _MOST_CUTS else []


def _bars(stored: Sequence[StoredMap], x: float, ground: float, most: int) -> Iterator[Shape]:
    """A bar for each stored map, its height in proportion to its bytes, and their sum above."""
    if not stored:
        return
    width = min(20.0, (COLUMN - 14) / len(stored) - 3)
    left = x + COLUMN / 2 - len(stored) * (width + 3) / 2
    heights = [max(2.0, store.nbytes / most * _TALLEST) for store in stored]
    for index, (store, height) in enumerate(zip(stored, heights, strict=True)):
        yield Box(left + index * (width + 3), ground - height, width, height, TIERS[store.tier])
    total = sum(store.nbytes for store in stored)
    yield Label(x + COLUMN / 2, ground - max(heights) - 5, format_bytes(total), SOFT, 10.5)


def _arrows(plan: PlanSketch, places: Sequence[tuple[int, int]]) -> Iterator[Shape]:
    """Arrows from the column that stores a map to each that reads it; to the tail if none does."""
    made = {plan.image: 0}
    read: set[int] = set()
    for index, phase in enumerate(plan.phases, start=1):
        for source in sorted({made[name] for name in phase.inputs if name in made}):
            read.add(source)
            yield from _arrow(places, places[source], places[index])
        made.update({store.name: index for store in phase.stored})
    if plan.tail:
        row, column = places[-1]
        for source in sorted(set(made.values()) - read):
            yield from _arrow(places, places[source], (row, column + 1))


def _arrow(
    places: Sequence[tuple[int, int]], source: tuple[int, int], reader: tuple[int, int]
) -> Iterator[Shape]:
    """An arrow that leaves right of the middle and arrives left of it; a column's arrows stay apart."""
    (x0, y0), (x1, y1) = _corner(source), _corner(reader)
    start, stop = x0 + COLUMN / 2 + 5, x1 + COLUMN / 2 - 5
    if y0 == y1:
        yield _hanging(start, stop, y0)
    else:
        # Leaving at the end of one row, and arriving at the beginning of the other.
        yield _hanging(start, _right_end(places, source[0]), y0)
        yield _hanging(_GUTTER - 4, stop, y1)


def _hanging(start: float, stop: float, top: float) -> Arc:
    """A hanging arrow, the deeper the longer it is, up to a limit."""
    sag = min(_DEEPEST, 12 + 12 * math.log2(max(1.0, (stop - start + 10) / COLUMN)))
    ground = top + _GROUND + 8
    return Arc((start, ground), (stop, ground), sag * 4 / 3, "#8a94a6")


def _right_end(places: Sequence[tuple[int, int]], row: int) -> float:
    """The x-coordinate of the end of a row's last column."""
    return _GUTTER + COLUMN * (1 + max(column for place_row, column in places if place_row == row))


def _kinds(kinds: Kinds, x: float, y: float, color: str, most: int, width: float = COLUMN) -> Iterator[Shape]:
    """At most ``most`` lines, one for each kind of operator; the last counts the kinds left out."""
    shown = kinds if len(kinds) <= most else kinds[: most - 1]
    lines = [name if count == 1 else f"{count} {name}" for name, count in shown]
    if len(shown) < len(kinds):
        lines.append(f"+ {sum(count for _, count in kinds[len(shown) :])} more")
    for index, text in enumerate(lines):
        yield Label(x + width / 2, y + 14 * index, _fitted(text, width), color, 10.5)


def _line(x: float, y: float, text: str) -> Label:
    return Label(x + COLUMN / 2, y, _fitted(text, COLUMN), SOFT, 10.5)


def _fitted(text: str, width: float) -> str:
    most = int(width / 6.4)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _back(x: float, y: float) -> Box:
    return Box(x + 1, y, COLUMN - 2, _GROUND + 6, fill=LIT)


def _listed(kinds: Kinds) -> str:
    return ", ".join(name if count == 1 else f"{count} {name}" for name, count in kinds)


def _stored(store: StoredMap) -> str:
    return f"{store.name} {format_bytes(store.nbytes)} {_PLACES[store.tier]}"
