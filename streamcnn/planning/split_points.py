"""Split points: nodes after which a stretch of local operators without a barrier is divided.

Every operator with a window adds to the halo that a tile of its phase needs. Splitting stores a map and
starts the halo anew. Stretches are split where the fewest bytes have to be stored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from streamcnn.geometry.axis_maps import AxisMap
from streamcnn.geometry.regions import Interval
from streamcnn.graph.program import Kind, Program
from streamcnn.planning.staging import assign_levels

_PROBE = 64
"""Output positions over which an operator's reach is measured."""


def choose_split_points(program: Program, limit: float) -> frozenset[str]:
    """Choose nodes after which to split, so that no phase's halo exceeds ``limit`` input pixels.

    An operator whose own halo exceeds that is left as it is.
    """
    crossing = _crossing_bytes(program)
    split_points: set[str] = set()
    while True:
        levels = assign_levels(program, split_points)
        place = _next_split_point(program, levels, crossing, limit, split_points)
        if place is None:
            return frozenset(split_points)
        split_points.add(place)


def _next_split_point(
    program: Program,
    levels: Mapping[str, int],
    crossing: Mapping[str, int],
    limit: float,
    split_points: Collection[str],
) -> str | None:
    """The best place before the first operator at which its phase's halo exceeds the limit, or ``None``."""
    reach = _reaches(program, levels)
    before: list[str] = []
    for node in program.nodes.values():
        if node.kind is not Kind.LOCAL:
            continue
        if reach[node.name] > limit:
            places = [n for n in before if levels[n] == levels[node.name] and n not in split_points]
            # Not so early that hardly any halo is saved.
            places = [n for n in places if reach[n] >= limit / 3] or [n for n in places if reach[n] > 0]
            if places:
                return min(reversed(places), key=lambda n: crossing[n])
        before.append(node.name)
    return None


def _reaches(program: Program, levels: Mapping[str, int]) -> dict[str, float]:
    """Halo accumulated in its phase up to each local operator, both sides together, in input pixels."""
    image = program.nodes[program.image].size
    reach: dict[str, float] = {}
    for node in program.nodes.values():
        if node.local is None:
            continue
        widest = 0.0
        for name, access in node.local.accesses.items():
            operand = program.nodes[name]
            inherited = reach.get(name, 0.0) if levels[name] == levels[node.name] else 0.0
            for axis, axis_map in enumerate(access):
                pixel = image[axis] / operand.size[axis]
                grown = _growth(axis_map, node.size[axis], operand.size[axis]) * pixel
                widest = max(widest, inherited + grown)
        reach[node.name] = widest
    return reach


def _growth(axis_map: AxisMap, num_out: int, size: int) -> float:
    """Number of operand positions that a stretch of outputs reads beyond its even share."""
    if axis_map.pointwise:
        return 0.0
    probe = min(_PROBE, num_out)
    middle = (num_out - probe) // 2
    return max(axis_map.window(Interval(middle, middle + probe)).size - probe * size / num_out, 0.0)


def _crossing_bytes(program: Program) -> dict[str, int]:
    """By local node: bytes of local maps that are made by it or before it, and read after it."""
    order = [node for node in program.nodes.values() if node.kind is Kind.LOCAL]
    last = {node.name: index for index, node in enumerate(order)}
    for index, node in enumerate(order):
        for name in node.operands:
            if name in last:
                last[name] = index
    dying: dict[int, int] = {}
    for node in order:
        dying[last[node.name]] = dying.get(last[node.name], 0) + node.nbytes
    crossing: dict[str, int] = {}
    alive = 0
    for index, node in enumerate(order):
        alive += node.nbytes - dying.get(index, 0)
        crossing[node.name] = alive
    return crossing
